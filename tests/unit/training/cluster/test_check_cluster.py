"""What the check of a cluster refuses before it starts, and what must not cost its report."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hammer.cli.check_cluster import main
from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.hardware.catalogue import select_cluster
from megatron_hammer.training.cluster.check_cluster import CheckOptions, ClusterCheck, check_options
from megatron_hammer.training.cluster.cluster_table import build_cluster
from megatron_hammer.training.cluster.traffic import LinkFit
from tests.helpers.messages import raises_problem

FITS = {("host", "all-gather"): LinkFit(60e-6, 1e9)}


def build_options(**changes: Any) -> CheckOptions:
    options = {
        **{"command": "check", "as_json": False, "timeout_s": 180.0, "memory_gib": None, "file_mib": 256},
        **{"shared_dir": None, "most_skew_s": 1.0, "cluster_path": None, "cluster_name": "ours_1-b"},
    }
    return CheckOptions(**(options | changes))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize(
    ("name", "flag"),
    [("timeout_s", "timeout-s"), ("memory_gib", "memory-gib"), ("most_skew_s", "max-clock-skew-s")],
)
def test_numbers_that_nothing_can_wait_for(name: str, flag: str, value: float) -> None:
    check_options(build_options())
    with raises_problem(ConfigError, f"{flag}: must be more than 0 and at most 1e+06", f"got {value:g}"):
        check_options(build_options(**{name: value}))


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a]\n[b", "a\n", "模型"])
def test_a_name_is_one_key_of_toml(name: str) -> None:
    with raises_problem(ConfigError, "cluster-name: must be of letters", f"got {name!r}"):
        check_options(build_options(cluster_name=name))


def test_a_name_alone_is_not_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--cluster-name", "ours"])
    assert ended.value.code == 2
    assert "cluster-name: must be given with --output-clusters-file, got 'ours' alone." in capsys.readouterr().err


def test_a_check_that_ends_early_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a rank hangs in native code, where no `finally` runs; the report comes first."""
    check = ClusterCheck.__new__(ClusterCheck)
    check.rank, check.folder = 0, tmp_path / ".check-cluster-1"
    check.folder.mkdir()
    (check.folder / "3.bin").write_bytes(b"much")
    check.roll = SimpleNamespace(find_missing=lambda stage: ("rank 3", [3]))  # type: ignore[assignment]
    check.watch = SimpleNamespace(stage="file speed")  # type: ignore[assignment]
    seen: list[Any] = []
    monkeypatch.setattr(check, "report_missing", lambda text, ranks: seen.append(len(list(tmp_path.iterdir()))))
    monkeypatch.setattr("os._exit", seen.append)
    check.end_early(False)
    assert seen == [1, 1], "the report while the folder is there, then the exit code"
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_cannot_be_written_does_not_cost_the_report(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found: list[tuple[str, ...]] = []
    check = SimpleNamespace(
        options=build_options(cluster_path=tmp_path / "file" / "clusters.toml"),
        rank=0,
        plan=SimpleNamespace(machine=SimpleNamespace(platform="cpu")),
        device=SimpleNamespace(type="cpu"),
        ranks_of_hosts={"a": [0, 1]},
        fits=FITS,
        report=SimpleNamespace(date="2026-01-02"),
        find=lambda *words: found.append(words),
    )
    ClusterCheck.write_table(check)  # type: ignore[arg-type]
    ((name, status, text),) = found
    assert (name, status) == ("cluster table", "problem")
    assert "clusters.toml: file cannot be written" in text
    cluster = build_cluster(
        "ours", "a test", select_cluster("cpu-host"), load_coefficients(), ranks_per_host=2, num_hosts=1, fits=FITS
    )
    assert cluster.gpus_per_node == 2, "what it would have written"
