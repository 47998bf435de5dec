"""tools/quantize.py with AutoRound itself, and what the folder computes in transformers with AutoRound's own layers."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
import torch
import transformers
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_hammer.cli.quantize import main
from megatron_hammer.serving.quantization.packed_weights import write_plain_folder
from tests.helpers.packed_folders import GROUP_SIZE, write_small_source
from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl

NUM_LAYERS = 7  # of one block: AutoRound takes seconds for each


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto_round") / "source"
    # Weights as large as those of a trained model, so that fp16 arithmetic does not blur the comparison.
    write_small_source(folder, num_hidden_layers=1, initializer_range=0.05)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", TOY_TEXTS * 12)


def run(source: Path, corpus: Path, target: Path, method: str, *flags: str) -> None:
    names = ("--load", source, "--save", target, "--format", method, "--calibration", corpus)
    small = ("--num-samples", "4", "--seq-length", "16", "--iterations", "2", "--group-size", str(GROUP_SIZE))
    main([*map(str, names), *small, *flags])


@pytest.fixture(scope="module")
def quantized(source, corpus, tmp_path_factory):
    """Both formats, made while no socket can be opened."""
    folder = tmp_path_factory.mktemp("quantized")

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        for method in ("gptq", "awq"):
            run(source, corpus, folder / method, method)
    return folder


def compute_logits(folder: Path, **options: object) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **options).eval()
    return run_model(model)


@torch.no_grad()
def run_model(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    logits: torch.Tensor = model(ids).logits.float()
    return logits


def compute_with_auto_round(folder: Path, method: str, source: Path) -> torch.Tensor:
    if method == "gptq":
        # transformers' own loading of GPTQ needs gptqmodel. AutoRound's torch layers need nothing else.
        own = transformers.AutoRoundConfig(backend="auto_round:torch_zp")
        return compute_logits(folder, quantization_config=own)
    # For AWQ there is no such loading on a CPU, so that the layers are put in place here.
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).eval()
    tensors = load_file(folder / "model.safetensors")
    for name, linear in [item for item in model.model.named_modules() if isinstance(item[1], nn.Linear)]:
        layer = WQLinear_GEMM(4, GROUP_SIZE, linear.in_features, linear.out_features, False, "cpu")
        layer.load_state_dict({part: tensors[f"model.{name}.{part}"] for part in ("qweight", "qzeros", "scales")})
        model.model.set_submodule(name, layer)
    return run_model(model)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_our_reading_computes_what_auto_round_computes(source, quantized, tmp_path, method: str) -> None:
    write_plain_folder(quantized / method, tmp_path)
    ours, theirs = compute_logits(tmp_path), compute_with_auto_round(quantized / method, method, source)
    original = compute_logits(source)
    # Both compute in fp16. The quantization itself moves the logits some hundred times as far.
    difference, cost = (ours - theirs).abs().max(), (ours - original).abs().max()
    assert difference < cost / 20, (difference, cost)
    assert difference < 0.02 * theirs.std()
    # A twin: one layer with its rows the other way round.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].flip(0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (compute_logits(tmp_path) - theirs).abs().max() > 10 * difference


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_folder_is_complete(source, quantized, method: str) -> None:
    folder = quantized / method
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization | {"bits": 4, "group_size": GROUP_SIZE, "quant_method": method} == quantization
    assert quantization["sym"] is (method == "gptq")
    before = json.loads((source / "config.json").read_text())
    assert config == before | {"dtype": "float16", "torch_dtype": "float16"}
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    report = json.loads((folder / "quantization_report.json").read_text())
    assert (report["num_layers"], report["num_samples"], report["seq_length"]) == (NUM_LAYERS, 4, 16)
    assert report["quantized_bytes"] < report["source_bytes"] / 2
    tensors = load_file(folder / "model.safetensors")
    assert sum(name.endswith(".qweight") for name in tensors) == NUM_LAYERS
    assert tensors["lm_head.weight"].dtype == tensors["model.norm.weight"].dtype == torch.float16


def test_the_same_seed_gives_the_same_bytes_and_a_table_says_what_they_cost(
    source, corpus, quantized, tmp_path, capsys
) -> None:
    flags = ("--json", "--evaluate", f"toy={corpus}", "--max-documents", "6", "--compare", str(quantized / "awq"))
    run(source, corpus, tmp_path / "gptq", "gptq", *flags)
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_layers"] == NUM_LAYERS
    assert [row["model"] for row in printed["comparison"]] == ["source", "gptq", "awq"]
    bits = [row["bits_per_byte"] for row in printed["comparison"]]
    assert bits[1] == pytest.approx(bits[0], rel=0.05)
    assert len({*bits}) == 3
    table = tmp_path / "gptq" / "quantization_comparison.md"
    assert table.read_text().count("\n") == 5
    assert json.loads(table.with_suffix(".json").read_text()) == printed["comparison"]
    for path in (table, table.with_suffix(".json")):
        path.unlink()
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (quantized / "gptq", tmp_path / "gptq")
    ]
    assert hashes[0] == hashes[1]
