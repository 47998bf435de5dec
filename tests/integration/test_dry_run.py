"""--dry-run: every shipped preset at its recipe's layout, in numbers that add up, without a GPU or a process group."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.parsed_flags import parse, plan, write_data
from tests.helpers.training_runs import environment


def report_of(*flags: str):
    parse(*flags)  # the slow import, once
    from megatron_hammer.config.dry_run.dry_run import build_dry_run_report
    from megatron_hammer.config.preflight.find_problems import find_problems

    arguments = parse(*flags)
    return build_dry_run_report(arguments, find_problems(arguments))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str) -> None:
    preset = PRESETS[name]
    report = report_of("--preset", name, "--mock-data", "--dry-run")
    assert report.problems == ()
    assert report.preset == name
    assert report.model.num_parameters == preset.num_parameters
    assert report.model.num_parameters_padded >= report.model.num_parameters >= report.model.num_active_parameters
    layers = sorted(layer for stage in report.stages for chunk in stage.layers for layer in chunk)
    assert layers == list(range(preset.model.num_layers))
    for stage in report.stages:
        assert sum(stage.memory_bytes.values()) == stage.memory_total_bytes
    if report.world_size == 1:
        assert report.stages[0].dense_parameters + report.stages[0].expert_parameters == (
            report.model.num_parameters_padded
        )
    assert report.run.tokens_per_step == preset.recipe.tokens_per_step
    assert report.run.num_steps == preset.recipe.train_steps
    assert report.run.num_tokens >= preset.recipe.train_tokens
    assert report.run.flop_convention.startswith("A: ")
    assert json.loads(json.dumps(report.to_json()))["model"]["num_parameters"] == preset.num_parameters


def test_grid_places_ranks_as_the_layout_does() -> None:
    flags = ("--preset", "tiny-llm-zh-moe", "--mock-data", "--tensor-model-parallel-size", "2", *plan(16))
    flags += ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "4", "--sequence-parallel")
    report, layout = report_of(*flags), parse(*flags).plan.layout
    for rank in range(16):
        place = dict(zip(("tp", "cp", "dp", "pp", "etp", "ep", "edp"), layout.coordinates(rank), strict=False))
        place |= {"pp": layout.coordinates(rank).pp_rank, "dp": layout.coordinates(rank).dp_rank}
        assert {axis.name: rank // axis.stride % axis.size for axis in report.grid} == place


def test_overrides_and_settings() -> None:
    report = report_of("--preset", "hammer-tiny", "--mock-data", "--dry-run", "--weight-decay", "0.2", "--seed", "9")
    (override,) = report.overrides
    assert (override.name, override.preset_value, override.value) == ("weight_decay", 0.1, 0.2)
    assert report.settings["seed"] == 9
    assert report.settings["swiglu"] is True
    assert "tensor_model_parallel_size" not in report.settings  # Megatron's own default


def test_epochs_of_a_blend(tmp_path: Path) -> None:
    large, small = write_data(tmp_path / "large", [1000] * 100), write_data(tmp_path / "small", [500] * 100)
    flags = ("--preset", "hammer-tiny", "--dry-run", "--split", "90,10,0", "--train-iters", "100")
    weighted = report_of(*flags, "--data-path", "3", large, "1", small).run
    assert weighted.split_tokens == {"train": 135_000, "valid": 15_000, "test": 0}
    assert weighted.num_tokens == 100 * 8 * 256
    assert weighted.epochs == pytest.approx(weighted.num_tokens / 135_000)
    assert [source.weight for source in weighted.sources] == [0.75, 0.25]
    assert [source.epochs for source in weighted.sources] == pytest.approx(
        [0.75 * weighted.num_tokens / 90_000, 0.25 * weighted.num_tokens / 45_000]
    )
    by_size = report_of(*flags, "--data-path", large, small).run
    assert [source.epochs for source in by_size.sources] == pytest.approx([by_size.epochs] * 2)


def test_a_layout_that_cannot_be_is_still_reported() -> None:
    report = report_of("--preset", "llama2-70b", "--mock-data", "--pipeline-model-parallel-size", "3", *plan(24))
    assert (report.stages, report.grid, report.run) == (None, None, None)
    assert report.model.num_parameters == 68_976_648_192
    assert len(report.problems) == 1
    nothing = report_of("--dry-run")
    assert nothing.model is None
    assert any(problem.startswith("num-layers: must be given") for problem in nothing.problems)


def test_tables_for_people() -> None:
    from megatron_hammer.config.dry_run.dry_run import print_report

    stream = io.StringIO()
    print_report(report_of("--preset", "llama3-70b", "--mock-data", *plan(256), "--gpu-memory-gib", "80"), stream)
    text = stream.getvalue()
    for expected in (
        "70,553,706,496", "Rank grid (256 ranks)", "0-3 | 16-19", "of 80.0 available", "FLOPs per token",
        "15,000,001,314,816", "A: layers and head, causal attention",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.integration
def test_command_as_a_user_types_it(tmp_path: Path) -> None:
    """The first command of the README, as JSON: exit code 0, nothing on disk, and in seconds."""
    command = "-m megatron_hammer.training.pretrain --preset hammer-1b4 --world-size 64 --dry-run --json"
    result = subprocess.run(
        [sys.executable, *command.split(), "--platform", "cpu"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"]["num_parameters"] == 1_402_288_128
    assert (report["problems"], report["run"]["data_flags"]) == ([], [])
    assert result.stderr.splitlines()[-1] == "dry run: 0 problems, nothing was started"
    assert list(tmp_path.iterdir()) == []
