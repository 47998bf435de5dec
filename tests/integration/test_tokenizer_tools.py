"""The tokenizer tools as a user runs them: a vocabulary is trained from weighted sources, and extends another."""

import json
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.tool_runs import Finished, run_tool
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

pytestmark = pytest.mark.integration


def run(tool: str, *arguments: str | Path, cwd: Path) -> Finished:
    return run_tool(Path("tools", tool), *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    write_jsonl(folder / "en.jsonl", TOY_TEXTS[:2] * 60)
    write_jsonl(folder / "zh.jsonl", TOY_TEXTS[2:] * 60)
    (folder / "chars.txt").write_text("龘\n靐\n春\n", encoding="utf-8")
    (folder / "symbols.txt").write_text("<SEP>\nCLS>\n", encoding="utf-8")
    train_toy_tokenizer(folder)
    return folder


def test_weighted_sources_give_a_tokenizer_and_a_report(folder: Path) -> None:
    arguments = ("--input", "1", "en.jsonl", "3", "zh.jsonl", "--output", "t.model", "--vocab-size", "337")
    code, stdout, stderr = run("tokenizer_train.py", *arguments, "--max-bytes", "4000", cwd=folder)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0].startswith("en.jsonl: weight 1, 0.00 of 0.01 MB, ")
    assert lines[-1].startswith("t.model: 337 pieces from ")
    first_bytes = (folder / "t.model").read_bytes()
    files = ("--required-chars-file", "chars.txt", "--user-defined-symbols-file", "symbols.txt")
    code, stdout, stderr = run(
        "tokenizer_train.py", *arguments, "--max-bytes", "900000", *files, "--num-threads", "3", "--json", cwd=folder
    )
    assert code == 0
    warnings = stderr.splitlines()
    assert warnings[0].startswith("warning: user-defined symbol looks misspelt, got 'CLS>'")
    assert warnings[1].startswith(
        "warning: en.jsonl: source is smaller than its share, got 0.01 of 0.23 MB, and is used"
    )
    report = json.loads(stdout)
    assert report["recipe"]["required_chars"] == "龘靐春"
    assert [source["is_used_whole"] for source in report["sources"]] == [True, True]
    assert (folder / "t.model").read_bytes() != first_bytes


def test_characters_of_another_tokenizer_extend_this_one(folder: Path) -> None:
    code, _, stderr = run(
        *("tokenizer_train.py", "--input", "zh.jsonl", "--output", "zh.model", "--vocab-size", "311"),
        *("--required-chars-file", "chars.txt", "--user-defined-symbols-file", "symbols.txt"),
        cwd=folder,
    )
    assert code == 0, stderr
    code, stdout, stderr = run(
        *("tokenizer_merge.py", "--base", "toy.model", "--other", "zh.model", "--output", "new/m.model"), cwd=folder
    )
    assert (code, len(stderr.splitlines())) == (0, 1), stderr
    assert stdout.splitlines()[-1] == (
        "new/m.model: 347 pieces of toy.model + 4 added (2 characters, 2 symbols) = 351 pieces"
    )
    encoder = load_encoder(folder / "new" / "m.model")
    assert encoder.encode("龘<SEP>").tolist() == [347, 349]
    code, stdout, _ = run(
        *("tokenizer_merge.py", "--base", "toy.model", "--other", "zh.model", "--output", "v.model"),
        *("--mode", "vocabulary", "--json"),
        cwd=folder,
    )
    report = json.loads(stdout)
    assert code == 0
    assert report["num_pieces"] == 347 + len(report["added_pieces"]) == load_encoder(folder / "v.model").vocab_size
    assert "龘" in report["added_pieces"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--base", "toy.model", "--other", "none.model"),
            "none.model: file cannot be read (No such file or dire",
        ),
        (("--base", "toy.model", "--other", "en.jsonl"), "en.jsonl: file must be a SentencePiece model, got something"),
        (("--base", "toy.model", "--other", "toy.model"), "toy.model: model must say which characters it was trained"),
        (
            ("--base", "toy.model", "--other", "toy.model", "--mode", "vocabulary"),
            "merge: the other model must have something that the base lacks, got nothing. Keep the base.",
        ),
        (
            ("--base", "toy.model", "--other", "o.model", "--mode", "vocabulary", "--required-chars-file", "chars.txt"),
            "required-chars-file: must be left out of --mode vocabulary, which adds every piece, got chars.txt.",
        ),
        (
            ("--base", "toy.model", "--other", "o.model", "--scores", "zero"),
            "scores: must be calibrated in --mode characters, got scores=zero.",
        ),
        (
            ("--base", "m.model", "--other", "o.model"),
            "output: must not be one of the models that are merged, got m.model. Choose another name.",
        ),
    ],
)
def test_models_that_cannot_be_merged_exit_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = run("tokenizer_merge.py", *arguments, "--output", "m.model", cwd=folder)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {message}")
    assert "Traceback" not in stderr
    assert not (folder / "m.model").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--input", "en.jsonl", "2", "zh.jsonl"), "input: either every source has a weight or none, got en.jsonl"),
        (("--input", "en.jsonl", "--vocab-size", "0"), "vocab-size: must be positive, got vocab_size=0. Change it."),
        (("--input", "en.jsonl", "--max-bytes", "0"), "max-bytes: must be positive, got max_bytes=0. Change it."),
        (("--input", "en.jsonl", "--num-threads", "0"), "num-threads: must be from 1 to 1024, got num_threads=0."),
        (
            ("--input", "en.jsonl", "--character-coverage", "99"),
            "character-coverage: must be from 0.98 to 1, got character_coverage=99.0. Change it.",
        ),
    ],
)
def test_training_with_impossible_options_exits_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, stderr = run("tokenizer_train.py", *arguments, "--output", "none.model", cwd=folder)
    assert code == 2
    assert stderr.startswith(f"error: {message}")
    assert not (folder / "none.model").exists()


def test_a_corpus_is_not_replaced_by_the_model_that_is_trained_on_it(folder: Path) -> None:
    before = (folder / "en.jsonl").read_bytes()
    code, _, stderr = run("tokenizer_train.py", "--input", "en.jsonl", "--output", "en.jsonl", cwd=folder)
    assert (code, (folder / "en.jsonl").read_bytes()) == (2, before)
    assert stderr.startswith("error: en.jsonl: file must be an earlier result of this command to be replaced")


@needs_shared_data
def test_hammerllms_tokenizer_is_merged_from_the_command_line(tmp_path: Path) -> None:
    data = SHARED_DATA / "tokenizer"
    code, stdout, stderr = run(
        *("tokenizer_merge.py", "--base", data / "internlm-7b.model", "--other", data / "hammerllm-trained-128k.model"),
        *("--required-chars-file", data / "charsets_char.json", "--output", "merged.model"),
        *("--user-defined-symbols-file", data / "user_defined_symbol_file.txt"),
        cwd=tmp_path,
    )
    assert code == 0
    assert "score ratio: 0.9388603563642" in stdout
    assert stdout.splitlines()[-1].endswith("+ 2,621 added (2,536 characters, 85 symbols) = 105,789 pieces")
    assert [line.split(" got ")[1].split(" (")[0] for line in stderr.splitlines()[:2]] == ["'CLS>'", "'</p >'"]
