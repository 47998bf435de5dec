import pytest

from megatron_hammer.config.read_plan import count_least_world_size
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.parsed_flags import TINY, parse, plan
from tests.helpers.recipe_layouts import build_layout


@pytest.mark.parametrize("name", PRESETS)
def test_the_layout_of_a_preset_comes_back_exactly(name: str) -> None:
    assert parse("--preset", name, "--dry-run").settings.layout == build_layout(PRESETS[name].recipe)


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4", 8),
        ("--expert-model-parallel-size 4", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", 2),
        ("--context-parallel-size 2 --expert-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 0", 1),
    ],
)
def test_the_smallest_world_of_a_layout(flags: str, ranks: int) -> None:
    namespace = parse("--preset", "hammer-tiny-moe", "--dry-run", *flags.split()).namespace
    assert count_least_world_size(namespace) == ranks
    assert namespace.world_size == ranks


def test_world_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--preset", "llama2-70b", "--dry-run").namespace.world_size == 32
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert parse("--preset", "llama2-70b", "--dry-run").namespace.world_size == 64
    assert parse("--preset", "llama2-70b", *plan(128)).namespace.world_size == 128


def test_chunks_from_either_flag() -> None:
    stages = ("--preset", "llama3-70b", "--dry-run")
    assert parse(*stages).settings.layout.virtual_pipeline_model_parallel_size == 5
    tiny = (*TINY, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
    assert parse(*tiny).settings.layout.virtual_pipeline_model_parallel_size == 2
