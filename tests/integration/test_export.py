"""From training to Hugging Face as a user does it: every layout gives the same folder, with the loss of training."""

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

from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.data.indexed.pair import IndexedWriter
from tests.helpers.indexed_writing import add_document
from tests.helpers.tool_runs import run_example, run_tool, run_tool_here, start_tool
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import toy_arguments
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer
from tests.helpers.training_runs import TOY_MODEL, TOY_MOE, TOY_SCHEDULE, environment, train

pytestmark = pytest.mark.integration

EXPORT = "checkpoint_convert/megatron_to_hf.py"
SAMPLE = "tools/generate_sample.py"
SEQ_LENGTH, VOCAB_SIZE = 64, 1000  # of TOY_MODEL
NUM_STEPS = 2


@pytest.fixture(scope="module")
def sequence() -> torch.Tensor:
    """One sequence of training: tokens [s + 1], the last of which is only a label."""
    tokens = np.random.default_rng(9).integers(0, VOCAB_SIZE, SEQ_LENGTH)
    return torch.tensor([*tokens, tokens[0]])


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory, sequence) -> tuple[str, ...]:
    """A corpus with the period of the sequence length: every sample of it is `sequence`, in whatever order."""
    folder = tmp_path_factory.mktemp("data")
    with IndexedWriter(folder / "data", np.dtype(np.uint16)) as writer:
        add_document(writer, np.tile(sequence[:-1].numpy(), 200).astype(np.uint16))
    data = ("--data-path", str(folder / "data"), "--split", "1,0,0", "--data-cache-path", str(folder / "cache"))
    # Megatron's loss counts the padding of the vocabulary as classes, transformers has none: leave no padding.
    return (*data, *TOY_SCHEDULE, "--lr-warmup-iters", "0", "--make-vocab-size-divisible-by", "4")


def train_and_reshard(folder: Path, model_flags, first, others) -> float:
    """Train NUM_STEPS in one layout; in each other make one step that changes nothing. Returns the loss of the last."""
    first_run = ("--train-iters", str(NUM_STEPS), "--save", str(folder / "0"))
    train(first[0], folder / "0.jsonl", *model_flags, *first[1:], *first_run)
    still = ("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--finetune", "--load", str(folder / "0"))
    for number, layout in enumerate(others, start=1):
        save = ("--save", str(folder / str(number)))
        (line,) = train(layout[0], folder / f"{number}.jsonl", *model_flags, *layout[1:], *still, *save)
    return line["loss"]


