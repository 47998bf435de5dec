"""The cost of a token in GPU-seconds, from projections: what a budget in GPU-hours buys.

Each projection gives one model size and its tokens per second and GPU. The cost between and beyond these sizes is a
power of N that is fitted to them (`fit_token_cost`). With only one size it is proportional to N.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.loss_law.optimum import TokenCost, fit_token_cost
from megatron_hammer.scaling.loss_law.runs import ParameterConvention, count_size
from megatron_hammer.scaling.report.projection_file import SavedProjection, SavedRow, read_projection

UNIT = "GPU-seconds"


def read_gpu_cost(paths: Sequence[Path], num_gpus: int | None, convention: ParameterConvention) -> TokenCost:
    """The cost of a token, from the fastest layout of each projection at `num_gpus` (None: its only number of GPUs).

    Raises ConfigError, every file's problem at once, for a projection that has no such size.
    """
    rows: list[SavedRow] = []
    problems: list[str] = []
    for path in paths:
        projection = read_projection(path)
        found = _select_best(projection, num_gpus)
        if found is None:
            counts = sorted({row.num_gpus for row in projection.rows})
            wanted = "one number of GPUs" if num_gpus is None else f"{num_gpus} GPUs"
            problems.append(
                f"{path}: must have a layout for {wanted}, got {', '.join(map(str, counts)) or 'no layout'}. "
                f"Choose one with --projection-gpus."
            )
        else:
            rows.append(found)
    if problems:
        raise ConfigError(*problems)
    sizes = [float(count_size(row.plan.model, convention)) for row in rows]
    costs = [row.num_gpus * row.step_time_s / row.plan.tokens_per_step for row in rows]
    machines = sorted({f"{row.num_gpus} {row.plan.gpu.name}" for row in rows})
    models = ", ".join(dict.fromkeys(row.plan.model.name for row in rows))
    widest = max(row.high_s / row.step_time_s for row in rows) - 1
    definition = f"GPU time projected for {models} on {' and '.join(machines)} (step times within {widest:.0%})"
    return fit_token_cost(sizes, costs, unit=UNIT, definition=definition)


def _select_best(projection: SavedProjection, num_gpus: int | None) -> SavedRow | None:
    """The fastest row at a number of GPUs. None without such a row, or if none of several numbers was chosen."""
    if num_gpus is None and len({row.num_gpus for row in projection.rows}) != 1:
        return None
    rows = [row for row in projection.rows if num_gpus is None or row.num_gpus == num_gpus]
    return min(rows, key=lambda row: row.step_time_s, default=None)
