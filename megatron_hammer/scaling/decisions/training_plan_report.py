"""A training plan as sentences, a table, and values for JSON."""

import math
from typing import Any

from megatron_hammer.files.typed import replace_non_finite
from megatron_hammer.scaling.decisions.goodput_report import format_days
from megatron_hammer.scaling.decisions.training_plan import ChosenRun, PlannedSize, TrainingPlan
from megatron_hammer.scaling.loss_law.law import Interval
from megatron_hammer.scaling.report.projection_tables import ResultTable, format_amount
from megatron_hammer.scaling.search.projection import describe_plan

COLUMNS = ("GPUs", "layout", "s per step", "goodput", "days", "80 % band", "GPU-hours", "USD", "80 % band", "chance")


def describe_decision(plan: TrainingPlan) -> list[str]:
    """The plan in a few sentences: what to train, on what, for how long; or what is missing."""
    run, chosen = plan.run, plan.chosen
    sentences = [_describe_run(run, plan)]
    if chosen is None or chosen.good is None or chosen.days_interval is None:
        return [*sentences, "No number of GPUs fulfils the plan."]
    interval = chosen.days_interval
    usd = ""
    if chosen.cost_usd is not None and chosen.cost_usd_interval is not None:
        usd = f" and {format_amount(chosen.cost_usd)} USD ({format_interval(chosen.cost_usd_interval)})"
    chance = "" if chosen.chance_ratio is None else f" The limits are met with a chance of {chosen.chance_ratio:.0%}."
    return [
        *sentences,
        f"Use {chosen.num_gpus:,} GPUs: {format_days(chosen.days or 0.0)} days ({format_days(interval.low)} to "
        f"{format_days(interval.high)}){usd}, with {describe_plan(chosen.good.row.plan)} and --save-interval "
        f"{chosen.good.save_interval_steps}.{chance}",
    ]


def _describe_run(run: ChosenRun, plan: TrainingPlan) -> str:
    model = run.model
    size = "" if run.best_size_interval is None else f" (best size {format_interval(run.best_size_interval)})"
    tokens = "" if plan.target.num_tokens is not None else f" ({format_interval(run.num_tokens_interval)})"
    never = f"; in {run.unreached_ratio:.0%} of the samples never" if run.unreached_ratio else ""
    return (
        f"Train {format_count(run.num_parameters)} parameters{size}: {model.num_layers} layers, hidden size "
        f"{model.hidden_size:,}, MLP {model.ffn_hidden_size:,}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} query groups; on {format_count(run.num_tokens)} tokens{tokens}{never}; expected "
        f"loss {run.loss:.4f} ({run.loss_interval.low:.4f} to {run.loss_interval.high:.4f})."
    )


def format_count(number: float) -> str:
    """1.4e9 -> 1.4B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 1000 * size else f"{number / size:,.0f}{letter}"
    return f"{number:,.0f}"


def format_interval(interval: Interval, factor: float = 1.0) -> str:
    """An interval times a factor, such as the price of a day."""
    return " to ".join("never" if math.isinf(end) else format_count(factor * end) for end in interval)


def build_plan_table(plan: TrainingPlan) -> ResultTable:
    rows = tuple(_build_cells(size) for size in plan.sizes if size.good is not None)
    return ResultTable(
        title="The plan at each number of GPUs",
        columns=COLUMNS,
        groups=(rows,),
        num_text=2,
        note="days and USD: median with failures, and the band over the law, step times, clusters and chance. "
        "chance: of meeting deadline and budget.",
    )


def _build_cells(size: PlannedSize) -> tuple[str, ...]:
    good, days, usd = size.good, size.days_interval, size.cost_usd_interval
    assert good is not None
    assert days is not None
    return (
        f"{size.num_gpus:,}",
        describe_plan(good.row.plan),
        f"{good.row.step_time_s:.3f}",
        f"{good.goodput_ratio:.1%}",
        format_days(size.days or 0.0),
        f"{format_days(days.low)} - {format_days(days.high)}",
        "never" if math.isinf(size.days or 0.0) else format_amount((size.days or 0.0) * 24 * size.num_gpus),
        "" if size.cost_usd is None else "never" if math.isinf(size.cost_usd) else format_amount(size.cost_usd),
        "" if usd is None else format_interval(usd),
        "" if size.chance_ratio is None else f"{size.chance_ratio:.0%}",
    )


def as_object(plan: TrainingPlan) -> dict[str, Any]:
    """Everything for JSON; null for what does not exist and for a time that never ends."""
    run, target = plan.run, plan.target
    return {
        "format": "megatron_hammer.scaling.plan",
        "target": {
            "loss": target.loss,
            "num_tokens": target.num_tokens,
            "keeps_model": target.keeps_model,
            "deadline_days": target.deadline_days,
            "budget_usd": target.budget_usd,
        },
        "model": {
            name: getattr(run.model, name)
            for name in (
                "name", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                "vocab_size",
            )
        },
        "num_parameters": run.num_parameters,
        "best_size_interval": _as_list(run.best_size_interval),
        "num_tokens": run.num_tokens,
        "num_tokens_interval": _as_list(run.num_tokens_interval),
        "loss": run.loss,
        "loss_interval": _as_list(run.loss_interval),
        "unreached_ratio": run.unreached_ratio,
        "notes": list(run.notes),
        "chosen_gpus": None if plan.chosen is None else plan.chosen.num_gpus,
        "missing": list(plan.missing),
        "sizes": [_build_size(size) for size in plan.sizes],
    }  # fmt: skip


def _build_size(size: PlannedSize) -> dict[str, Any]:
    good = size.good
    values = {
        "gpus": size.num_gpus,
        "layout": None if good is None else describe_plan(good.row.plan),
        "step_time_s": None if good is None else good.row.step_time_s,
        "goodput_ratio": None if good is None else good.goodput_ratio,
        "save_interval": None if good is None else good.save_interval_steps,
        "num_spare_nodes": None if good is None else good.num_spare_nodes,
        "days": size.days,
        "cost_usd": size.cost_usd,
        "chance_ratio": size.chance_ratio,
        "problem": size.problem,
    }
    intervals = {"days_interval": _as_list(size.days_interval), "cost_usd_interval": _as_list(size.cost_usd_interval)}
    return replace_non_finite(values) | intervals


def _as_list(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [end if math.isfinite(end) else None for end in interval]