TP2_PP2 = (4, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
DP2 = (2,)  # with the distributed optimizer, as everywhere
PP2_VP2 = (2, "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
EP2_TP2 = (
    *(2, "--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
    *("--tensor-model-parallel-size", "2"),
)


def hf_loss(model_dir: Path, sequence: torch.Tensor) -> float:
    """Mean cross entropy of the sequence by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        logits = model(sequence[None, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, sequence[1:]).item()


@pytest.mark.parametrize(
    "model, first, others, hf_class",
    [
        pytest.param((), TP2_PP2, [PP2_VP2, DP2, (1,)], "LlamaForCausalLM", id="llama-tp2-pp2-vp2-dp2"),
        pytest.param(TOY_MOE, EP2_TP2, [(1,)], "Qwen2MoeForCausalLM", id="moe-ep2-tp2"),
    ],
)
def test_every_layout_exports_the_same_model(tmp_path, data_flags, sequence, model, first, others, hf_class):
    loss = train_and_reshard(tmp_path, (*TOY_MODEL, *model, *data_flags), first, others)
    weights = []
    for number in range(1 + len(others)):
        options = ExportOptions(load_dir=tmp_path / str(number), save_dir=tmp_path / f"hf-{number}", verify="tensors")
        report = export_to_hugging_face(options)
        assert (report.hf_class, report.iteration) == (hf_class, 1 if number else NUM_STEPS)
        weights.append(load_file(tmp_path / f"hf-{number}" / "model.safetensors"))
    single_rank = weights.pop()
    for other in weights:
        assert other.keys() == single_rank.keys()
        assert all(torch.equal(tensor, single_rank[name]) for name, tensor in other.items())
    assert hf_loss(tmp_path / "hf-0", sequence) == pytest.approx(loss, rel=2e-6)


@pytest.mark.parametrize(
    "layout, model",
    [
        pytest.param((2,), TOY_MOE, id="distributed optimizers of dense and expert weights"),
        pytest.param((1, "--no-distributed-optimizer"), (), id="plain optimizer"),
    ],
)
def test_master_weights_of_bf16_training_round_to_the_weights(tmp_path, data_flags, layout, model):
    flags = (*TOY_MODEL, *model, *data_flags, "--precision", "bf16", "--train-iters", "1")
    if model:
        flags += ("--expert-model-parallel-size", "2")
    train(layout[0], tmp_path / "log.jsonl", *flags, *layout[1:], "--save", str(tmp_path / "saved"))
    reader, masters = (open_checkpoint(tmp_path / "saved", weights=weights) for weights in ("model", "master"))
    assert reader.tensors.keys() == masters.tensors.keys()
    for name, stored in reader.tensors.items():
        weight, master = reader.read(name), masters.read(name)
        assert (stored.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(master.bfloat16(), weight), name
        assert not torch.equal(master, weight.float()), name


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    write_toy_checkpoint(tmp_path / "checkpoint", toy_llama_tensors())
    return tmp_path / "checkpoint"


def test_bad_inputs_end_with_one_sentence_and_exit_code_2(tmp_path, checkpoint):
    write_toy_checkpoint(tmp_path / "norm", toy_llama_tensors(), arguments=toy_arguments(embedding_norm=True))
    shard = write_toy_checkpoint(tmp_path / "short", toy_llama_tensors()) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:5000])
    cases = {
        ("--load", tmp_path / "nowhere"): "nowhere: checkpoint directory does not exist",
        ("--load", tmp_path / "short"): "__0_0.distcp: must hold at least",
        ("--load", tmp_path / "norm"): "transformers has no Open-Llama class any more",
        ("--load", checkpoint, "--tokenizer-model", tmp_path / "no.model"): "no.model: tokenizer does not exist",
    }
    for arguments, message in cases.items():
        result = run_tool_here(EXPORT, *arguments, "--save", tmp_path / "hf")
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert all(line.startswith("error: ") for line in result.stderr.splitlines())
        assert not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_killed_export_leaves_nothing_that_loads(tmp_path, number, exit_code):
    """The weights are large enough for the signal to come while it writes; SIGKILL leaves another name, no config."""
    tensors = toy_llama_tensors()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.randn(2_000_000, 24)
    arguments = toy_arguments(vocab_size=2_000_000)
    write_toy_checkpoint(tmp_path / "checkpoint", tensors, arguments=arguments, num_chunks=1)
    with start_tool(EXPORT, "--load", tmp_path / "checkpoint", "--save", tmp_path / "hf") as process:
        deadline_s = time.monotonic() + 60
        while not any(path.stat().st_size > 1_000_000 for path in tmp_path.glob("hf.*.partial/model.safetensors")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert not (tmp_path / "hf").exists()
    assert len(list(tmp_path.glob("hf.*.partial"))) == (number == signal.SIGKILL)
    assert not list(tmp_path.glob("hf.*.partial/config.json"))


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    """A checkpoint that names the tokenizer that it was trained with."""
    folder = tmp_path_factory.mktemp("with_tokenizer")
    tensors = {key: value * 0.1 for key, value in toy_llama_tensors().items()}  # well conditioned, for the comparison
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.randn(TOY_VOCAB_SIZE, 24) * 0.1
    arguments = toy_arguments(vocab_size=TOY_VOCAB_SIZE, tokenizer_model=str(train_toy_tokenizer(folder)))
    write_toy_checkpoint(folder / "checkpoint", tensors, arguments=arguments)
    return folder / "checkpoint"


def test_both_models_compute_the_same_and_a_sample_comes_from_the_exported_one(tmp_path, with_tokenizer):
    result = run_tool(EXPORT, "--load", with_tokenizer, "--save", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert "30 out, 0 dropped, all read back equal; float32 in 1 file, tokenizer equal on" in result.stdout
    assert re.search(r"most probable token .* passed", result.stdout)
    sample = ("--model", tmp_path / "hf", "--prompt", "the quick", "--max-new-tokens", "8")
    one, again = (start(SAMPLE, *sample, "--seed", "1") for start in (run_tool, run_tool_here))
    assert (one.returncode, one.stderr) == (0, "")
    assert one.stdout.startswith("the quick")
    assert len(one.stdout.strip()) > len("the quick")
    assert one.stdout == again.stdout


def test_the_example_looks_exports_and_passes_flags_on(tmp_path, with_tokenizer):
    knobs = {"CHECKPOINT": str(with_tokenizer), "OUTPUT_DIR": str(tmp_path / "hf"), "PROMPT": "the quick"}
    result = run_example("convert_to_hf.sh", "--verify", "tensors", "--json", **environment() | knobs)
    assert result.returncode == 0, result.stderr
    (report,) = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
    assert (report["iteration"], report["num_hf_tensors"], report["dtype"]) == (10, 30, "float32")
    assert [(row["check"], row["is_passed"]) for row in report["checks"]] == [
        ("tensors", True),
        ("tokenizer", True),
        ("Megatron against transformers", None),
    ]
    assert "iteration 10" in result.stdout.split("== export")[0]
    assert result.stdout.split("by transformers\n")[1].startswith("the quick")


def test_a_sample_needs_a_whole_model(tmp_path):
    result = run_tool_here(SAMPLE, "--model", tmp_path, "--prompt", "x")
    assert result.returncode == 2
    assert "model folder must hold config.json, got none" in result.stderr
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert "must hold tokenizer.json" in run_tool_here(SAMPLE, "--model", tmp_path, "--prompt", "x").stderr
