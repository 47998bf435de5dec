"""Preprocessing writes the bytes of Megatron's builder with any number of workers, and leaves no file on an error."""

import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_hammer.data.indexed.manifest import JobShard, Manifest, read_manifest
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.preprocess import PreprocessProgress, preprocess
from megatron_hammer.errors import ConfigError, DataError, PlatformError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.vocabulary.recipes import TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import TextSource
from megatron_hammer.tokenizer.vocabulary.train import train_tokenizer
from tests.helpers.messages import assert_problem, assert_problems
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

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


def test_every_format_gives_the_same_bytes_through_workers(tmp_path: Path, tokenizer_path: Path) -> None:
    texts = [text for text in TEXTS if text] * 3
    rows = [{"n": n, "text": text} for n, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet", row_group_size=50)
    (folder / "e.txt").write_text(texts[0])
    run(tmp_path, tokenizer_path, write_jsonl(tmp_path / "c.jsonl", texts * 4 + texts[:1]), name="lines")
    (prefix,) = run(tmp_path, tokenizer_path, folder, name="formats", num_workers=2, block_bytes=3000)
    expected = read_all(tmp_path / "lines")
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == expected[prefix.name + suffix]


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
    assert_problems(
        manifest.problems,
        (f"{corpus_path}:126:", "line must be one JSON", "got invalid JSON (Expecting value at column 1)"),
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
    assert_problems(
        error_of(tmp_path, tokenizer_path, path, num_workers=num_workers).splitlines(),
        (f"{path}:126: {message}",),
        ("max-errors:", "at most 0 bad records", "got at least 1 (1 shown)", "raise --max-errors"),
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
    assert_problem(
        error_of(tmp_path, tokenizer_path, path, append_eod=True),
        f"{path}:",
        'field "text" must hold',
        "got none in 2 documents",
        "--input",
        "--json-keys",
    )
    assert read_all(tmp_path / "out") == {}


def test_a_source_that_grows_meanwhile_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", TEXTS)

    def grow(progress: PreprocessProgress) -> None:
        with path.open("ab") as file:
            file.write(b'{"text": "late"}\n')

    options = PreprocessOptions(
        inputs=(str(path),), tokenizer_path=tokenizer_path, output_prefix=tmp_path / "out" / "c"
    )
    with pytest.raises(DataError, match=r"c.jsonl: file must not change.*got \d+ bytes at the start and"):
        preprocess(options, grow)
    assert read_all(tmp_path / "out") == {}


def test_a_source_that_vanishes_meanwhile_is_refused(tmp_path: Path, tokenizer_path: Path, corpus_path: Path) -> None:
    options = make_options(tmp_path, tokenizer_path, corpus_path)
    message = r"c.jsonl: file must stay while it is read, got none at the end. Put it back."
    with pytest.raises(DataError, match=message):
        preprocess(options, lambda progress: corpus_path.unlink(missing_ok=True))
    assert read_all(tmp_path / "out") == {}


def test_a_killed_worker_ends_the_run_with_an_error(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", TEXTS * 400)
    killed: list[int] = []

    def kill_one(progress: PreprocessProgress) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    # many more blocks than are ever under way: the dead worker is asked for another, however late it is killed
    options = make_options(tmp_path, tokenizer_path, path, num_workers=2, journal_interval_s=60.0)
    message = rf"workers: every worker must live to the end, got one that died near {re.escape(str(path))}:\d+. It was"
    with pytest.raises(PlatformError, match=message):
        preprocess(options, kill_one)
    assert killed
    assert read_all(tmp_path / "out") == {}
    assert not multiprocessing.active_children()


# --- stopped and continued -------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for what may end a run between two blocks."""


def make_options(folder: Path, tokenizer_path: Path, path: Path, name: str = "out", **more) -> PreprocessOptions:
    """Journal after every small block."""
    return PreprocessOptions(
        inputs=(str(path),),
        tokenizer_path=tokenizer_path,
        output_prefix=folder / name / "c",
        **{"journal_interval_s": 0.0, "block_bytes": 500, **more},
    )


def stop_at(options: PreprocessOptions, num_documents: int) -> None:
    def stop(progress: PreprocessProgress) -> None:
        if progress.num_documents >= num_documents:
            raise Stop

    with pytest.raises(Stop):
        preprocess(options, stop)


@pytest.fixture
def corpus_path(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "c.jsonl", TEXTS)


def test_a_stopped_run_continues_and_reports_it(tmp_path: Path, tokenizer_path: Path, corpus_path: Path) -> None:
    options = make_options(tmp_path, tokenizer_path, corpus_path)
    stop_at(options, 30)
    notes: list[str] = []
    result = preprocess(dataclasses.replace(options, num_workers=2, max_errors=3), on_note=notes.append)
    assert result.was_continued
    assert re.fullmatch(rf"{options.journal_path}: going on with an unfinished run, \d+ documents encoded.", notes[0])
    preprocess(make_options(tmp_path, tokenizer_path, corpus_path, "whole"))
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")


def test_the_final_names_appear_only_when_the_run_is_complete(
    tmp_path: Path, tokenizer_path: Path, corpus_path: Path
) -> None:
    stop_at(make_options(tmp_path, tokenizer_path, corpus_path), 30)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "c.journal.json",
        *(f"c_text_document.{part}.partial" for part in ("bin", "documents", "lengths")),
    ]


def test_a_changed_input_flag_or_tokenizer_is_refused(tmp_path: Path, tokenizer_path: Path, corpus_path: Path) -> None:
    options = make_options(tmp_path, tokenizer_path, corpus_path)
    stop_at(options, 30)
    size_bytes = corpus_path.stat().st_size
    with corpus_path.open("a") as file:
        file.write('{"text": "late"}\n')
    other_path = train_tokenizer(
        [TextSource(inputs=(corpus_path,))], tmp_path / "other.model", TokenizerRecipe(vocab_size=350)
    ).path
    with pytest.raises(DataError) as caught:
        preprocess(dataclasses.replace(options, append_eod=True, tokenizer_path=other_path))
    old, new = load_encoder(tokenizer_path).sha256, load_encoder(other_path).sha256
    assert_problems(
        caught.value.problems,
        (
            f"{corpus_path}:",
            "input must be as when the run",
            f"got {size_bytes + 17} bytes where there were {size_bytes}",
        ),
        ("tokenizer-model:", "must be as when", f"got {new} where it was {old}"),
        ("append-eod:", "must be as when", "got on where it was off"),
        (f"{options.journal_path}:", "an unfinished run can only be continued", "--restart"),
    )
    result = preprocess(dataclasses.replace(options, append_eod=True, restart=True))
    assert not result.was_continued
    assert next(iter(result.manifests.values())).num_documents == len(TEXTS) + 1


def test_a_journal_without_its_files_is_refused(tmp_path: Path, tokenizer_path: Path, corpus_path: Path) -> None:
    options = make_options(tmp_path, tokenizer_path, corpus_path)
    stop_at(options, 30)
    (tmp_path / "out" / "c_text_document.bin.partial").write_bytes(b"")
    with pytest.raises(DataError, match=r"c_text_document.bin.partial: file must hold the first \d+ bytes of the run"):
        preprocess(options)
    assert options.journal_path.exists()
    preprocess(dataclasses.replace(options, restart=True))


def test_bad_records_beyond_the_limit_keep_the_finished_blocks(
    tmp_path: Path, tokenizer_path: Path, corpus_path: Path
) -> None:
    corpus_path.write_bytes(corpus_path.read_bytes() + b"bad\n")
    options = make_options(tmp_path, tokenizer_path, corpus_path)
    with pytest.raises(DataError) as caught:
        preprocess(options)
    assert_problem(caught.value.problems[-1], f"{options.journal_path}:", "what was done is kept")
    result = preprocess(dataclasses.replace(options, max_errors=1))
    assert result.was_continued
    assert next(iter(result.manifests.values())).num_dropped_documents == 1


def test_a_complete_run_is_not_repeated(tmp_path: Path, tokenizer_path: Path, corpus_path: Path) -> None:
    options = make_options(tmp_path, tokenizer_path, corpus_path)
    first = preprocess(options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = preprocess(dataclasses.replace(options, num_workers=2))
    assert again.was_complete
    assert again.manifests == first.manifests
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert not preprocess(dataclasses.replace(options, restart=True)).was_complete
    assert not preprocess(dataclasses.replace(options, append_eod=True)).was_complete
    (tmp_path / "out" / "c_text_document.bin").write_bytes(b"\0\0")
    assert not preprocess(options).was_complete
    write_jsonl(corpus_path, ["X" + text[1:] if text else text for text in TEXTS])
    assert not preprocess(options).was_complete


def test_outputs_inside_the_input_folder_are_no_inputs(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "notes.md").touch()
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    preprocess(make_options(tmp_path, tokenizer_path, Path("in"), "whole", seed=3))
    options = make_options(Path("link"), tokenizer_path, Path("in"), "../in/.", seed=3)
    stop_at(options, 30)
    # The same job from another folder and with another spelling of everything.
    monkeypatch.chdir(folder)
    result = preprocess(make_options(tmp_path, tokenizer_path, Path("."), "in", seed=3))
    assert result.was_continued
    monkeypatch.chdir(tmp_path)
    preprocess(dataclasses.replace(options, restart=True))
    whole = read_all(tmp_path / "whole")
    assert json.loads(whole["c_text_document.manifest.json"])["ignored_files"] == ["in/notes.md"]
    assert read_all(folder).items() >= whole.items()
    assert preprocess(options).was_complete
    # As a shell expands in/*.json*, the journal of the stopped run and the manifest are named too.
    written = tuple(map(str, Path("in").glob("*.json*")))
    assert len(written) == 2
    assert preprocess(dataclasses.replace(options, inputs=written)).manifests == {
        prefix: dataclasses.replace(manifest, ignored_files=())
        for prefix, manifest in preprocess(options).manifests.items()
    }


def test_shards_beside_each_other_in_the_input_folder_are_no_inputs(tmp_path: Path, tokenizer_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    jobs = [make_options(tmp_path, tokenizer_path, tmp_path, ".", shard=JobShard(index, 2)) for index in range(2)]
    stop_at(jobs[0], 10)
    manifests = [manifest for options in reversed(jobs) for manifest in preprocess(options).manifests.values()]
    assert [source.path for manifest in manifests for source in manifest.sources] == [str(tmp_path / "a.jsonl")] * 2
    assert all(manifest.ignored_files == () for manifest in manifests)


# --- shuffled and shared ---------------------------------------------------------------------------------------------


def read_documents_of(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(str(prefix))  # named: its arrays die with it
    return [ids.tobytes() for ids in dataset[:]]


def test_shuffling_permutes_all_keys_alike(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{"a": f"the fox {n}", "b": f"the dog {n} sleeps"} for n in range(500)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    orders = {}
    for name, more in {"7": {"seed": 7}, "7 again": {"seed": 7, "num_workers": 2}, "8": {"seed": 8}}.items():
        manifests = run(tmp_path, tokenizer_path, path, name=name, json_keys=("a", "b"), **more)
        encoder = load_encoder(tokenizer_path)
        texts = [[encoder.decode(np.frombuffer(ids, np.uint16)) for ids in read_documents_of(p)] for p in manifests]
        numbers = [[int(re.findall(r"\d+", text)[0]) for text in column] for column in texts]
        assert numbers[0] == numbers[1]
        assert sorted(numbers[0]) == list(range(500))
        orders[name] = numbers[0]
        assert next(iter(manifests.values())).options["seed"] == more["seed"]
    assert orders["7"] == orders["7 again"] != orders["8"]
    assert orders["7"] != list(range(500))
    assert read_all(tmp_path / "7") == read_all(tmp_path / "7 again")


def test_shards_in_order_are_the_whole(tmp_path: Path, tokenizer_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {text}" for text in TEXTS if text]) for n in range(3)]
    with paths[1].open("a") as file:
        file.write("bad\n")
    (whole_prefix,) = whole = run(tmp_path, tokenizer_path, *paths, max_errors=1, append_eod=True)
    parts = {}
    for index in range(4):
        parts |= run(
            tmp_path, tokenizer_path, *paths, name="parts", max_errors=1, append_eod=True, shard=JobShard(index, 4)
        )
    assert [prefix.name for prefix in parts] == [f"corpus-0000{n}-of-00004_text_document" for n in range(4)]
    assert [text for prefix in parts for text in read_documents_of(prefix)] == read_documents_of(whole_prefix)
    (manifest,) = whole.values()
    assert sum(part.num_documents for part in parts.values()) == manifest.num_documents
    assert [problem for part in parts.values() for problem in part.problems] == list(manifest.problems)
    assert {source for part in parts.values() for source in part.sources} == set(manifest.sources)
    assert [part.shard for part in parts.values()] == [JobShard(index, 4) for index in range(4)]


def test_a_shard_without_documents_is_empty_and_whole(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["the fox " * 100, "b"])
    ((prefix, manifest),) = run(tmp_path, tokenizer_path, path, shard=JobShard(1, 3)).items()
    assert manifest.num_documents == read_index(prefix).num_documents == 0


def test_a_shard_cannot_be_shuffled(tmp_path: Path, tokenizer_path: Path) -> None:
    message = (
        r"^shuffle: a shard cannot be shuffled alone, got shard=1/3. Shuffle when merging: merge_data.py --shuffle --"
        r"seed.$"
    )
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, tokenizer_path, shard=JobShard(1, 3), seed=1)
    with pytest.raises(ConfigError, match=r"^seed: must be at least 0, got seed=-1. Pass another.$"):
        run(tmp_path, tokenizer_path, seed=-1)
    with pytest.raises(ConfigError, match=r"^keep-newlines: must come with --split-sentences, got it alone"):
        run(tmp_path, tokenizer_path, keep_newlines=True)
