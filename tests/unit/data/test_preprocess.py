"""Preprocessing gives what Megatron's builder would, whatever the workers do, and leaves nothing behind on an error."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from data_paths import SHARED_DATA, needs_shared_data
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

from megatron_hammer.data.manifest import Manifest, read_manifest
from megatron_hammer.data.preprocess import Progress, preprocess
from megatron_hammer.data.preprocess_options import PreprocessOptions
from megatron_hammer.data.readers import read_documents
from megatron_hammer.errors import DataError, PlatformError
from megatron_hammer.tokenizer.encoder import load_encoder

TEXTS = [*TOY_TEXTS, "", "a\x00b literal </s> 😀", *(f"{text} {n}" for n in range(40) for text in TOY_TEXTS)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(
    folder: Path, tokenizer_path: Path, *inputs: Path, name: str = "out", json_keys: tuple[str, ...] = ("text",), **more
) -> dict[Path, Manifest]:
    options = PreprocessOptions(
        inputs=tuple(map(str, inputs)),
        tokenizer_path=tokenizer_path,
        output_prefix=folder / name / "corpus",
        json_keys=json_keys,
        **more,
    )
    return preprocess(options).manifests


def error_of(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        run(*arguments, **options)
    return str(caught.value)


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_with_megatron(prefix: Path, tokenizer_path: Path, texts: list[str], append_eod: bool) -> None:
    """What Megatron-LM's preprocess_data.py does with these documents: no item for an empty one, and no lone eod."""
    encoder = load_encoder(tokenizer_path)
    prefix.parent.mkdir(parents=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(encoder.vocab_size))
    for text in texts:
        ids = encoder.encode(text).tolist()
        if ids and append_eod:
            ids.append(encoder.eod_id)
        builder.add_document(torch.tensor(ids), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_equal_megatrons(tmp_path: Path, tokenizer_path: Path, append_eod: bool) -> None:
    corpus_path = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    (prefix,) = run(tmp_path, tokenizer_path, corpus_path, append_eod=append_eod)
    assert prefix == tmp_path / "out" / "corpus_text_document"
    write_with_megatron(tmp_path / "theirs" / prefix.name, tokenizer_path, TEXTS, append_eod)
    theirs = read_all(tmp_path / "theirs")
    assert theirs == {name: content for name, content in read_all(tmp_path / "out").items() if name in theirs}


def test_megatron_reads_the_encoders_ids(tmp_path: Path, tokenizer_path: Path) -> None:
    corpus_path = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    (prefix,) = run(tmp_path, tokenizer_path, corpus_path, append_eod=True)
    dataset = IndexedDataset(str(prefix))
    encoder = load_encoder(tokenizer_path)
    expected = [[*encoder.encode(text), 2] for text in TEXTS if text]
    assert [ids.tolist() for ids in dataset[:]] == expected
    assert dataset[0].dtype == np.uint16


def test_three_workers_give_the_bytes_of_one(tmp_path: Path, tokenizer_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", TEXTS * 25) for n in range(3)]  # enough for many batches
    for num_workers in (1, 3):
        run(tmp_path, tokenizer_path, *paths, name=str(num_workers), num_workers=num_workers, append_eod=True)
    assert read_all(tmp_path / "1") == read_all(tmp_path / "3")


def test_manifest_counts_everything(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "in").mkdir()
    corpus_path = write_jsonl(tmp_path / "in" / "c.jsonl", TEXTS)
    (tmp_path / "in" / "notes.md").touch()
    corpus_path.write_bytes(corpus_path.read_bytes() + b"broken\n")
    manifests = run(tmp_path, tokenizer_path, tmp_path / "in", append_eod=True, max_errors=1)
    ((prefix, manifest),) = manifests.items()
    assert read_manifest(prefix) == manifest
    assert manifest.num_documents == len(TEXTS)
    assert manifest.num_tokens == len(np.fromfile(f"{prefix}.bin", dtype=manifest.dtype))
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.num_empty_documents == 1
    assert manifest.problems == (
        f"{corpus_path}:126: line must be one JSON object, got invalid JSON (Expecting value at column 1). "
        "Repair it, or write one JSON object a line.",
    )
    assert [source.path for source in manifest.sources] == [str(corpus_path)]
    assert manifest.ignored_files == (str(tmp_path / "in" / "notes.md"),)
    assert manifest.tokenizer.sha256 == load_encoder(tokenizer_path).sha256
    assert manifest.options == {
        "json_key": "text",
        "append_eod": True,
        "prepend_bos": False,
        "split_sentences": False,
        "lang": None,
        "keep_newlines": False,
        "sentence_model_sha256": None,
        "shuffle": False,
        "seed": None,
    }
    assert manifest.num_sequences == len(TEXTS) - 1
    assert manifest.bin_sha256 == hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    assert manifest.idx_sha256 == hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()


def test_every_key_gets_its_own_pair(tmp_path: Path, tokenizer_path: Path) -> None:
    lines = [{"title": "the fox", "body": "the dog"}, {"title": "only a title"}, {"title": "", "body": "the fox"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifests = run(tmp_path, tokenizer_path, tmp_path / "c.jsonl", json_keys=("title", "body"), max_errors=1)
    assert [prefix.name for prefix in manifests] == ["corpus_title_document", "corpus_body_document"]
    encoder = load_encoder(tokenizer_path)
    for prefix, texts in zip(manifests, (["the fox"], ["the dog", "the fox"]), strict=True):
        dataset = IndexedDataset(str(prefix))  # named: its arrays die with it
        assert [encoder.decode(ids) for ids in dataset[:]] == texts
    assert [manifest.num_documents for manifest in manifests.values()] == [2, 2]


BAD_LINES = {
    "malformed": (
        b'{"text": "a"',
        "line must be one JSON object, got invalid JSON (Expecting ',' delimiter at column 13). "
        "Repair it, or write one JSON object a line.",
    ),
    "missing key": (b'{"content": "a"}', 'field "text" is missing, got keys [content]. Pass --json-keys content.'),
    "blank": (b"", "line must be one JSON object, got a blank line. Repair or remove it."),
    "encoding": (b'{"text": "\xe9"}', "text must be UTF-8, got byte 0xe9 at offset 10. Convert the file with iconv."),
}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_stops_and_leaves_nothing(
    tmp_path: Path, tokenizer_path: Path, line: bytes, message: str, num_workers: int
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + line + b"\n" + b'{"text": "after"}\n')
    assert error_of(tmp_path, tokenizer_path, path, num_workers=num_workers) == (
        f"{path}:126: {message}\n"
        "max-errors: at most 0 bad records are allowed, got at least 1 (1 shown). "
        "Repair them, or raise --max-errors to skip such records and list them in the manifest."
    )
    assert read_all(tmp_path / "out") == {}


def test_bad_lines_within_the_limit_are_skipped_and_those_beyond_it_are_not(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "the fox"}\n' + b"bad\n" * 3 + b'{"text": "the dog"}\n')
    ((prefix, manifest),) = run(tmp_path, tokenizer_path, path, max_errors=3).items()
    assert (manifest.num_documents, manifest.num_dropped_documents) == (2, 3)
    assert len(IndexedDataset(str(prefix))) == 2
    before = read_all(tmp_path / "out")
    assert "at most 2 bad records are allowed, got at least 3 (3 shown)" in (
        error_of(tmp_path, tokenizer_path, path, max_errors=2)
    )
    assert read_all(tmp_path / "out") == before  # an earlier result stays whole


def test_many_problems_are_cut_short(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"bad\n" * 500)
    lines = error_of(tmp_path, tokenizer_path, tmp_path / "c.jsonl", max_errors=7).split("\n")
    assert len(lines) == 21
    assert "got at least 500 (20 shown)" in lines[-1]


def test_inputs_without_text_are_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["", ""])
    assert error_of(tmp_path, tokenizer_path, path, append_eod=True) == (
        f'{path}: field "text" must hold text in some document, got none in 2 documents. Check --input and --json-keys.'
    )
    assert read_all(tmp_path / "out") == {}


def test_a_source_that_grows_meanwhile_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", TEXTS)

    def grow(progress: Progress) -> None:
        with path.open("ab") as file:
            file.write(b'{"text": "late"}\n')

    options = PreprocessOptions(
        inputs=(str(path),), tokenizer_path=tokenizer_path, output_prefix=tmp_path / "out" / "c"
    )
    with pytest.raises(
        DataError, match=r"c.jsonl: file must not change while it is read, got \d+ bytes at the start and"
    ):
        preprocess(options, grow)
    assert read_all(tmp_path / "out") == {}


def test_a_killed_worker_is_an_error_and_not_a_wait(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", TEXTS * 400)
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    options = PreprocessOptions(
        inputs=(str(path),), tokenizer_path=tokenizer_path, output_prefix=tmp_path / "out" / "c", num_workers=2
    )
    message = rf"workers: every worker must live to the end, got one that died near {re.escape(str(path))}:\d+. It was"
    with pytest.raises(PlatformError, match=message):
        preprocess(options, kill_one)
    assert killed
    assert read_all(tmp_path / "out") == {}
    assert not multiprocessing.active_children()


@needs_shared_data
def test_real_corpus_equals_megatrons_bytes(tmp_path: Path) -> None:
    tokenizer_path = SHARED_DATA / "tokenizer" / "hammerllm.model"
    documents = read_documents([SHARED_DATA / "corpus" / "zh.jsonl"])
    texts = [document.text for _, document in zip(range(300), documents, strict=False)]
    (prefix,) = run(tmp_path, tokenizer_path, write_jsonl(tmp_path / "c.jsonl", texts), append_eod=True, num_workers=2)
    write_with_megatron(tmp_path / "theirs" / prefix.name, tokenizer_path, texts, append_eod=True)
    theirs = read_all(tmp_path / "theirs")
    assert theirs == {name: content for name, content in read_all(tmp_path / "out").items() if name in theirs}
