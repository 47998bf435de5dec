"""Records are the same from every kind of file, each under its place; one that is broken is told when it is read."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_hammer.data.conversations.formats import ConversationError
from megatron_hammer.data.conversations.records import iterate_records

RECORDS = [{"question": "one", "answer": "1"}, {"question": "two", "answer": "2"}]


def write(path: Path) -> None:
    lines = "".join(f"{json.dumps(record)}\n" for record in RECORDS)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(RECORDS) if path.suffix == ".json" else lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_all_fields(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    found = [(place, dict(read())) for place, read in iterate_records([str(tmp_path / name)])]
    assert found == [(f"{tmp_path / name}:{line}", record) for line, record in enumerate(RECORDS, 1)]


def test_a_broken_record_does_not_end_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": \n{json.dumps(RECORDS[0])}\n')
    (_, broken), (place, read) = iterate_records([str(path)])
    with pytest.raises(ConversationError) as caught:
        broken()
    assert caught.value.reason == "bad-record"
    assert (place, dict(read())) == (f"{path}:2", RECORDS[0])
