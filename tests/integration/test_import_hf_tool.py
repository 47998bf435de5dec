"""From Hugging Face to continued pretraining as a user does it: every layout starts at the loss of transformers."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_hammer.checkpoint.convert.from_hugging_face import ImportOptions, import_from_hugging_face
from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.data.indexed.pair import IndexedWriter
from tests.helpers.indexed_writing import add_document
from tests.helpers.tool_runs import run_tool, run_tool_here, start_tool
from tests.helpers.toy_hf_folder import write_toy_folder
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer
from tests.helpers.training_runs import TOY_MODEL, TOY_MOE, TOY_SCHEDULE, train

pytestmark = pytest.mark.integration

IMPORT = "checkpoint_convert/hf_to_megatron.py"
# TOY_MODEL and TOY_MOE, as transformers spells them.
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}
LLAMA = transformers.LlamaConfig(**SIZES)
MOE = transformers.Qwen2MoeConfig(
    **SIZES,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=80,
    shared_expert_intermediate_size=112,
    norm_topk_prob=True,
    qkv_bias=False,
    router_aux_loss_coef=0.01,
)
TP2_PP2 = (4, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
EP2_TP2 = (
    *(2, "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
    *("--tensor-model-parallel-size", "2"),
)


def save_model(config, folder):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def sequence() -> torch.Tensor:
    """One sequence of training: tokens [s + 1], the last of which is only a label."""
    tokens = np.random.default_rng(9).integers(0, SIZES["vocab_size"], SIZES["max_position_embeddings"])
    return torch.tensor([*tokens, tokens[0]])


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory, sequence) -> tuple[str, ...]:
    """A corpus with the period of the sequence length: every sample of it is `sequence`. No step changes anything."""
    folder = tmp_path_factory.mktemp("data")
    with IndexedWriter(folder / "data", np.dtype(np.uint16)) as writer:
        add_document(writer, np.tile(sequence[:-1].numpy(), 200).astype(np.uint16))
    data = ("--data-path", str(folder / "data"), "--split", "1,0,0", "--data-cache-path", str(folder / "cache"))
    still = ("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0")
    return (*data, *TOY_SCHEDULE, *still, "--make-vocab-size-divisible-by", "4")  # leaves no padding


def hf_loss(model, sequence) -> float:
    with torch.no_grad():
        logits = model(sequence[None, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, sequence[1:]).item()


def first_loss(folder: Path, checkpoint: Path, flags, num_processes, *layout) -> float:
    """Loss of the first step that starts from the checkpoint."""
    load = ("--load", str(checkpoint), "--save", str(folder / "saved"))
    (line,) = train(num_processes, folder / "metrics.jsonl", *flags, *load, *layout)
    assert line["step"] == 1
    return line["loss"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A Llama of transformers, imported by the tool with every check, and what the tool said."""
    folder = tmp_path_factory.mktemp("imported")
    model = save_model(LLAMA, folder / "hf")
    result = run_tool(IMPORT, "--load", folder / "hf", "--save", folder / "megatron", "--json")
    assert result.returncode == 0, result.stderr
    return folder, model, json.loads(result.stdout)


@pytest.mark.parametrize("layout", [(1,), TP2_PP2], ids=["one", "tp2-pp2"])
def test_training_starts_at_the_loss_of_transformers(tmp_path, imported, data_flags, sequence, layout):
    folder, model, report = imported
    assert [check["is_passed"] for check in report["checks"]] == [True] * len(report["checks"])
    assert any(check["check"].startswith("logits, LlamaForCausalLM") for check in report["checks"])
    loss = first_loss(tmp_path, folder / "megatron", (*TOY_MODEL, *data_flags), *layout)
    assert loss == pytest.approx(hf_loss(model, sequence), rel=2e-6)
    target = tmp_path / "again"
    export_to_hugging_face(ExportOptions(load_dir=tmp_path / "saved", save_dir=target, verify="tensors"))
    before, after = (load_file(path / "model.safetensors") for path in (folder / "hf", target))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_are_spread_over_ranks(tmp_path, data_flags, sequence):
    model = save_model(MOE, tmp_path / "hf")
    options = ImportOptions(hf_dir=tmp_path / "hf", save_dir=tmp_path / "megatron", verify="tensors")
    import_from_hugging_face(options)
    loss = first_loss(tmp_path, tmp_path / "megatron", (*TOY_MODEL, *TOY_MOE, *data_flags), *EP2_TP2)
    assert loss == pytest.approx(hf_loss(model, sequence), rel=2e-6)


def test_the_tool_prints_a_summary(tmp_path):
    tokenizer = train_toy_tokenizer(tmp_path)
    write_toy_folder(tmp_path / "hf", vocab_size=TOY_VOCAB_SIZE)
    flags = ("--tokenizer-model", tokenizer, "--verify", "tensors", "--dtype", "fp32")
    result = run_tool_here(IMPORT, "--load", tmp_path / "hf", "--save", tmp_path / "save", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    *table, summary = result.stdout.splitlines()
    assert "all 30 equal, bit for bit" in "\n".join(table)
    assert "parameters in float32; 30 tensors in, 0 left out, 21 out, all read back equal; tokenizer in " in summary


def test_bad_inputs_end_with_one_sentence_and_exit_code_2(tmp_path):
    write_toy_folder(tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_toy_folder(tmp_path / "window")
    config = json.loads((tmp_path / "window" / "config.json").read_text())
    (tmp_path / "window" / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    cases = {
        ("--load", tmp_path / "nowhere"): "nowhere/config.json: must exist, got none",
        ("--load", tmp_path / "short"): "model.safetensors: file must be complete safetensors, got ",
        ("--load", tmp_path / "window"): "sliding_window: must be null or at least max_position_embeddings=32, got",
    }
    for arguments, message in cases.items():
        result = run_tool_here(IMPORT, *arguments, "--save", tmp_path / "save")
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert all(line.startswith("error: ") for line in result.stderr.splitlines())
        assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_killed_import_leaves_nothing_that_loads(tmp_path, number, exit_code):
    """The weights are large enough for the signal to come while it writes."""
    write_toy_folder(tmp_path / "hf", vocab_size=2_000_000)
    flags = ("--load", tmp_path / "hf", "--save", tmp_path / "save", "--verify", "tensors", "--dtype", "fp32")
    with start_tool(IMPORT, *flags) as process:
        deadline_s = time.monotonic() + 60
        while not any(path.stat().st_size > 1_000_000 for path in tmp_path.glob("save/release.*.partial/__0_0.distcp")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    assert process.returncode == exit_code
    if number == signal.SIGKILL:
        (left,) = (tmp_path / "save").iterdir()
        assert re.fullmatch(r"release\.\w{16}\.partial", left.name)
        assert not (left / ".metadata").exists()
    else:
        assert not (tmp_path / "save").exists()
