"""Perplexity of a Hugging Face folder and of its checkpoint against transformers and lm-eval, by the command itself.

Relative, in fp32: at most 2e-7 was measured for both; a wrong policy for the first token moves a figure by 1e-2.
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from megatron_hammer.cli.evaluate_perplexity import main
from tests.helpers.scored_models import BOS_ID, MAX_LENGTH, TEXTS, import_model, write_hf_model
from tests.helpers.toy_tokenizer import write_jsonl

TOLERANCE = 1e-5
SHORT_CHARACTERS = 26  # of Chinese, fewer than 80 bytes: one window
# Many documents of several windows, and some of one.
DOMAINS = {
    "zh": [TEXTS[0] * repeats for repeats in (1, 3, 2)],
    "en": [TEXTS[1][start:] * 2 for start in range(5)],
    "code": [TEXTS[2] * 5, TEXTS[2]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    import_model(write_hf_model(folder / "hf", pieces=("th", "in", "er", "the")), folder / "checkpoint")
    for name, texts in DOMAINS.items():
        write_jsonl(folder / f"{name}.jsonl", texts)
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], folder: Path, models: list[Path], *flags: str) -> dict[str, Any]:
    domains = [str(folder / f"{name}.jsonl") for name in DOMAINS]
    main(["--models", *map(str, models), "--domains", *domains, "--json", *flags])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_both_equal_a_plain_computation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--max-characters", str(SHORT_CHARACTERS))
    report = evaluate(capsys, folder, [folder / "hf", folder / "checkpoint"], *flags)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    expected = []
    for texts in DOMAINS.values():
        nats, num_tokens = 0.0, 0
        for text in texts:
            ids = [BOS_ID, *tokenizer(text[:SHORT_CHARACTERS])["input_ids"]]
            assert len(ids) <= MAX_LENGTH
            logits = model(torch.tensor([ids])).logits[0, :-1].detach()
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
            num_tokens += len(ids) - 1
        expected.append(math.exp(nats / num_tokens))
    found = [row["perplexity"] for row in report["rows"]]
    assert found == pytest.approx(2 * expected, rel=TOLERANCE)
    average = math.exp(np.log(expected).mean())
    assert [one["perplexity"] for one in report["averages"]] == pytest.approx([average] * 2, rel=TOLERANCE)
    # The twin: without BOS the figures are others.
    other = evaluate(capsys, folder, [folder / "hf"], "--bos", "none", *flags)["rows"]
    assert [row["perplexity"] for row in other] != pytest.approx(expected, rel=1e-3)


def test_bits_per_byte_are_those_of_lm_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluate(capsys, folder, [folder / "hf"])["rows"]
    harness = HFLM(pretrained=str(folder / "hf"), dtype="float32", device="cpu", batch_size=4)
    for row, (name, texts) in zip(rows, DOMAINS.items(), strict=True):
        requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
        nats = -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
        num_bytes = sum(len(text.encode()) for text in texts)
        assert row["domain"] == name
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=TOLERANCE)
    # The twin: windows that overlap give later tokens more context.
    overlapping = evaluate(capsys, folder, [folder / "hf"], "--stride", "20")["rows"]
    assert overlapping[0]["bits_per_byte"] != pytest.approx(rows[0]["bits_per_byte"], rel=1e-3)


def write_renumbered(source: Path, folder: Path) -> Path:
    """The same model with other ids: the same probability for every text."""
    shutil.copytree(source, folder)
    order = torch.cat([torch.randperm(256, generator=torch.Generator().manual_seed(5)), torch.arange(256, 263)])
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][order] = weights[name].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    definition["model"]["vocab"] = {piece: int(order[number]) for piece, number in vocabulary.items()}
    path.write_text(json.dumps(definition))
    return folder


def test_another_tokenizer_of_the_same_model_leaves_the_figure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renumbered = write_renumbered(folder / "hf", tmp_path / "renumbered")
    # The same model again, whose tokenizer has lost its longer pieces: it reads more tokens, which it knows too.
    without = write_hf_model(tmp_path / "bytes")
    shutil.copyfile(folder / "hf" / "model.safetensors", without / "model.safetensors")
    rows = evaluate(capsys, folder, [folder / "hf", renumbered, without])["rows"]
    ours, other, bytes_only = itertools.batched(rows, 3)
    for one, two, three in zip(ours, other, bytes_only, strict=True):
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=TOLERANCE)
        assert one["perplexity_low"] <= two["perplexity"] <= one["perplexity_high"]
        # The loss is divided by the same number, whatever the tokenizer.
        assert one["reference_tokens"] == two["reference_tokens"] == three["reference_tokens"] == one["tokens"]
    assert bytes_only[1]["tokens"] > ours[1]["tokens"]
    assert bytes_only[1]["perplexity"] == pytest.approx(math.exp(bytes_only[1]["nats"] / ours[1]["tokens"]))
