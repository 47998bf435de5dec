"""Which runs a fit must not see if it is to predict a run: those of its publication, and near copies elsewhere.

A recipe is a model on a GPU in a family of layouts: the same widths, the same GPU, and the same kinds of parallelism.
The number of replicas, batch, sequence length, precision and number of layers do not make another recipe. Vendors
print one recipe on several pages, so a fit that knows the other page has nearly seen the row.
"""

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, get_args

from megatron_hammer.scaling.evidence.calibration import name_publication
from megatron_hammer.scaling.published.measured_runs import MeasuredRun

FoldBy = Literal["recipe", "publication", "recipe-only"]
FOLDS_BY: tuple[FoldBy, ...] = get_args(FoldBy)


def name_recipe(run: MeasuredRun) -> Hashable:
    """What a run has in common with its near copies, in every publication."""
    model, layout = run.plan.model, run.plan.layout
    widths = (model.hidden_size, model.num_attention_heads, model.ffn_hidden_size, model.moe)
    kinds = (
        layout.tensor_model_parallel_size > 1,
        layout.pipeline_model_parallel_size > 1,
        layout.context_parallel_size > 1,
        layout.expert_model_parallel_size > 1,
        run.plan.sharding == "fsdp",
    )
    return (*widths, run.plan.gpu.name, *kinds)


class Fold(NamedTuple):
    """The positions of the runs that one fit predicts, and of those that it may see."""

    held_out: list[int]
    fitted: list[int]


def list_folds(runs: Sequence[MeasuredRun], *, by: FoldBy = "recipe") -> list[Fold]:
    """Every run is held out once: with its publication and, by recipe, without near copies in other publications.

    recipe-only: with its recipe everywhere, while other recipes of its publication stay. If there is only one
    publication, a fold holds out one recipe, too. If there is only one recipe, each run alone.
    """
    publications = [name_publication(run.source) for run in runs]
    recipes = [name_recipe(run) for run in runs]
    names: Sequence[Hashable] = publications if len(set(publications)) > 1 and by != "recipe-only" else recipes
    if len(set(names)) == 1:
        return [Fold([row], [other for other in range(len(runs)) if other != row]) for row in range(len(runs))]
    folds = []
    for name in dict.fromkeys(names):
        held_out = [row for row, own in enumerate(names) if own == name]
        copies = {recipes[row] for row in held_out} if by == "recipe" else set()
        fitted = [row for row, own in enumerate(names) if own != name and recipes[row] not in copies]
        folds.append(Fold(held_out, fitted))
    return folds
