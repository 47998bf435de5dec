"""Coefficients as a file and as numbers to be fitted."""

import dataclasses

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import (
    GPU_PRIORS,
    PRIORS,
    build_prior_coefficients,
    flatten_coefficients,
    format_coefficients,
    list_tables,
    load_coefficients,
    read_tables,
    replace_values,
    save_coefficients,
    select_generation,
)
from megatron_hammer.scaling.cost.expert_coefficients import EXPERT_PRIORS
from megatron_hammer.scaling.hardware.catalogue import load_gpus, select_gpu
from tests.helpers.messages import assert_problems


def test_a_file_gives_back_what_was_written(tmp_path):
    own = dataclasses.replace(build_prior_coefficients().gpus["hopper"], gemm_ratio=0.5)
    written = dataclasses.replace(
        build_prior_coefficients(),
        gpus={**build_prior_coefficients().gpus, "my gpu": own},
        band_ratio={"default": 0.125, "fsdp": 0.25},
        provenance={"date": "2026-01-02", "fingerprints": [f"{i:016x}" for i in range(9)], "sources": {"a b": 3}},
    )
    save_coefficients(written, tmp_path / "mine.toml")
    read = load_coefficients(tmp_path / "mine.toml")
    assert flatten_coefficients(read) == pytest.approx(flatten_coefficients(written), rel=1e-5)
    assert read.band_ratio == written.band_ratio
    assert read.provenance == written.provenance
    assert read.gpus["my gpu"].num_multiprocessors == 132
    assert format_coefficients(read) == format_coefficients(written)


def test_the_shipped_file_says_what_it_was_fitted_on():
    shipped = load_coefficients()
    assert shipped is load_coefficients()
    assert set(GPU_PRIORS) <= set(shipped.gpus)
    provenance = shipped.provenance
    assert provenance["num_runs"] == len(set(provenance["fingerprints"])) > 200
    assert sum(provenance["sources"].values()) >= provenance["num_runs"]
    assert 0 < provenance["cross_validated_median_ratio"] < 0.15
    assert "default" in shipped.band_ratio


def test_every_shipped_coefficient_lies_within_its_bounds():
    for name, value in flatten_coefficients(load_coefficients()).items():
        gpu, _, own = name.rpartition(".")
        tables = {**GPU_PRIORS, "experts": EXPERT_PRIORS}
        prior = tables[gpu][own] if gpu else PRIORS[name]
        assert prior.low < value < prior.high, name


def test_numbers_are_changed_by_name():
    start = build_prior_coefficients()
    changed = replace_values(start, {"network_ratio": 0.5, "hopper.gemm_ratio": 0.6})
    values = flatten_coefficients(changed)
    assert values["network_ratio"] == 0.5
    assert values["hopper.gemm_ratio"] == 0.6
    others = {name for name, value in flatten_coefficients(start).items() if value != values[name]}
    assert others == {"network_ratio", "hopper.gemm_ratio"}


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("v100-sxm3-32gb", "volta"),
        ("a100-pcie-40gb", "ampere"),
        ("h200-sxm", "hopper"),
        ("l40s", "hopper"),
        ("gb300", "blackwell"),
    ],
)
def test_a_generation_follows_from_the_formats_it_multiplies(name, generation):
    gpu = select_gpu(name)
    assert select_generation(gpu) == generation
    coefficients = build_prior_coefficients()
    assert coefficients.select_gpu(gpu) is coefficients.gpus[generation]


def test_every_shipped_gpu_has_coefficients_and_the_cpu_core_its_own():
    coefficients = build_prior_coefficients()
    for gpu in load_gpus().values():
        assert coefficients.select_gpu(gpu).gemm_ratio > 0
    assert coefficients.select_gpu(select_gpu("cpu-core")) is coefficients.gpus["cpu-core"]


def test_every_number_that_is_not_positive_is_named(tmp_path):
    path = tmp_path / "bad.toml"
    text = format_coefficients(build_prior_coefficients())
    path.write_text(text.replace("network_ratio = 0.75", "network_ratio = -1").replace("_ratio = 0.72", '_ratio = "x"'))
    with pytest.raises(ConfigError) as caught:
        load_coefficients(path)
    assert_problems(
        caught.value.problems,
        (f"{path}:", "shared.network_ratio must be above 0", "got -1"),
        (f"{path}:", "gpu.hopper.gemm_ratio must be a number", "got 'x'"),
    )


def test_unknown_and_missing_coefficients_are_named_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    text = format_coefficients(build_prior_coefficients())
    path.write_text(text.replace("network_ratio", "wishes").replace('"volta"', '"vega"'))
    with pytest.raises(ConfigError) as caught:
        load_coefficients(path)
    assert_problems(
        caught.value.problems,
        (f"{path}:", "shared must hold only known", "got wishes"),
        (f"{path}:", "shared must hold every coefficient", "got none of network_ratio"),
        (f"{path}:", "gpu must have every generation", "got no volta"),
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: file cannot be read \(No such file or directory\)\."):
        load_coefficients(tmp_path / "none.toml")
    (tmp_path / "odd.toml").write_text("[shared\n")
    with pytest.raises(ConfigError, match=r"odd\.toml: file must be TOML, got: .*\. Run calibrate again\."):
        load_coefficients(tmp_path / "odd.toml")


def test_tables_of_another_version_have_to_be_written_again() -> None:
    """Such a table is part of a projection, which calibrate does not write."""
    tables = list_tables(load_coefficients())
    shared = {name: value for name, value in tables["shared"].items() if name != "host_s"}
    with pytest.raises(ConfigError, match=r"got none of host_s\. Another version wrote this file: write it again"):
        read_tables({**tables, "shared": shared}, where="projection.json: cost_model.coefficients")
