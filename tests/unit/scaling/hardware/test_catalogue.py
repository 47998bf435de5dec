"""The shipped GPUs and clusters are complete and sane, and a user's file is laid over them or refused with reasons."""

import re
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.hardware.catalogue import (
    find_gpu_by_device_name,
    load_clusters,
    load_gpus,
    select_cluster,
    select_default_cluster,
    select_gpu,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("A100-80GB", "a100-sxm-80gb"),
        ("A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("A100-64GB (Leonardo)", "a100-sxm-64gb"),
        ("V100 (DGX-2)", "v100-sxm3-32gb"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("H100-SXM-80GB", "h100-sxm"),
        ("h100 sxm", "h100-sxm"),
        ("H100-96GB-HBM2e (500W)", "h100-sxm-96gb-500w"),
        ("H100-64GB (MareNostrum5)", "h100-sxm-64gb"),
        ("GB200", "gb200"),
        ("nvidia l40s", "l40s"),
        ("DGX A100 SXM4 (40 GB)", "a100-sxm-40gb"),
        ("DGX A100", "a100-sxm-80gb"),
        ("H100-SXM5-80GB", "h100-sxm"),
        ("80GB PCIe A100", "a100-pcie-80gb"),
        ("GB200 NVL72 (186 GB)", "gb200"),
        ("H200 NVL (141 GB)", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
    ],
)
def test_spellings_of_published_tables_and_of_torch(spelling: str, name: str) -> None:
    assert select_gpu(spelling).name == name


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"gpu: must be a known GPU, got gpu='H1000'\. Use one of .*h100-sxm"):
        select_gpu("H1000")


def test_peaks_rise_as_formats_narrow() -> None:
    for gpu in load_gpus().values():
        peaks = [gpu.fp32_tflops, gpu.fp16_tflops, gpu.fp8_tflops, gpu.fp4_tflops]
        present = [peak for peak in peaks if peak is not None]
        assert present == sorted(present), gpu.name
        assert gpu.bf16_tflops in (None, gpu.fp16_tflops)


def test_every_gpu_of_training_has_a_cluster_of_its_kind() -> None:
    other = {"l40", "l4", "a40", "rtx-4090", "rtx-3090", "h200-nvl", "gh200-96gb"}  # of servers built in many ways
    for gpu in load_gpus().values():
        if gpu.name not in other:
            assert select_default_cluster(gpu.name).gpu == gpu.name


def test_clusters_fit_together() -> None:
    gpus = load_gpus()
    for cluster in load_clusters().values():
        assert cluster.gpu in gpus
        assert cluster.network_bytes_per_s <= cluster.nvlink_bytes_per_s
        assert cluster.nvlink_latency_s <= cluster.network_latency_s
        assert cluster.leaf_size % cluster.gpus_per_node == 0
        assert cluster.usd_per_gpu_hour is None or "USD" in cluster.source


def test_defaults() -> None:
    assert select_default_cluster("h100-sxm").name == "dgx-h100"
    assert select_default_cluster("a100-sxm-80gb").name == "dgx-a100"
    assert select_default_cluster("gb200").nvlink_domain_size == 72
    with pytest.raises(ConfigError, match=r"no known cluster is built of, got gpu='rtx-4090'"):
        select_default_cluster("rtx-4090")
    with pytest.raises(ConfigError, match=r"cluster: must be a known cluster, got cluster='mars'"):
        select_cluster("mars")


def test_a_device_name_is_found_only_as_a_whole() -> None:
    gpu = find_gpu_by_device_name("NVIDIA A100 80GB PCIe")
    assert gpu is not None
    assert gpu.name == "a100-pcie-80gb"
    assert find_gpu_by_device_name("NVIDIA A100 80GB PCIe LC") is None


def test_a_slice_of_a_gpu_is_not_that_gpu() -> None:
    with pytest.raises(ConfigError, match=r"gpu: must be a known GPU, got gpu='NVIDIA A100-SXM4-40GB MIG 3g\.20gb'"):
        select_gpu("NVIDIA A100-SXM4-40GB MIG 3g.20gb")


def test_a_file_changes_a_field_and_adds_a_gpu(tmp_path: Path) -> None:
    path = write(
        tmp_path / "gpus.toml",
        '[h100-sxm]\npower_w = 600\n\n[mine]\nsource = "bench"\nfp32_tflops = 1.0\nfp16_tflops = 2\n'
        "memory_bytes = 1_000_000_000\nmemory_bytes_per_s = 3e9\npower_w = 4\n",
    )
    gpus = load_gpus(path)
    assert gpus["h100-sxm"].power_w == 600
    assert gpus["h100-sxm"].fp8_tflops == 1978.9
    assert (gpus["mine"].fp16_tflops, gpus["mine"].bf16_tflops) == (2, None)
    assert "mine" not in load_gpus()
    clusters = write(tmp_path / "clusters.toml", '[dgx-h100]\nusd_per_gpu_hour = 2.5\ngpu = "mine"\n')
    assert select_cluster("dgx-h100", clusters, gpus_path=path).usd_per_gpu_hour == 2.5
    with pytest.raises(ConfigError, match=r"\[dgx-h100\] gpu: must be a known GPU, got gpu='mine'"):
        load_clusters(clusters)


def test_a_users_cluster_is_the_default_of_its_gpu(tmp_path: Path) -> None:
    fields = 'source = "ours"\ngpu = "h100-sxm"\ngpus_per_node = 4\nnvlink_domain_size = 4\nnvlink_bytes_per_s = 4e11\n'
    links = "nvlink_latency_s = 0\nnetwork_bytes_per_s = 1e10\nnetwork_latency_s = 1e-5\n"
    own = write(tmp_path / "own.toml", f"[ours]\n{fields}{links}")
    assert select_default_cluster("h100-sxm", own).name == "ours"
    assert select_default_cluster("h200-sxm", own).name == "dgx-h200"
    changed = write(tmp_path / "changed.toml", "[aws-p5]\nusd_per_gpu_hour = 3.0\n")
    assert select_default_cluster("h100-sxm", changed).name == "dgx-h100"


def test_every_bad_field_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "gpus.toml",
        '[h100-sxm]\npower_w = -1\nmemory_bytes = 80.5\ncolour = "green"\naliases = ["B200"]\n\n[mine]\nsource = ""\n',
    )
    with pytest.raises(ConfigError) as caught:
        load_gpus(path)
    assert len(caught.value.problems) == 9
    text = "\n".join(caught.value.problems)
    for field, value in (
        ("h100-sxm.power_w", "-1"),
        ("h100-sxm.memory_bytes", "80.5"),
        ("h100-sxm.colour", "'green'"),
        ("mine.source", "''"),
        ("mine.fp16_tflops", "nothing"),
    ):
        assert re.search(rf"^{re.escape(str(path))}: {field} must .*, got {value}\. .*the fields source, ", text, re.M)


def test_an_alias_of_two_gpus_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "gpus.toml", '[h100-sxm]\naliases = ["b-200"]\n')
    with pytest.raises(ConfigError, match=r"aliases: must mean one GPU, got 'B200', which also means h100-sxm"):
        load_gpus(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("power_w = 3\n", r": power_w must be a table, got 3\. Write \[name\] tables with the fields source"),
        ("[h100-sxm\n", r": file must be TOML, got: "),
        ('[h100-sxm]\nname = "mine"\n', r": h100-sxm\.name must be left out, got 'mine'\. Rename the table\."),
    ],
)
def test_a_file_of_other_content_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "gpus.toml", text)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + message):
        load_gpus(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: file cannot be read \(No such file or directory\)\."):
        load_clusters(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("field", "number"),
    [("memory_bytes", "80"), ("bf16_tflops", "989e12"), ("memory_bytes_per_s", "3350.0"), ("power_w", "0.0")],
)
def test_numbers_in_another_unit_are_refused(tmp_path: Path, field: str, number: str) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(f"[h100-sxm]\n{field} = {number}\n")
    with pytest.raises(ConfigError, match=f"h100-sxm.{field} must be at (least|most) "):
        load_gpus(path)
