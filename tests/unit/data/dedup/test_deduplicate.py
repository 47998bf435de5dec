"""Duplicates are removed, the first occurrence stays unchanged, and the same input gives the same bytes."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_hammer.corpus.blocks import BLOCK_BYTES
from megatron_hammer.data.dedup.block_signer import DIGEST_DTYPE
from megatron_hammer.data.dedup.deduplicate import DedupCounts, DedupOptions, FirstOccurrences, deduplicate
from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions
from megatron_hammer.errors import ConfigError, DataError
from tests.helpers.toy_tokenizer import write_jsonl


def run(folder: Path, *inputs: Path, output: str = "out.jsonl", **options: Any) -> tuple[DedupCounts, bytes]:
    path = folder / output
    counts = deduplicate(DedupOptions(inputs=tuple(map(str, inputs)), output_path=path, **options))
    return counts, path.read_bytes()


def read_report(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_occurrence_is_kept_unchanged(tmp_path: Path) -> None:
    lines = [
        b'{"id": 1, "text": "a  b"}',
        b'{"text":"c",  "url":"x"}',
        b'{"text": "a  b", "id": 3}',
        b'{"text": "a b"}',
    ]
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_bytes(b"\n".join(lines) + b"\n")
    second.write_bytes(b'{"text": "c"}\n{"text": "d", "n": 123456789012345678901234567890}')
    report_path = tmp_path / "report.jsonl"
    counts, content = run(tmp_path, first, second, report_path=report_path)
    expected = [lines[0], lines[1], lines[3], b'{"text": "d", "n": 123456789012345678901234567890}']
    assert content == b"\n".join(expected) + b"\n"
    assert (counts.num_documents, counts.num_kept, counts.num_exact_duplicates) == (6, 4, 2)
    assert (counts.text_bytes, counts.kept_text_bytes) == (4 + 1 + 4 + 3 + 1 + 1, 4 + 1 + 3 + 1)
    assert counts.read_bytes == counts.input_bytes == first.stat().st_size + second.stat().st_size
    assert read_report(report_path) == [
        {"removed": f"{first}:3", "duplicate_of": f"{first}:1", "kind": "exact", "similarity": 1.0},
        {"removed": f"{second}:1", "duplicate_of": f"{first}:2", "kind": "exact", "similarity": 1.0},
    ]


def test_white_space_counts_unless_it_is_ignored_by_a_flag(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ["a  b", "a b", " a\n\tb ", "ab"])
    assert run(tmp_path, path)[0].num_kept == 4
    assert run(tmp_path, path, ignores_whitespace=True)[0].num_kept == 2


def test_every_kind_of_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('[{"text": "same\\n", "k": 1}, {\r\n"text": "春", "k": 18446744073709551616}]')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["春", "own"], "id": [1, 2]}), tmp_path / "c.parquet")
    counts, content = run(tmp_path, *(tmp_path / name for name in ("a.txt", "b.json", "c.parquet")))
    documents = [json.loads(line) for line in content.splitlines()]
    assert documents == [{"text": "same\n"}, {"text": "春", "k": 18446744073709551616}, {"text": "own"}]
    assert counts.num_exact_duplicates == 2


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_a_second_run_gives_the_same_bytes(tmp_path: Path, output: str) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [f"document {i % 7}" for i in range(20)])
    counts, content = run(tmp_path, path, output=output)
    (tmp_path / output).unlink()
    (tmp_path / "elsewhere").mkdir()
    assert run(tmp_path / "elsewhere", path, output=output)[1] == content
    unpack = {"gz": gzip.decompress, "zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)}
    plain = unpack.get(output.rpartition(".")[2], bytes)(content)
    assert len(plain.splitlines()) == counts.num_kept == 7


def test_first_occurrences_are_those_of_a_dictionary() -> None:
    rng = random.Random(11)
    occurrences, expected = FirstOccurrences(), dict[bytes, int]()
    location = 0
    for size in (1, 500, 3, 40, 1200, 7, 7, 300):
        # Few distinct digests, and some that end in zero bytes, which numpy strips from a scalar.
        digests = [rng.choice((b"\0", b"")) + rng.randrange(700).to_bytes(2, "big") + b"\0" * 13 for _ in range(size)]
        digests = [digest.ljust(16, b"\0") for digest in digests]
        locations = np.arange(location, location + size)
        firsts = occurrences.add(np.array(digests, dtype=DIGEST_DTYPE), locations)
        assert firsts.tolist() == [
            expected.setdefault(digest, at) for digest, at in zip(digests, locations.tolist(), strict=True)
        ]
        location += size
    assert sum(len(digests) for digests, _ in occurrences._locations._runs) == len(expected)


POEM = (
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。床前明月光，疑是地上霜。"
    "举头望明月，低头思故乡。白日依山尽，黄河入海流。"
)
PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 2
)
CODE = (
    "def total(values):\n    result = 0\n    for value in values:\n        result += value * 2\n    return result\n" * 2
)


def test_near_duplicates_in_three_languages(tmp_path: Path) -> None:
    texts = [POEM, PROSE, CODE, POEM + "终。", PROSE.upper() + " The end.", CODE + "# done\n"]
    unlike = [POEM[::-1], PROSE[::-1], CODE[::-1]]
    path = write_jsonl(tmp_path / "in.jsonl", texts + unlike)
    report_path = tmp_path / "report.jsonl"
    counts, content = run(tmp_path, path, near_duplicates=NearDuplicateOptions(), report_path=report_path)
    assert [json.loads(line)["text"] for line in content.splitlines()] == texts[:3] + unlike
    assert (counts.num_near_duplicates, counts.num_kept) == (3, 6)
    report = read_report(report_path)
    assert [row["duplicate_of"] for row in report] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert {row["kind"] for row in report} == {"near"}
    assert all(0.8 <= row["similarity"] < 1 for row in report)


def similarity(first: str, second: str) -> float:
    """The definition, word by word, for texts of words alone."""
    sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (first.split(), second.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edit(rng: random.Random, text: str, num_edits: int) -> str:
    words = text.split()
    for position in rng.sample(range(len(words)), num_edits):
        words[position] = f"new{rng.getrandbits(40):x}"
    return " ".join(words)


def count_confusion(folder: Path, options: NearDuplicateOptions) -> tuple[int, int, int]:
    """(found, wrongly found, missed) among 240 pairs of a text and its edited copy, judged by the true similarity."""
    rng = random.Random(17)
    originals = [" ".join(f"w{rng.randrange(5000)}" for _ in range(120)) for _ in range(240)]
    copies = [edit(rng, text, 1 if i % 2 else 12) for i, text in enumerate(originals)]
    path = write_jsonl(folder / "known.jsonl", originals + copies)
    report_path = folder / "report.jsonl"
    run(folder, path, near_duplicates=options, report_path=report_path)
    found = {(row["removed"], row["duplicate_of"]) for row in read_report(report_path)}
    similar = {
        (f"{path}:{len(originals) + i + 1}", f"{path}:{i + 1}")
        for i, (text, copy) in enumerate(zip(originals, copies, strict=True))
        if similarity(text, copy) >= 0.8
    }
    assert len(similar) == 120
    return len(found & similar), len(found - similar), len(similar - found)


def test_known_near_duplicates_are_found_and_no_others(tmp_path: Path) -> None:
    """Similarities are about 0.92 (removed with chance 0.9997) and below 0.5 (with chance 1e-10)."""
    assert count_confusion(tmp_path, NearDuplicateOptions()) == (120, 0, 0)
    found, _, missed = count_confusion(
        tmp_path, NearDuplicateOptions(ngram=40)
    )  # the twin: n-grams that long all change
    assert found < missed


def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    rng = random.Random(23)
    texts = [" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1600)) for _ in range(700)]
    texts += [edit(rng, text, rng.randrange(3)) for text in texts]
    rng.shuffle(texts)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    assert path.stat().st_size > 4 * BLOCK_BYTES
    contents = []
    for num_workers in (1, 2):
        report_path = tmp_path / f"{num_workers}.jsonl"
        options: dict[str, Any] = {"near_duplicates": NearDuplicateOptions(), "report_path": report_path}
        counts, content = run(tmp_path, path, num_workers=num_workers, **options)
        contents.append((content, report_path.read_bytes()))
        assert counts.num_exact_duplicates > 100
        assert counts.num_near_duplicates > 100
    assert contents[0] == contents[1]


def test_a_bad_record_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"content": "b"}\n')
    with pytest.raises(DataError, match=r'in\.jsonl:2: field "text" is missing, got keys \[content\]'):
        run(tmp_path, path, report_path=tmp_path / "report.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_impossible_outputs_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ConfigError, match=r"^output: must not be one of the inputs, got .*in\.jsonl\. Choose"):
        run(tmp_path, path, output="in.jsonl")
    with pytest.raises(ConfigError, match=r"^output: file name must end with \.jsonl, .*, got .*out\.txt.*--output"):
        run(tmp_path, path, output="out.txt")
    with pytest.raises(ConfigError, match=r"^report: must differ from --output, got .*out\.jsonl\."):
        run(tmp_path, path, report_path=tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="input file does not exist"):
        run(tmp_path, tmp_path / "none.jsonl")


def test_an_output_in_the_input_folder_is_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["a", "b", "a"])
    (folder / "notes.md").touch()
    (folder / "out.jsonl.partial").write_text("left by a killed run")
    counts, first = run(folder, folder)
    assert (counts.num_documents, counts.num_kept) == (3, 2)
    assert counts.ignored_files == (f"{folder}/notes.md",)
    # It might be a corpus and the only copy of it, so it is neither read nor overwritten.
    with pytest.raises(ConfigError, match=r"^output: must not be one of the inputs, got .*out\.jsonl\..*move it away"):
        run(folder, folder)
    assert (folder / "out.jsonl").read_bytes() == first
    with pytest.raises(ConfigError, match=r"^output: must not be one of the inputs"):
        run(tmp_path, folder, output="in/../in/out.jsonl")
