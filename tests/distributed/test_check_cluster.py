"""check_cluster.py with four ranks on two pretended hosts, over gloo: what is wrong is named, and nothing hangs."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.cli.scaling_study.main import main as run_study
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, run_program, write_toy_data

pytestmark = pytest.mark.distributed

PROGRAM = ROOT / "tests" / "helpers" / "rank_of_a_cluster.py"
FLAGS = (
    *("--platform", "cpu", "--json", "--file-mib", "16", "--memory-gib", "0.01", "--tensor-model-parallel-size", "2"),
    *TOY_MODEL,
    *TOY_SCHEDULE,
    *("--train-iters", "2"),
)


def check(fault: str, *flags: str) -> tuple[int, dict[str, Any]]:
    result = run_program(PROGRAM, 4, *FLAGS, *flags, FAULT=fault)
    assert result.stdout.startswith("{"), result.stdout[-2000:] + result.stderr[-6000:]
    return result.returncode, json.loads(result.stdout)


def list_problems(report: dict[str, Any], check: str) -> list[tuple[str | None, int | None]]:
    return [
        (finding["host"], finding["rank"])
        for finding in report["findings"]
        if finding["status"] == "problem" and finding["check"].startswith(check)
    ]


def test_what_is_wrong_is_named_and_the_links_feed_a_scaling_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, clusters_file = write_toy_data(tmp_path / "toy", num_documents=20), tmp_path / "clusters.toml"
    code, report = check(
        "sick", "--data-path", data, "--save", str(tmp_path / "save"), "--output-clusters-file", str(clusters_file)
    )
    assert code == 1
    assert report["hosts"] == ["host-0", "host-0", "host-1", "host-1"]
    assert report["layout"] == "custom: tp 2, pp 1, cp 1, ep 1, dp 2"
    assert list_problems(report, "matrix products") == [("host-1", 3)]
    assert list_problems(report, "clocks") == [("host-1", None)]
    # Of two hosts no majority says which is right.
    assert list_problems(report, "versions: ") == [("host-0, host-1", None)]
    fine = {finding["check"] for finding in report["findings"] if finding["status"] == "fine"}
    assert fine >= {"data files", "memory", "shared folder", "rename in the shared folder", "cluster table"}
    assert [finding["status"] for finding in report["findings"] if finding["check"] == "GPU health"] == [
        "not applicable"
    ]
    measured = {measurement["check"] for measurement in report["measurements"]}
    assert measured >= {
        *("tensor groups, all-reduce", "data groups, reduce-scatter", "data groups, all-gather"),
        *("host groups, all-gather", "network groups, all-gather", "links inside a host", "links between hosts"),
    }
    assert list((tmp_path / "save").iterdir()) == []

    command = ("project", "--preset", "hammer-tiny", "--gpu", "cpu-core", "--gpus", "4")
    texts = []
    for files in ((), ("--clusters-file", str(clusters_file))):
        run_study([*command, *files, "--output-dir", str(tmp_path / f"study{len(files)}")])
        texts.append(capsys.readouterr().out)
    assert "measured" in texts[1]
    assert texts[0] != texts[1]


def test_a_rank_that_hangs_is_named_in_time() -> None:
    code, report = check("hung", "--timeout-s", "12")
    assert code == 1
    assert list_problems(report, "versions") == [("host-0", 1)]
    assert "rank 1 (host-0) did not finish it" in report["findings"][-1]["text"]


def test_a_rank_that_dies_is_named() -> None:
    code, report = check("dead")
    assert code != 0
    assert list_problems(report, "versions") == [("host-1", 2)]
    assert "the launcher ended the run" in report["findings"][-1]["text"]


def test_bad_numbers_end_with_their_sentence() -> None:
    result = run_program(PROGRAM, 1, "--platform", "cpu", "--timeout-s", "0", "--file-mib", "-1", FAULT="none")
    assert result.returncode == 2
    assert "timeout-s: must be more than 0 and at most 1e+06, got 0" in result.stderr
    assert "file-mib: must be more than 0 and at most 1e+06, got -1" in result.stderr
