"""The table of a measured cluster: a projection with it has the times that were measured."""

from pathlib import Path

import pytest

from megatron_hammer.errors import OutputError
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.communication import estimate_gather_s, place_group
from megatron_hammer.scaling.hardware.catalogue import load_clusters, select_cluster, select_default_cluster
from megatron_hammer.training.cluster.cluster_table import build_cluster, check_cluster_path, write_cluster
from megatron_hammer.training.cluster.traffic import LinkFit

FITS = {
    ("host", "all-gather"): LinkFit(60e-6, 200e9),
    ("host", "reduce-scatter"): LinkFit(60e-6, 200e9),
    ("host", "all-reduce"): LinkFit(1.0, 1.0),  # not of a ring: it must count for nothing
    ("network", "all-gather"): LinkFit(90e-6, 20e9),
    ("network", "reduce-scatter"): LinkFit(90e-6, 20e9),
}


def build(name: str = "ours", base: str = "dgx-h100", fits: dict = FITS):
    sizes = {"ranks_per_host": 8, "num_hosts": 4}
    source = "2026-01-02, a command"
    return build_cluster(name, source, select_cluster(base), load_coefficients(), **sizes, fits=fits)


def test_the_cost_model_returns_what_was_measured() -> None:
    cluster, coefficients = build(), load_coefficients()
    for size, stride, fit in ((8, 1, FITS["host", "all-gather"]), (4, 8, FITS["network", "all-gather"])):
        num_bytes = 1e8
        expected_s = fit.latency_s + num_bytes * (size - 1) / size / fit.bytes_per_s
        estimated_s = estimate_gather_s(num_bytes, place_group(size, stride, cluster), cluster, coefficients)
        assert estimated_s == pytest.approx(expected_s, rel=1e-6)


def test_what_was_not_measured_is_kept_and_said() -> None:
    base = select_cluster("dgx-h100")
    cluster = build(fits={kind: fit for kind, fit in FITS.items() if kind[0] == "host"})
    assert cluster.network_bytes_per_s == base.network_bytes_per_s
    assert cluster.source == "2026-01-02, a command; measured: links inside a host; the rest as dgx-h100"
    # Hosts of an NVL72 rack reach one another without the network.
    assert build(base="gb200-nvl72").network_bytes_per_s == select_cluster("gb200-nvl72").network_bytes_per_s


def test_the_written_file_is_a_cluster_that_studies_prefer(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    cluster = build()
    write_cluster(path, cluster)
    loaded = load_clusters(path)["ours"]
    assert loaded.nvlink_bytes_per_s == pytest.approx(cluster.nvlink_bytes_per_s, rel=1e-4)
    assert (loaded.gpu, loaded.source, loaded.leaf_size) == ("h100-sxm", cluster.source, cluster.leaf_size)
    assert select_default_cluster("h100-sxm", path).name == "ours"
    assert [file.name for file in tmp_path.iterdir()] == ["clusters.toml"]


def test_tables_of_the_user_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    check_cluster_path(path, "ours")
    write_cluster(path, build())
    check_cluster_path(path, "ours")  # the table is replaced
    with pytest.raises(OutputError, match=r"no other table than \[theirs\], got \[ours\]"):
        check_cluster_path(path, "theirs")
    path.write_text("[broken")
    with pytest.raises(OutputError, match=r"clusters\.toml"):
        check_cluster_path(path, "ours")
