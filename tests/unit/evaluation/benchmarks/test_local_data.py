import json
from pathlib import Path

import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.evaluation.benchmarks.local_data import (
    LocalDataset,
    find_split,
    read_rows,
    require_folder,
    serve_local_data,
)
from tests.helpers.published_benchmarks import write_lines, write_published_data

ROW = {"question": "q", "A": "a"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published_data(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize(
    "dataset, subset, split, expected",
    [
        ("ceval/ceval-exam", "law", "val", "ceval-exam/val/law_val.csv"),
        ("ceval/ceval-exam", "law", "dev", "ceval-exam/dev/law_dev.csv"),
        ("haonan-li/cmmlu", "agronomy", "test", "cmmlu_v1_0_1/test/agronomy.csv"),
        ("Rowan/hellaswag", None, "validation", "hellaswag/data/hellaswag_val.jsonl"),
        ("allenai/openbookqa", "main", "test", "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"),
        ("allenai/ai2_arc", "ARC-Easy", "test", "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl"),
        ("allenai/winogrande", "winogrande_xl", "train", "winogrande_1.1/train_xl.jsonl"),
        ("allenai/winogrande", "winogrande_xl", "validation", "winogrande_1.1/dev.jsonl"),
        ("aps/super_glue", "boolq", "validation", "BoolQ/dev.jsonl"),
        ("baber/piqa", None, "validation", "piqa/valid.jsonl"),
    ],
)
def test_published_layouts_are_found(
    data_dir: Path, dataset: str, subset: str | None, split: str, expected: str
) -> None:
    assert find_split(data_dir, dataset, subset, split) == [data_dir / expected]


@pytest.mark.parametrize(
    "path, dataset, subset, split",
    [
        ("arc/ARC-Easy/test-00000-of-00002.jsonl", "allenai/ai2_arc", "ARC-Easy", "test"),
        ("allenai__ai2_arc/ARC-Easy/test-00000-of-00002.jsonl", "allenai/ai2_arc", "ARC-Easy", "test"),
        ("Rowan/hellaswag/data/validation-00000-of-00002.jsonl", "Rowan/hellaswag", None, "validation"),
        ("openbookqa/main/test-00000-of-00002.jsonl", "allenai/openbookqa", "main", "test"),
        ("winogrande/winogrande_xl/train-00000-of-00002.jsonl", "allenai/winogrande", "winogrande_xl", "train"),
    ],
)
def test_copies_of_the_hubs_repositories_are_found_shard_by_shard(
    tmp_path: Path, path: str, dataset: str, subset: str | None, split: str
) -> None:
    shards = [tmp_path / path.replace("00000-of", f"0000{number}-of") for number in range(2)]
    for shard in shards:
        write_lines(shard, [ROW])
    assert find_split(tmp_path, dataset, subset, split) == shards


def test_no_other_subset_or_split_is_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "ceval-exam" / "val" / "international_law_val.jsonl", [ROW])
    write_lines(tmp_path / "ceval-exam" / "dev" / "law_dev.jsonl", [ROW])
    assert find_split(tmp_path, "ceval/ceval-exam", "law", "val") == []
    assert find_split(tmp_path, "ceval/ceval-exam", "law", "test") == []


def test_files_that_could_both_be_the_split_are_refused(tmp_path: Path) -> None:
    for name in ("hellaswag_val", "val"):
        write_lines(tmp_path / "hellaswag" / f"{name}.jsonl", [ROW])
    with pytest.raises(DataError, match=r"one file for split validation.*hellaswag_val.jsonl, val.jsonl"):
        find_split(tmp_path, "Rowan/hellaswag", None, "validation")


def test_a_folder_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"folder of dataset Rowan/hellaswag, called hellaswag or .*got other"):
        find_split(tmp_path, "Rowan/hellaswag", None, "validation")
    (tmp_path / "hellaswag.zip").touch()
    with pytest.raises(DataError, match=r"Unpack hellaswag.zip"):
        find_split(tmp_path, "Rowan/hellaswag", None, "validation")
    with pytest.raises(DataError, match=r"data-dir: must be a folder, got .*missing"):
        find_split(tmp_path / "missing", "Rowan/hellaswag", None, "validation")
    with pytest.raises(DataError, match="data-dir: must be given for Rowan/hellaswag"):
        require_folder(None, "Rowan/hellaswag")


def test_fields_have_the_hubs_names(data_dir: Path) -> None:
    (arc, *_) = read_rows(*find_split(data_dir, "allenai/ai2_arc", "ARC-Easy", "test"))
    assert arc["question"] == arc["question_stem"] == "What sleeps over number 0?"
    assert arc["choices"] == {"text": ["dog", "fox", "the lazy dog", "a quick brown fox"], "label": list("ABCD")}
    assert [row["label"] for row in read_rows(*find_split(data_dir, "aps/super_glue", "boolq", "train"))] == [
        1, 0, 0, 1, 0, 0,
    ]  # fmt: skip
    assert [row["label"] for row in read_rows(*find_split(data_dir, "baber/piqa", None, "validation"))] == [0, 1] * 3


def test_cells_keep_commas_quotes_and_line_ends(data_dir: Path) -> None:
    row = read_rows(data_dir / "ceval-exam" / "val" / "law_val.csv")[1]
    assert row == {
        "id": "1", "question": '处处闻啼鸟，"1"\n下列正确的是____。', "A": "夜来风雨声", "B": "花落知多少,", "C": "丙1",
        "D": "丁", "answer": "B",
    }  # fmt: skip


def test_a_cell_may_hold_a_line_separator_of_unicode(tmp_path: Path) -> None:
    path = tmp_path / "law_val.csv"
    path.write_text("id,question\n0,a\u2028b\n\n1,\n\n")  # empty lines are no questions
    assert read_rows(path) == [{"id": "0", "question": "a\u2028b"}, {"id": "1", "question": ""}]


def test_damaged_files_are_named_with_their_line(tmp_path: Path) -> None:
    for name, text, message in (
        ("a_val.jsonl", '{"a": 1}\n{"a"\n', r"a_val.jsonl:2: "),
        ("a_val.csv", "id,question\n0,a\n1,b,c\n", r"a_val.csv:3: must have 2 cells, got 3"),
        ("a_val.parquet", "none", r"a_val.parquet: must be a Parquet file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / name)
    write_lines(tmp_path / "valid.jsonl", [{"goal": "g"}, {"goal": "h"}])
    (tmp_path / "valid-labels.lst").write_text("1\n")
    with pytest.raises(DataError, match=r"valid-labels.lst: must have a line for each question.*got 1 for 2"):
        read_rows(tmp_path / "valid.jsonl")


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "val.parquet")
    assert read_rows(tmp_path / "val.parquet") == [ROW]


def test_lm_eval_gets_local_data_and_its_own_function_back(data_dir: Path, tmp_path: Path) -> None:
    import datasets

    original = datasets.load_dataset
    with serve_local_data(data_dir):
        served = datasets.load_dataset("Rowan/hellaswag")
        assert isinstance(served, LocalDataset)
        assert served["validation"]["label"] == [0, 1, 2, 3, 0, 1]
        assert len(served["test"]) == 0, "a split that no task needs may be absent"
        (tmp_path / "own.json").write_text(json.dumps([ROW]))
        own = datasets.load_dataset("json", data_files=str(tmp_path / "own.json"), cache_dir=str(tmp_path))
        assert own["train"][0] == ROW
    assert datasets.load_dataset is original
