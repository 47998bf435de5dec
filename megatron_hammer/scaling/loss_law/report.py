"""The report of a fitted loss law: tables, one JSON object, and the plot of loss against compute."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron_hammer.scaling.loss_law.law import Interval, LossFit
from megatron_hammer.scaling.loss_law.optimum import (
    Optimum,
    TokenCost,
    allocation_exponents,
    find_optimum,
    format_budget,
)

_NUM_FRONTIER_POINTS: Final = 60
_PLOT_DPI: Final = 150


@dataclass(frozen=True, kw_only=True, slots=True)
class LossStudy:
    """Everything that a report shows. cost: FLOPs per token, for the plot. optima: one per budget, in any unit."""

    fit: LossFit
    parameter_convention: str  # what N counts, in words
    cost: TokenCost
    optima: tuple[Optimum, ...]
    notes: tuple[str, ...]


def as_object(study: LossStudy) -> dict[str, Any]:
    """All digits: a law that was rounded predicts other losses (arXiv 2404.10102, section 4)."""
    fit = study.fit
    names = ("E", "A", "B", "alpha", "beta")
    return {
        "format": "megatron_hammer.scaling.loss_law",
        "law": {name: getattr(fit.law, name) for name in names},
        "law_intervals": {name: list(interval) for name, interval in fit.intervals().items()},
        "confidence": fit.confidence,
        "bootstrap_samples": len(fit.samples),
        "seed": fit.seed,
        "num_parameters_convention": study.parameter_convention,
        "compute_convention": study.cost.definition,
        "optimum_grows_as_budget_to_the": {
            name: {"exponent": value, "interval": list(interval)}
            for name, (value, interval) in allocation_exponents(fit, study.cost).items()
        },
        "root_mean_square_log_residual": _root_mean_square(fit),
        "runs": [
            {
                "name": run.name,
                "source": run.source,
                "num_parameters": run.num_parameters,
                "num_tokens": run.num_tokens,
                "loss": run.loss,
                "loss_source": run.loss_source,
                "fitted_loss": fit.law.predict(run.num_parameters, run.num_tokens),
                "notes": list(run.notes),
            }
            for run in fit.runs
        ],
        "budgets": [_optimum_object(optimum) for optimum in study.optima],
        "notes": list(study.notes),
    }


def print_study(study: LossStudy) -> None:
    """Print parameters, runs, best sizes and notes to stdout. The last line has the counts."""
    from megatron_hammer.files.tables import open_console

    console = open_console()
    fit = study.fit
    console.print("L(N, D) = E + A / N^alpha + B / D^beta, in nats per token", markup=False)
    console.print(f"N: parameters {study.parameter_convention}; compute: {study.cost.definition}", markup=False)
    console.print("", _build_law_table(study), "", _build_run_table(fit), "")
    if study.optima:
        console.print(_build_optimum_table(study), "")
    for definition in dict.fromkeys(optimum.cost.definition for optimum in study.optima):
        if definition != study.cost.definition:
            console.print(f"note: {definition}", markup=False)
    for run in fit.runs:
        for note in run.notes:
            console.print(f"note: {run.name}: {note}", markup=False)
    for note in study.notes:
        console.print(f"note: {note}", markup=False)
    num_sizes, num_tokens = len({run.num_parameters for run in fit.runs}), len({run.num_tokens for run in fit.runs})
    console.print(
        f"fitted: {len(fit.runs)} runs of {num_sizes} sizes and {num_tokens} numbers of tokens, "
        f"{_root_mean_square(fit):.2%} root mean square error of loss, {len(fit.samples)} bootstrap samples, "
        f"{len(study.optima)} budgets",
        markup=False,
    )


def _build_law_table(study: LossStudy) -> Any:
    from megatron_hammer.files.tables import build_table

    fit = study.fit
    rows = [
        (name, f"{getattr(fit.law, name):.5g}", _format_interval(interval))
        for name, interval in fit.intervals().items()
    ]
    rows += [
        (f"best {name} grows as compute to the", f"{value:.4f}", _format_interval(interval))
        for name, (value, interval) in allocation_exponents(fit, study.cost).items()
    ]
    return build_table(None, ("parameter", "value", f"{fit.confidence:.0%} interval"), rows)


def _build_run_table(fit: LossFit) -> Any:
    from megatron_hammer.files.tables import build_table

    rows = []
    for run, residual in zip(fit.runs, fit.log_residuals(), strict=True):
        fitted = fit.law.predict(run.num_parameters, run.num_tokens)
        numbers = (f"{run.num_parameters:,}", f"{run.num_tokens:,}", f"{run.loss:.4f}", f"{fitted:.4f}")
        rows.append((run.name, run.loss_source, *numbers, f"{np.expm1(-residual):+.2%}"))
    return build_table("runs", ("run", "loss is", "N", "D", "loss", "fitted", "error"), rows, num_text=2)


def _build_optimum_table(study: LossStudy) -> Any:
    from megatron_hammer.files.tables import build_table

    rows = (
        (
            format_budget(optimum.budget, optimum.cost),
            f"{optimum.num_parameters:.3g}",
            _format_interval(optimum.num_parameters_interval),
            f"{optimum.num_tokens:.3g}",
            _format_interval(optimum.num_tokens_interval),
            f"{optimum.num_tokens / optimum.num_parameters:.3g}",
            f"{optimum.loss:.4f}",
            _format_interval(optimum.loss_interval),
        )
        for optimum in study.optima
    )
    title = f"best use of a budget, with {study.fit.confidence:.0%} intervals"
    columns = ("budget", "N", "interval", "D", "interval", "D / N", "loss", "interval")
    return build_table(title, columns, rows, num_text=0)


def _format_interval(interval: Interval) -> str:
    return f"{interval.low:.4g} to {interval.high:.4g}"


def _root_mean_square(fit: LossFit) -> float:
    return float(np.sqrt(np.mean(fit.log_residuals() ** 2)))


def _optimum_object(optimum: Optimum) -> dict[str, Any]:
    values: dict[str, Any] = {"budget": optimum.budget, "unit": optimum.cost.unit, "cost": optimum.cost.definition}
    for name in ("num_parameters", "num_tokens", "loss"):
        values[name] = getattr(optimum, name)
        values[f"{name}_interval"] = list(getattr(optimum, f"{name}_interval"))
    return values | {"notes": list(optimum.notes)}


# --- the plot --------------------------------------------------------------------------------------------------------


def draw_study(study: LossStudy) -> bytes:
    """A PNG: loss against compute with the curve of each size and the frontier, and the best size against compute."""
    from matplotlib.figure import Figure

    # Without pyplot, no display is needed and no figure stays open.
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    budgets = _frontier_budgets(study)
    frontier = [find_optimum(study.fit, study.cost, float(budget)) for budget in budgets]
    _draw_losses(left, study, budgets, frontier)
    _draw_sizes(right, study, budgets, frontier)
    buffer = io.BytesIO()
    # Without matplotlib's version, which it writes by default, the same study gives the same bytes.
    figure.savefig(buffer, format="png", dpi=_PLOT_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _frontier_budgets(study: LossStudy) -> np.ndarray:
    spent = _compute_of(study)
    asked = [_as_compute(study, optimum) for optimum in study.optima]
    return np.geomspace(min([*spent, *asked]) / 2, max([*spent, *asked]) * 2, _NUM_FRONTIER_POINTS)


def _draw_losses(axes: Any, study: LossStudy, budgets: np.ndarray, frontier: Sequence[Optimum]) -> None:
    from matplotlib import colormaps

    fit = study.fit
    spent = np.array(_compute_of(study))
    sizes = sorted({run.num_parameters for run in fit.runs})
    colors = dict(zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True))
    for size in sizes:
        of_size = np.array([run.num_parameters == size for run in fit.runs])
        compute = np.geomspace(spent[of_size].min() / 2, spent[of_size].max() * 4, 50)
        tokens = compute / study.cost.estimate(size, 1)
        curve = [fit.law.predict(size, count) for count in tokens]
        axes.plot(compute, curve, color=colors[size], linewidth=1)
        losses = [run.loss for run in fit.runs if run.num_parameters == size]
        label = f"N = {_short(size)}" if _is_labelled(size, sizes) else None
        axes.scatter(spent[of_size], losses, color=colors[size], s=22, zorder=3, label=label)
    axes.plot(
        budgets,
        [point.loss for point in frontier],
        color="black",
        linewidth=1.6,
        zorder=4,
        label="best for its compute",
    )
    low, high = zip(*(point.loss_interval for point in frontier), strict=True)
    axes.fill_between(
        budgets, low, high, color="black", alpha=0.15, linewidth=0, label=f"{fit.confidence:.0%} interval"
    )
    for number, optimum in enumerate(study.optima):
        label = "budget" if number == 0 else None
        _draw_star(axes, _as_compute(study, optimum), optimum.loss, optimum.loss_interval, label)
    axes.set(xscale="log", xlabel=f"training compute ({study.cost.unit})", ylabel="loss (nats per token)")
    _set_loss_limits(axes, study, frontier)
    axes.set_title(f"{study.cost.definition}", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _set_loss_limits(axes: Any, study: LossStudy, frontier: Sequence[Optimum]) -> None:
    """Limit the axis to the measured losses and the frontier, without the far ends of the sizes' curves."""
    values = [run.loss for run in study.fit.runs] + [point.loss for point in frontier]
    values += [end for point in study.optima for end in point.loss_interval]
    margin = 0.08 * (max(values) - min(values))
    axes.set_ylim(min(values) - margin, max(values) + margin)


