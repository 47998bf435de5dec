"""tools/evaluate_perplexity.py: a series of checkpoints of one run, a mixed list of models, and what is refused."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers

from megatron_hammer.cli import evaluate
from megatron_hammer.cli.evaluate_perplexity import main
from megatron_hammer.evaluation.scorers.named_models import list_models
from tests.helpers.scored_models import write_hf_model
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import toy_arguments
from tests.helpers.toy_tokenizer import write_jsonl

SEQ_LENGTH = 16
ANIMALS = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/animals.jsonl"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{animals}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}]
"""


def write_letter_tokenizer(folder: Path) -> Path:
    """For the toy checkpoint, which has 53 tokens: the small letters, space, BOS and the unknown token."""
    vocabulary = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary | {"<unk>": 27, "<s>": 28}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, a Hugging Face model, one that computes NaN for one letter, and two domains."""
    folder = tmp_path_factory.mktemp("perplexity_tool")
    write_letter_tokenizer(folder / "letters")
    for iteration in (10, 20):
        arguments = toy_arguments(consumed_train_samples=1000 * iteration, tokenizer_model=str(folder / "letters"))
        tensors = toy_llama_tensors(seed=iteration)
        write_toy_checkpoint(folder / "run", tensors, arguments=arguments, iteration=iteration)
    write_hf_model(folder / "hf")
    write_hf_model(folder / "diverged")
    weights = load_file(folder / "diverged" / "model.safetensors")
    letters = json.loads((folder / "diverged" / "tokenizer.json").read_text())["model"]["vocab"]
    weights["model.embed_tokens.weight"][letters["z"]] = math.nan
    save_file(weights, folder / "diverged" / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(folder / "letters.jsonl", ["the quick brown fox jumps over the dog", "the dog sleeps", "no"])
    write_jsonl(folder / "lazy.jsonl", ["the lazy dog", "a fox"])
    return folder


def test_a_run_becomes_a_table_of_its_checkpoints_with_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = [str(folder / "letters.jsonl"), f"other={folder / 'lazy.jsonl'}"]
    main(["--load", str(folder / "run"), "--iterations", "all", "--domains", *domains, "--save-dir", str(tmp_path)])
    printed = capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "perplexity.csv").open()))
    assert [(row["model"], row["domain"]) for row in rows] == [
        ("run@10", "letters"), ("run@10", "other"), ("run@20", "letters"), ("run@20", "other"),
    ]  # fmt: skip
    assert [int(row["trained_tokens"]) for row in rows[::2]] == [10_000 * SEQ_LENGTH, 20_000 * SEQ_LENGTH]
    # Windows of the 32 positions of the model; its weights differ between the checkpoints.
    assert {row["max_length"] for row in rows} == {"32"}
    assert rows[0]["perplexity"] != rows[2]["perplexity"]
    assert (int(rows[0]["tokens"]), int(rows[0]["documents"])) == (54, 3)
    assert re.search(r"run@20 +320k +1", printed.out)
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    assert "wrote" in printed.err


def test_a_run_becomes_a_table_of_benchmark_scores_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "animals.yaml").write_text(ANIMALS.format(folder=tmp_path))
    (tmp_path / "animals.jsonl").write_text('{"text": "the", "animals": ["fox", "dog"], "right": 0}\n' * 3)
    suite = tmp_path / "suite.toml"
    suite.write_text(f'tasks = ["animals"]\ntasks_dir = "{tmp_path}/tasks"\ndomains.zh = "{folder}/lazy.jsonl"\n')
    flags = ["--load", str(folder / "run"), "--iterations", "all", "--suite", str(suite)]
    evaluate.main([*flags, "--save-dir", str(tmp_path / "report")])
    rows = list(csv.DictReader((tmp_path / "report" / "scores.csv").open()))
    assert [(row["model"], row["tokens"], row["metric"]) for row in rows] == [
        (f"run@{step}", str(1000 * step * SEQ_LENGTH), metric)
        for step in (10, 20)
        for metric in ("acc", "perplexity", "bits_per_byte")
    ]
    printed = capsys.readouterr().out
    assert re.search(r"run@20 +320k +\d+.00 ± 0.00 +\d+", printed)
    assert f"perplexity per token of {folder / 'letters' / 'tokenizer.json'}" in printed
    assert (tmp_path / "report" / "scores.png").stat().st_size > 1000


def test_both_commands_give_models_of_other_tokenizers_one_reference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(f'domains.lazy = "{folder}/lazy.jsonl"\nbos = "bos"\n')
    models_ = [str(folder / "run"), str(folder / "hf"), str(folder / "diverged")]
    evaluate.main([*models_, "--suite", str(suite), "--json"])
    report = json.loads(capsys.readouterr().out)
    found = [score["value"] for model in report["models"] for score in model["scores"]]
    main(["--models", *models_, "--domains", str(folder / "lazy.jsonl"), "--bos", "bos", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert found == [row[name] for row in rows for name in ("perplexity", "bits_per_byte")]
    assert any(
        f"diverged: lazy has no figure and is not in the average: the loss is not a finite number at {folder}" in note
        for note in report["notes"]
    )


def test_a_document_without_a_number_is_named_and_not_averaged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models_ = [str(folder / "hf"), f"bad={folder / 'diverged'}", str(folder / "run")]
    domains = [str(folder / "letters.jsonl"), str(folder / "lazy.jsonl")]
    main(["--models", *models_, "--domains", *domains, "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    by_cell = {(row["model"], row["domain"]): row for row in report["rows"]}
    assert by_cell["bad", "lazy"]["perplexity"] is None
    assert by_cell["bad", "lazy"]["documents_without_number"] == f"{folder / 'lazy.jsonl'}:1"
    assert by_cell["bad", "letters"]["perplexity"] == pytest.approx(by_cell["hf", "letters"]["perplexity"])
    average = next(one for one in report["averages"] if one["model"] == "bad")
    assert average["perplexity"] == pytest.approx(by_cell["bad", "letters"]["perplexity"])
    assert (
        f"bad: lazy has no figure and is not in the average: the loss is not a finite number at {folder}" in printed.err
    )
    # The newest checkpoint of the run, with a tokenizer of its own; one reference for all.
    newest = by_cell["run@20", "letters"]
    assert newest["reference_tokens"] == by_cell["hf", "letters"]["reference_tokens"] == newest["tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "{folder}/none", "--domains", "{folder}/lazy.jsonl"], "none: model must be a checkpoint of"),
        (["--models", "{folder}/letters", "--domains", "{folder}/lazy.jsonl"], "letters: must hold latest_"),
        (["--domains", "{folder}/lazy.jsonl"], "--models or --load must be given, got neither"),
        (["--models", "{folder}/hf", "--domains", "{folder}/no.jsonl"], "no.jsonl"),
        (["--models", "{folder}/hf", "--domains", "a={folder}/lazy.jsonl", "a={folder}/letters.jsonl"], "got a twice"),
        (["--models", "a={folder}/hf", "a={folder}/run", "--domains", "{folder}/lazy.jsonl"], "must differ, got a"),
        (["--load", "{folder}/run", "--iterations", "10,30", "--domains", "{folder}/lazy.jsonl"], "there are 10, 20"),
        (["--models", "{folder}/hf", "--iterations", "all", "--domains", "x"], "--iterations must come with --load"),
        (["--models", "{folder}/run", "--tokenizer-model", "{folder}/hf", "--domains", "{folder}/lazy.jsonl"],
         "ids must be below the 53 tokens"),
        (["--models", "{folder}/run", "--pipeline-model-parallel-size", "2", "--domains", "{folder}/lazy.jsonl"],
         "got 1 x 2 with 1. Start the command with torchrun --nproc-per-node 2"),
        (["--models", "{folder}/hf", "--domains", "{folder}/lazy.jsonl", "--json-keys", "no"], "Pass --json-keys text"),
        (["--models", "{folder}/hf", "--stride", "81", "--domains", "{folder}/lazy.jsonl"], "got stride=81"),
        (["--models", "{folder}/hf", "--stride", "0", "--domains", "{folder}/lazy.jsonl"], "must be at least 1, got 0"),
        (["--models", "{folder}/hf", "--data-tokenizer", "{folder}/hf", "--domains", "{folder}/lazy.jsonl"],
         "data-tokenizer: is for domains that are"),
        (["--models", "{folder}/hf", "--save-dir", "{folder}/lazy.jsonl", "--domains", "{folder}/lazy.jsonl"],
         "--save-dir must be a folder, got the file"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([flag.format(folder=folder) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_what_was_measured_before_a_mistake_is_not_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only its weights show that the second model does not load.
    damaged = shutil.copytree(folder / "hf", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["--models", str(folder / "hf"), str(damaged), "--domains", str(folder / "lazy.jsonl"),
              "--save-dir", str(tmp_path)])  # fmt: skip
    printed = capsys.readouterr()
    assert [row["model"] for row in csv.DictReader((tmp_path / "perplexity.csv").open())] == ["hf"]
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert "bits per byte" in printed.out


def test_every_checkpoint_is_opened_before_the_first_is_computed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "iter_0000030").mkdir()  # empty, as while Megatron saves
    assert [model.iteration for model in list_models([], run, "all")] == [10, 20]
    assert [(model.name, model.iteration) for model in list_models([str(folder / "run")], run, "20, 10,20")] == [
        (str(folder / "run"), None), (f"{run}@20", 20), (f"{run}@10", 10),
    ]  # fmt: skip
    for name in ("iter_0000015", "iter_0000025"):  # half copied
        (run / name).mkdir()
        (run / name / "common.pt").touch()
    with pytest.raises(SystemExit):
        main(["--load", str(run), "--iterations", "all", "--domains", str(folder / "lazy.jsonl")])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(": ")[1] for line in printed.err.splitlines()] == [
        str(run / name / ".metadata") for name in ("iter_0000015", "iter_0000025")
    ]


def test_a_checkpoint_with_infinite_weights_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = toy_llama_tensors()
    tensors["output_layer.weight"][3, 4] = torch.inf
    write_toy_checkpoint(tmp_path / "run", tensors)
    with pytest.raises(SystemExit):
        main(["--models", str(tmp_path / "run"), "--tokenizer-model", str(folder / "letters"), "--domains",
              str(folder / "lazy.jsonl")])  # fmt: skip
    assert "output_layer.weight: must have finite values" in capsys.readouterr().err
