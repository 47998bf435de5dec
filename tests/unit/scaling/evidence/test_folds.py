"""No fit sees the publication or the recipe of a run that it predicts."""

import dataclasses

import pytest

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients
from megatron_hammer.scaling.evidence.calibration import name_publication
from megatron_hammer.scaling.evidence.folds import FOLDS_BY, list_folds, name_recipe
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_RUNS_PATH
from tests.helpers.simulated_runs import simulate_runs

PRIORS = build_prior_coefficients()


@pytest.fixture(scope="module")
def published() -> list[MeasuredRun]:
    return [run for run in read_runs(PUBLISHED_RUNS_PATH)[0] if run.is_megatron_style]


def change_layout(run: MeasuredRun, **sizes: int) -> MeasuredRun:
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, layout=ParallelLayout(**sizes)))


@pytest.mark.parametrize("by", FOLDS_BY)
def test_every_run_is_held_out_once_and_never_seen_by_its_fit(by, published) -> None:
    folds = list_folds(published, by=by)
    assert sorted(row for fold in folds for row in fold.held_out) == list(range(len(published)))
    for held_out, fitted in folds:
        publications = {name_publication(published[row].source) for row in held_out}
        seen = {name_publication(published[row].source) for row in fitted}
        assert by == "recipe-only" or not publications & seen


def test_no_near_copy_is_in_the_fit(published) -> None:
    """The same model on the same GPU in another release, batch, precision or number of GPUs is a near copy."""
    for held_out, fitted in [*list_folds(published), *list_folds(published, by="recipe-only")]:
        assert not {name_recipe(published[row]) for row in held_out} & {name_recipe(published[row]) for row in fitted}
    by_publication = list_folds(published, by="publication")
    assert any(
        {name_recipe(published[row]) for row in held_out} & {name_recipe(published[row]) for row in fitted}
        for held_out, fitted in by_publication
    ), "or the two ways would be one"


def test_a_recipe_is_a_model_on_a_gpu_in_a_family_of_layouts() -> None:
    run = simulate_runs(PRIORS)[0]
    plan = run.plan
    base = change_layout(run, tensor_model_parallel_size=2, data_parallel_size=32)
    copies = (
        dataclasses.replace(plan, global_batch_size=3 * plan.global_batch_size),
        dataclasses.replace(plan, seq_length=2 * plan.seq_length),
        dataclasses.replace(plan, model=dataclasses.replace(plan.model, name="other", num_layers=4)),
        dataclasses.replace(plan, precision="fp8"),
    )
    assert {name_recipe(dataclasses.replace(run, plan=one)) for one in copies} == {name_recipe(run)}
    assert name_recipe(change_layout(run, tensor_model_parallel_size=8, data_parallel_size=1)) == name_recipe(base)
    others = (
        base,
        change_layout(run, pipeline_model_parallel_size=2, data_parallel_size=32),
        change_layout(run, context_parallel_size=2, data_parallel_size=32),
        dataclasses.replace(run, plan=dataclasses.replace(plan, sharding="fsdp")),
        dataclasses.replace(run, plan=dataclasses.replace(plan, gpu=dataclasses.replace(plan.gpu, name="other"))),
        dataclasses.replace(
            run, plan=dataclasses.replace(plan, model=dataclasses.replace(plan.model, ffn_hidden_size=512))
        ),
    )
    assert len({name_recipe(one) for one in (run, *others)}) == len(others) + 1


def test_runs_of_one_publication_are_left_out_by_recipe() -> None:
    first, *one_recipe = simulate_runs(PRIORS, "mine")[:3]  # tp 1, and twice another tp
    assert [tuple(fold) for fold in list_folds(one_recipe)] == [([0], [1]), ([1], [0])], "each alone"
    assert [tuple(fold) for fold in list_folds([*one_recipe, first])] == [([0, 1], [2]), ([2], [0, 1])]
