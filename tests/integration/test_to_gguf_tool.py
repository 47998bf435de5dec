"""to_gguf.py as a user runs it: a Hugging Face folder or a Megatron checkpoint in, one file or one sentence out."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from tests.helpers.gguf_models import VOCAB_SIZE, make_toy_model, write_gguf_source
from tests.helpers.messages import assert_errors, assert_problem
from tests.helpers.tool_runs import run_tool, run_tool_here
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import toy_arguments

pytestmark = pytest.mark.integration

TOOL = "checkpoint_convert/to_gguf.py"
HAS_LLAMA_CPP = importlib.util.find_spec("xllamacpp") is not None


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_gguf_source(tmp_path_factory.mktemp("source") / "toy-model")


def test_a_hugging_face_folder_becomes_one_proved_file(tmp_path, source):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"body": "春眠不觉晓 the quick brown fox"}) + "\n")
    target = tmp_path / "new" / "model.gguf"
    corpus = ("--corpus", tmp_path / "texts.jsonl", "--json-keys", "body")
    result = run_tool(TOOL, "--load", source, "--save", target, *corpus)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"{target}: llama in f16, 353,952 parameters; 30 tensors (23 f16, 7 f32), 0 dropped; ")
    fields = GGUFReader(target).fields
    assert fields["general.name"].contents() == "toy-model"
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert len(fields["tokenizer.ggml.tokens"].data) == VOCAB_SIZE
    assert "30 read back, all equal to their source" in result.stdout
    if HAS_LLAMA_CPP:
        assert "equal on 1 texts, " in result.stdout
        assert "greedy tokens equal; log-probabilities within 0.0" in result.stdout
        assert result.stdout.count("passed") == 7
    else:
        assert "not asked: xllamacpp is not installed" in result.stdout


def test_a_megatron_checkpoint_becomes_one_file(tmp_path):
    tensors = {
        key: torch.randn(352, 24) if tensor.shape == (64, 24) else tensor for key, tensor in toy_llama_tensors().items()
    }
    arguments = toy_arguments(
        vocab_size=VOCAB_SIZE, padded_vocab_size=352, tokenizer_model=str(make_toy_model()), max_position_embeddings=64
    )
    write_toy_checkpoint(tmp_path / "run", tensors, arguments=arguments)
    target = tmp_path / "out" / "model.gguf"
    result = run_tool_here(TOOL, "--load", tmp_path / "run", "--save", target, "--type", "f32", "--no-verify", "--json")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    report = json.loads(result.stdout)
    assert (report["arch"], report["num_tensors"], report["types"]) == ("llama", 30, {"f32": 30})
    assert report["checks"][1] == {"check": "llama.cpp", "result": "not asked: --no-verify", "is_passed": None}
    stored = {entry.name: entry.data for entry in GGUFReader(target).tensors}
    assert torch.equal(torch.tensor(stored["output.weight"]), tensors["output_layer.weight"])
    down = tensors["decoder.layers.mlp.linear_fc2.weight"][2]
    assert torch.equal(torch.tensor(stored["blk.2.ffn_down.weight"]), down)


def test_weights_that_cannot_be_converted_are_one_message_and_leave_no_file(tmp_path, source):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = run_tool_here(TOOL, "--load", broken, "--save", tmp_path / "model.gguf")
    assert (result.returncode, result.stdout) == (2, "")
    assert_problem(
        result.stderr.splitlines()[-1],
        "error: model.layers.1.mlp.up_proj.weight:",
        "finite in f16",
        "got NaN or infinity",
        "--type bf16",
        "65,504",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_bad_arguments_are_one_message(tmp_path, source):
    taken = tmp_path / "model.gguf"
    taken.write_text("mine")
    result = run_tool_here(TOOL, "--load", source, "--save", taken)
    assert (result.returncode, result.stdout) == (2, "")
    assert_errors(result.stderr, (f"{taken}:", "must not exist", "--overwrite"))
    result = run_tool_here(TOOL, "--load", source, "--save", taken, "--overwrite")
    assert_errors(result.stderr, (f"{taken}:", "--overwrite replaces a GGUF file only", "got another file"))
    assert taken.read_text() == "mine"
    result = run_tool_here(TOOL, "--load", source, "--save", tmp_path / "new.gguf", "--iteration", "3")
    assert result.returncode == 2
    assert_errors(result.stderr, (f"{source}:", "--iteration and --tokenizer-model", "got a Hugging Face folder"))