def _draw_sizes(axes: Any, study: LossStudy, budgets: np.ndarray, frontier: Sequence[Optimum]) -> None:
    fit = study.fit
    axes.plot(budgets, [point.num_parameters for point in frontier], color="black", linewidth=1.6, label="best size")
    low, high = zip(*(point.num_parameters_interval for point in frontier), strict=True)
    axes.fill_between(
        budgets, low, high, color="black", alpha=0.15, linewidth=0, label=f"{fit.confidence:.0%} interval"
    )
    axes.scatter(_compute_of(study), [run.num_parameters for run in fit.runs], s=18, color="tab:blue", label="runs")
    for number, optimum in enumerate(study.optima):
        label = "budget" if number == 0 else None
        compute = _as_compute(study, optimum)
        _draw_star(axes, compute, optimum.num_parameters, optimum.num_parameters_interval, label)
    exponent, interval = allocation_exponents(fit, study.cost)["N"]
    axes.set(xscale="log", yscale="log", xlabel=f"training compute ({study.cost.unit})", ylabel="parameters N")
    axes.set_title(f"best N ~ C^{exponent:.3f} ({interval.low:.3f} to {interval.high:.3f})", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _draw_star(axes: Any, compute: float, value: float, interval: Interval, label: str | None) -> None:
    # The two ends of a percentile interval may lie on one side of the value itself.
    below, above = max(0.0, value - interval.low), max(0.0, interval.high - value)
    axes.errorbar([compute], [value], yerr=[[below], [above]], color="tab:red", capsize=3, zorder=4)
    axes.scatter([compute], [value], marker="*", s=110, color="tab:red", zorder=5, label=label)


def _compute_of(study: LossStudy) -> list[float]:
    """[n]: what each run cost, in the plot's unit."""
    return [study.cost.estimate(run.num_parameters, run.num_tokens) for run in study.fit.runs]


def _as_compute(study: LossStudy, optimum: Optimum) -> float:
    """The position of a budget on the compute axis. One in GPU-hours is placed at the FLOPs of its best run."""
    return study.cost.estimate(optimum.num_parameters, optimum.num_tokens)


def _is_labelled(size: int, sizes: Sequence[int]) -> bool:
    """Whether a size is in the legend: at most seven are, including the smallest and the largest."""
    stride = -(-len(sizes) // 6)
    return sizes.index(size) % stride == 0 or size == sizes[-1]


def _short(number: float) -> str:
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"
