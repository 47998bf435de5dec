"""Settings of a measured sweep, from flags and from a file."""

import re
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.scaling.measured.sweep import Sweep, digest_of, list_settings, parse_layout, read_sweeps
from tests.helpers.messages import assert_problems


def test_layout_names() -> None:
    assert parse_layout("single") == ParallelLayout()
    assert parse_layout("tp2-sp-pp4-vp3-cp5-dp6-ep7") == ParallelLayout(
        tensor_model_parallel_size=2,
        has_sequence_parallel=True,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=3,
        context_parallel_size=5,
        data_parallel_size=6,
        expert_model_parallel_size=7,
    )
    assert parse_layout("dp2-ddp") == ParallelLayout(data_parallel_size=2, has_distributed_optimizer=False)


@pytest.mark.parametrize("name", ["", "tp", "tp0", "tp2-tp4", "tp2-single", "single-tp2", "xp2", "tp-2", "TP2"])
def test_names_that_are_not_layouts_are_refused(name: str) -> None:
    match = (
        "layouts: must be single or of tpN, sp, ppN, vpN, cpN, dpN, epN and ddp, each once, "
        f"got {re.escape(name)}. Write tp2-pp2, say."
    )
    with pytest.raises(ConfigError, match=match):
        parse_layout(name)


def test_every_combination_is_a_setting() -> None:
    sweep = Sweep(
        presets=("hammer-tiny", "hammer-tiny-moe"), layouts=("single", "pp2"), micro_batch_sizes=(1, 2, 4), steps=7
    )
    settings = list_settings(sweep)
    assert len(settings) == 2 * 2 * 3
    assert len({setting.name for setting in settings}) == 12
    first = settings[0]
    assert first.name == "hammer-tiny_single_s256_mb1_gb8"  # the recipe's sequence length and batch
    flags = first.list_flags()
    assert flags[:2] == ["--preset", "hammer-tiny"]
    assert flags[flags.index("--train-iters") + 1] == "7"
    assert flags[-1] == "--mock-data"


def test_weak_scaling_and_recomputation() -> None:
    sweep = Sweep(
        presets=("hammer-tiny",), layouts=("dp2", "tp2-dp3"), samples_per_rank=(4,), recompute=("none", "full")
    )
    assert [(setting.global_batch_size, setting.recompute) for setting in list_settings(sweep)] == [
        (8, "none"), (8, "full"), (24, "none"), (24, "full"),
    ]  # fmt: skip
    assert list_settings(sweep)[1].name == "hammer-tiny_dp2_s256_mb2_gb8_full"


@pytest.mark.parametrize("flag", ["--data-path", "--train-data-path=corpus", "--mock-data"])
def test_data_of_the_user_takes_the_place_of_made_up_tokens(flag: str) -> None:
    flags = list_settings(Sweep(presets=("hammer-tiny",), flags=(flag, "x")))[0].list_flags()
    assert flags[-2:] == [flag, "x"]
    assert flags.count("--mock-data") == int(flag == "--mock-data")


def test_all_problems_at_once() -> None:
    sweep = Sweep(
        presets=("hammer-tiny", "no-such"), layouts=("tp2", "tq2"), micro_batch_sizes=(0,), precision="fp8",
        global_batch_sizes=(8,), samples_per_rank=(4, 2), recompute=("some",),
    )  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        list_settings(sweep)
    assert_problems(
        raised.value.problems,
        ("micro-batch-sizes:", "at least 1", "got 0"),
        ("samples-per-rank:", "cannot be combined with global-batch-sizes", "got 4, 2 and 8"),
        ("recompute:", "none, selective, full", "got some"),
        ("precision:", "fp32, bf16, fp16", "got fp8"),
        ("layouts:", "tq2"),
        ("preset:", "no-such"),
    )


def test_a_sweep_of_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError) as raised:
        list_settings(Sweep(presets=(), layouts=(), recompute=()))
    assert_problems(
        raised.value.problems,
        ("presets:", "at least", "got none"),
        ("layouts:", "at least", "got none"),
        ("recompute:", "at least", "got none"),
    )


def test_sweeps_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        '[[sweep]]\npresets = ["hammer-tiny"]\nlayouts = ["single", "tp2"]\nsteps = 9\nflags = ["--seed", "5"]\n'
        '[[sweep]]\npresets = ["hammer-tiny-moe"]\nseq_lengths = [128]\nprecision = "bf16"\n'
    )
    assert read_sweeps(path) == [
        Sweep(presets=("hammer-tiny",), layouts=("single", "tp2"), steps=9, flags=("--seed", "5")),
        Sweep(presets=("hammer-tiny-moe",), seq_lengths=(128,), precision="bf16"),
    ]


@pytest.mark.parametrize(
    "text, match",
    [
        ("x = ", r"sweep\.toml: file must be TOML, got: .*\. Write \[\[sweep\]\] tables with the fields presets, "),
        ("", r"sweep\.toml: sweep must be given, got nothing\. Write \[\[sweep\]\] tables"),
        ("sweep = []", r"sweep\.toml: sweep must hold a table, got none\. Write \[\[sweep\]\] tables"),
        ("[other]\nx = 1", r"sweep\.toml: other must be a known field, got \{'x': 1\}\."),
        ("[[sweep]]\nsteps = 5", r"sweep\[0\]\.presets must be given, got nothing\."),
        ("[[sweep]]\npresets = []", r"sweep\[0\]\.presets must have a length of at least 1, got \[\]\."),
        ('[[sweep]]\npresets = ["a"]\nstep = 5', r"sweep\[0\]\.step must be a known field, got 5\."),
        ('[[sweep]]\npresets = "a"', r"sweep\[0\]\.presets must be a list, got 'a'\."),
        ('[[sweep]]\npresets = ["a"]\nsteps = "5"', r"sweep\[0\]\.steps must be a whole number, got '5'\."),
        (
            '[[sweep]]\npresets = ["a"]\nseq_lengths = [1.5]',
            r"sweep\[0\]\.seq_lengths\[0\] must be a whole number, got 1\.5",
        ),
    ],
)
def test_files_that_are_no_sweep(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_sweeps(path)


def test_digest_changes_with_anything() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1, "b": [2]}) != digest_of({"a": 1, "b": [3]})


def test_layouts_that_cannot_cut_the_model_are_refused_before_any_process_starts() -> None:
    with pytest.raises(ConfigError) as caught:
        list_settings(Sweep(presets=("hammer-tiny",), layouts=("tp64", "single", "pp999")))
    assert len(caught.value.problems) >= 2
    for layout in ("tp64", "pp999"):
        assert any(problem.startswith(f"layouts: {layout} of hammer-tiny: ") for problem in caught.value.problems)
    # Training flags have the last word on the model's sizes.
    (setting,) = list_settings(Sweep(presets=("hammer-tiny",), layouts=("pp999",), flags=("--num-layers", "999")))
    assert setting.layout.world_size == 999
