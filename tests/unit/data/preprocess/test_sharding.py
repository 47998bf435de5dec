"""The shards of a job read every document once, in order."""

import gzip
from pathlib import Path

import pytest

from megatron_hammer.corpus.blocks import decode_block, read_blocks
from megatron_hammer.data.indexed.manifest import JobShard
from megatron_hammer.data.preprocess.sharding import parse_shard, select_shard_prefix, select_slices
from megatron_hammer.errors import ConfigError
from tests.helpers.toy_tokenizer import write_jsonl


def write_inputs(folder: Path) -> tuple[list[Path], list[str]]:
    texts = [f"document {number} " + "x" * (number * 37 % 200) for number in range(120)]
    write_jsonl(folder / "a.jsonl", texts[:40])
    (folder / "b.jsonl").touch()
    write_jsonl(folder / "c", texts[40:60])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "c").read_bytes()))
    (folder / "d.txt").write_text(texts[60])
    write_jsonl(folder / "e.jsonl", texts[61:])
    (folder / "f.jsonl").touch()
    return [path for path in sorted(folder.iterdir()) if path.suffix], texts


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 400])
def test_shards_share_the_input(tmp_path: Path, count: int) -> None:
    files, texts = write_inputs(tmp_path)
    shards = [select_slices(files, JobShard(index, count)) for index in range(count)]
    found = [
        text
        for slices in shards
        for block in read_blocks(slices, ["text"])
        for text in decode_block(block, ["text"]).columns[0]
    ]
    assert found == texts
    named = [part.path for slices in shards for part in slices]
    assert [path for path, before in zip(named, [None, *named], strict=False) if path != before] == files
    assert sum(part.size_bytes for slices in shards for part in slices) == sum(path.stat().st_size for path in files)


def test_one_shard_is_the_whole(tmp_path: Path) -> None:
    files, _ = write_inputs(tmp_path)
    assert select_slices(files, JobShard(0, 1)) == select_slices(files, None)


def test_empty_files_have_one_owner(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert [len(select_slices([tmp_path / "a.jsonl"], JobShard(index, 3))) for index in range(3)] == [0, 0, 1]


def test_names() -> None:
    assert parse_shard("3/16") == JobShard(3, 16)
    assert select_shard_prefix(Path("out/c"), JobShard(3, 16)) == Path("out/c-00003-of-00016")
    assert select_shard_prefix(Path("out/c"), None) == Path("out/c")


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "0/0", "1/2/3"])
def test_text_that_is_not_a_shard_is_refused(text: str) -> None:
    message = rf"^shard: must be I/N with I from 0 to N - 1, got {text}. Pass 0/4, 1/4, 2/4 and 3/4 to four runs.$"
    with pytest.raises(ConfigError, match=message):
        parse_shard(text)
