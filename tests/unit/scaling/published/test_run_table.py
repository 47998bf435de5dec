"""Cells of a table: blanks are None, and all malformed cells are named with their lines at once."""

from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.published.run_table import read_memory_rows, read_run_rows
from tests.helpers.messages import assert_problems
from tests.helpers.run_tables import COLUMNS, write_table


def test_blanks_numbers_and_lines(tmp_path: Path) -> None:
    rows = read_run_rows(
        write_table(
            tmp_path / "runs.csv",
            {"vpp": "", "params_B": "1.5", "notes": 'two\nlines, "quoted"'},
            {"micro_batch": "n/a", "tp": "2.0", "mfu": "0.41"},
        )
    )
    assert [row.row_number for row in rows] == [2, 4]
    assert (rows[0].params_b, rows[0].vpp, rows[0].gpus, rows[0].iteration_time_s) == (1.5, None, 16, 0.7)
    assert rows[0].notes == 'two\nlines, "quoted"'
    assert (rows[1].micro_batch, rows[1].tp, rows[1].mfu) == (None, 2, 0.41)


def test_every_malformed_cell_is_named_at_once(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "runs.csv",
        {"layers": "many", "gpus": "0", "iteration_time_s": "-1"},
        {"tp": "1.5", "mfu": "inf", "global_batch": "1,024"},
    )
    with pytest.raises(ConfigError) as caught:
        read_run_rows(path)
    count, quantity = "a whole number of at least 1", "a finite number above 0"
    assert_problems(
        caught.value.problems,
        (f"{path}:2:", f"layers: must be {count}", "got 'many'"),
        (f"{path}:2:", f"gpus: must be {count}", "got '0'"),
        (f"{path}:2:", f"iteration_time_s: must be {quantity}", "got '-1'"),
        (f"{path}:3:", f"tp: must be {count}", "got '1.5'"),
        (f"{path}:3:", f"global_batch: must be {count}", "got '1,024'"),
        (f"{path}:3:", f"mfu: must be {quantity}", "got 'inf'"),
    )


def test_counts_of_no_machine_and_no_model_are_refused(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "runs.csv", {"layers": "1e18", "vocab": "1e300"}, {"pp": "100001", "layers": "100000"}
    )
    with pytest.raises(ConfigError) as caught:
        read_run_rows(path)
    assert_problems(
        caught.value.problems,
        (f"{path}:2:", "layers: must be a whole number of at most 100,000", "got '1e18'"),
        (f"{path}:2:", "vocab: must be a whole number of at most 2,147,483,647", "got '1e300'"),
        (f"{path}:3:", "pp: must be a whole number of at most 100,000", "got '100001'"),
    )


def test_columns_may_be_absent_but_not_those_of_a_layout(tmp_path: Path) -> None:
    few = [name for name in COLUMNS if name not in ("derived_fields", "notes", "cp")]
    assert read_run_rows(write_table(tmp_path / "few.csv", {}, columns=few))[0].cp is None
    path = write_table(tmp_path / "none.csv", {}, columns=["model", "layers", "tp", "tp"])
    with pytest.raises(ConfigError) as caught:
        read_run_rows(path)
    text = "\n".join(caught.value.problems)
    missing = "got no hidden, seq, gpus, gpu_type, pp, dp, global_batch among model, layers, tp, tp"
    assert [missing in line for line in caught.value.problems] == [True, False, False], "one problem, not one each"
    assert "must have one of the columns iteration_time_s, tokens_per_s_per_gpu, tflops_per_gpu, mfu, got" in text
    assert f"{path}:1: must have each column once, got tp twice. Drop one of the two." in text


def test_a_short_row_an_empty_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", {})
    path.write_text(path.read_text() + "a,b\n")
    with pytest.raises(ConfigError, match=r"runs\.csv:3: must have a cell.*30.*got 2"):
        read_run_rows(path)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"runs\.csv:1: must be a header, got an empty file\."):
        read_run_rows(path)
    with pytest.raises(ConfigError, match=r"none\.csv: file cannot be read \(No such file or directory\)"):
        read_run_rows(tmp_path / "none.csv")


def test_sequence_parallel_is_yes_no_or_blank(tmp_path: Path) -> None:
    columns = [*COLUMNS, "sequence_parallel"]
    cells = [{"sequence_parallel": text} for text in ("yes", "no", "")]
    path = write_table(tmp_path / "runs.csv", *cells, columns=columns)
    assert [row.sequence_parallel for row in read_run_rows(path)] == [True, False, None]
    path = write_table(tmp_path / "runs.csv", {"sequence_parallel": "maybe"}, columns=columns)
    with pytest.raises(ConfigError, match=r":2: sequence_parallel: must be yes or no, got 'maybe'\."):
        read_run_rows(path)


def test_the_header_of_vtrain(tmp_path: Path) -> None:
    header = (
        "# GPUs,global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,"
        "data parallelism,pipeline parallelism,iteration time (ms)"
    )
    path = tmp_path / "single.csv"
    path.write_text(f"\ufeff{header}\n4,24,3,1536,12,18,512,2,1,2,250.5\n", encoding="utf-8")
    (row,) = read_run_rows(path)
    assert (row.gpus, row.global_batch, row.micro_batch, row.hidden, row.heads, row.layers) == (4, 24, 3, 1536, 12, 18)
    assert (row.seq, row.tp, row.dp, row.pp, row.gpu_type, row.recompute) == (512, 2, 1, 2, "A100", "")
    assert row.iteration_time_s == pytest.approx(0.2505)
    assert row.source == "vTrain_ground_truth_single"


def test_a_memory_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    path.write_text("model,quantity,memory_value,unit,tp,tp\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="each column once, got tp twice"):
        read_memory_rows(path)
