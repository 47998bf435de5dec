"""The data recipes as a user runs them: from raw text to a tokenizer, and from raw text to a training blend."""

import json
from pathlib import Path

import orjson
import pytest
import transformers

from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.tool_runs import run_example

pytestmark = pytest.mark.integration

VERSES = (
    "床前明月光，疑是地上霜。",
    "举头望明月，低头思故乡。",
    "春眠不觉晓，处处闻啼鸟。",
    "夜来风雨声，花落知多少。",
)
SENTENCES = ("def total(values):\n    return sum(values)\n", "A document of plain words. ", "0 1 2 3 4 5 6 7 8 9\n")


def run_well(name: str, *flags: str, **variables: str) -> str:
    result = run_example(name, *flags, **variables)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result.stdout


def write_corpus(path: Path, texts: tuple[str, ...], num_documents: int) -> Path:
    documents = ["".join(texts[(start + step * start) % len(texts)] for step in range(40)) for start in range(4)]
    lines = [orjson.dumps({"text": f"{number}. {documents[number % 4]}{number}"}) for number in range(num_documents)]
    path.write_bytes(b"\n".join([*lines, lines[0]]) + b"\n")  # the last repeats the first
    return path


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder / "zh.jsonl", VERSES, 40)
    write_corpus(folder / "en.jsonl", SENTENCES, 60)
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base model, extended with what a larger one has, by the example itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pattern = str(corpus_dir / "*.jsonl")
    run_well("build_tokenizer.sh", INPUT=pattern, OUTPUT_DIR=str(folder / "base"), VOCAB_SIZE="330")
    run_well(
        "build_tokenizer.sh",
        INPUT=pattern,
        OUTPUT_DIR=str(folder / "extended"),
        VOCAB_SIZE="360",
        BASE_MODEL=str(folder / "base" / "trained.model"),
    )
    return folder


def test_a_tokenizer_is_trained_extended_compared_and_exported(tokenizer_dir: Path, corpus_dir: Path) -> None:
    output_dir = tokenizer_dir / "extended"
    base = load_encoder(tokenizer_dir / "base" / "trained.model")
    merged = load_encoder(output_dir / "merged.model")
    assert base.vocab_size == 330
    assert merged.vocab_size > base.vocab_size
    rows = (output_dir / "comparison.csv").read_text(encoding="utf-8").splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"merged", "trained", "base"}
    assert (output_dir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    exported = transformers.AutoTokenizer.from_pretrained(output_dir / "hf")
    for document in read_documents([corpus_dir]):
        ids = exported(document.text, add_special_tokens=False)["input_ids"]
        assert ids == merged.encode(document.text).tolist()


def test_a_corpus_becomes_a_blend_that_training_takes(tokenizer_dir: Path, corpus_dir: Path, tmp_path: Path) -> None:
    model = str(tokenizer_dir / "extended" / "merged.model")
    knobs = {
        "SOURCES": f"zh={corpus_dir}/zh.jsonl en={corpus_dir}/en*.jsonl",
        "TOKENIZER_MODEL": model,
        "OUTPUT_DIR": str(tmp_path),
        "NEAR_DUPLICATES": "0",
        "TRAIN_TOKENS": "5000",
        "SEQ_LENGTH": "64",
        "WORKERS": "1",
    }
    first = run_well("prepare_corpus.sh", **knobs)
    assert "41 documents in, 40 kept, 1 exact" in first
    assert read_index(tmp_path / "zh_text_document").num_documents == 40
    assert read_index(tmp_path / "en_text_document").num_documents == 60
    removed = [json.loads(line) for line in (tmp_path / "en.duplicates.jsonl").read_text().splitlines()]
    assert [(row["removed"], row["duplicate_of"]) for row in removed] == [
        (f"{corpus_dir}/en.jsonl:61", f"{corpus_dir}/en.jsonl:1")
    ]
    blend = (tmp_path / "blend.txt").read_text().split()
    assert blend[1::2] == [str(tmp_path / "zh_text_document"), str(tmp_path / "en_text_document")]
    tokens = [read_index(prefix).num_tokens for prefix in blend[1::2]]
    assert float(blend[0]) / float(blend[2]) == pytest.approx(
        tokens[0] / tokens[1], rel=0.05
    )  # by size, whole documents

    before = (tmp_path / "zh_text_document.bin").stat()
    again = run_well("prepare_corpus.sh", **knobs)
    assert again.count("already complete, nothing was written") == 2
    assert (tmp_path / "zh_text_document.bin").stat().st_mtime_ns == before.st_mtime_ns


def test_a_source_without_a_name_is_refused(tmp_path: Path) -> None:
    result = run_example("prepare_corpus.sh", SOURCES="corpus.jsonl", TOKENIZER_MODEL="x", OUTPUT_DIR=tmp_path)
    assert result.returncode == 2
    assert "SOURCES: must be NAME=PATH, the name of letters, digits and .-_, got corpus.jsonl." in result.stderr
