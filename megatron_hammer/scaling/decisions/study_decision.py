"""The decision that a projection leads to: how many GPUs, which layout, for how long, saved how often, and how sure.

Without a deadline or a budget there is no single best number of GPUs. The knee is taken: the largest size at which GPUs
still do nearly their best. The other sizes stand beside it with the same figures.
"""

from megatron_hammer.scaling.decisions.goodput import Goodput, Operations, estimate_goodput
from megatron_hammer.scaling.decisions.goodput_report import format_days, format_seconds, list_assumptions
from megatron_hammer.scaling.decisions.training_plan_report import format_count, format_interval
from megatron_hammer.scaling.report.decision import Decision
from megatron_hammer.scaling.report.projection_file import build_row
from megatron_hammer.scaling.report.projection_tables import ResultTable
from megatron_hammer.scaling.search.projection import Projection, StudyResult, describe_plan
from megatron_hammer.scaling.search.search_space import is_cpu_host


def decide_study(result: StudyResult, operations: Operations | None = None) -> Decision:
    """The decision of a study. CPU hosts have no failures, because no rate of theirs is published."""
    best = [size.best for size in result.sizes if size.best is not None]
    if not best:
        return Decision(headline="None of these numbers of GPUs can train the model: see what is missing below.")
    if is_cpu_host(result.study.cluster):
        goodputs: dict[int, Goodput] = {}
    else:
        operations = operations or Operations()
        goodputs = {
            one.num_gpus: estimate_goodput(build_row(one, rank=1), result.study.train_tokens, operations)
            for one in best
        }
    chosen = _choose(result, best)
    return Decision(
        headline=_describe_choice(result, chosen, goodputs.get(chosen.num_gpus)),
        actions=tuple(_list_actions(chosen, goodputs.get(chosen.num_gpus))),
        doubts=(*_describe_standing(result, chosen), *_list_doubts(chosen, goodputs.get(chosen.num_gpus))),
        options=_build_options(result, best, goodputs),
        assumptions=tuple(list_assumptions(operations)) if operations is not None and goodputs else (),
    )


def _choose(result: StudyResult, best: list[Projection]) -> Projection:
    """The size at the knee; there is one wherever something fits."""
    assert result.knee is not None
    return next(one for one in best if one.num_gpus == result.knee.num_gpus)


def _describe_choice(result: StudyResult, chosen: Projection, good: Goodput | None) -> str:
    study, step = result.study, chosen.step
    text = f"Train {study.model.name} on {chosen.num_gpus:,} GPU{'s' if chosen.num_gpus > 1 else ''}"
    if good is not None and good.days is not None and good.days_interval is not None:
        tokens, days = format_count(study.train_tokens or 0), good.days_interval
        band = f"{format_days(days.low)} to {format_days(days.high)}"
        return f"{text}: {tokens} tokens in {format_days(good.days)} days ({band}){_format_cost(result, good)}."
    speed = chosen.tokens_per_s_per_gpu * chosen.num_gpus
    band = f"{format_seconds(step.low_s)} to {format_seconds(step.high_s)}"
    return f"{text}: {format_seconds(step.total_s)} per step ({band}), {speed:,.0f} tokens per second."


def _list_actions(chosen: Projection, good: Goodput | None) -> list[str]:
    actions = [f"Layout: {describe_plan(chosen.plan)} (row {chosen.num_gpus}-1)."]
    if good is not None and good.problem is None:
        spares = f"{good.num_spare_nodes:,} spare node{'' if good.num_spare_nodes == 1 else 's'}"
        actions.append(f"Pass --save-interval {good.save_interval_steps}, and keep {spares}.")
    return actions


def _format_cost(result: StudyResult, good: Goodput) -> str:
    price = result.study.usd_per_gpu_hour
    if price is None or good.days is None or good.days_interval is None:
        return ""
    per_day = 24 * good.row.num_gpus * price
    return f" for {format_count(per_day * good.days)} USD ({format_interval(good.days_interval, per_day)})"


def _describe_standing(result: StudyResult, chosen: Projection) -> list[str]:
    """How sure the layout is the fastest, what it is tied with, and why it may not work as predicted."""
    (size,) = [size for size in result.sizes if size.best is chosen]
    tied = [f"{size.num_gpus}-{rank}" for rank, one in enumerate(size.projections, start=1) if one.standing.is_tied]
    others = [row for row in tied if row != f"{size.num_gpus}-1"]
    chance = f"Its chance to be the fastest is {chosen.standing.chance_of_best:.0%}"
    cautions = [f"Caution: {caution}." for caution in chosen.standing.cautions]
    if others:
        words = f"row{'' if len(others) == 1 else 's'} {', '.join(others)}"
        return [f"{chance}; it is tied with {words}: measure before you choose.", *cautions]
    return [f"{chance}; no other layout shown is tied with it.", *cautions]


def _list_doubts(chosen: Projection, good: Goodput | None) -> list[str]:
    step = chosen.step
    low, high = (end / step.total_s - 1 for end in (step.low_s, step.high_s))
    doubts = [
        f"The step time is {format_seconds(step.total_s)}. Of measured steps, 80% lie {low:+.0%} to {high:+.0%} from "
        "such a prediction."
    ]
    if good is None:
        return doubts
    if good.problem is not None:
        return [*doubts, good.problem]
    first, last = good.equal_steps
    between = " to ".join(format_seconds(end) for end in good.mtbf_s_interval)
    days = "" if good.days is None else ". The days above contain failures"
    return [
        *doubts,
        f"A failure is expected every {format_seconds(good.mtbf_s)} ({between} on published clusters), so "
        f"{good.goodput_ratio:.1%} of the time makes progress{days}.",
        f"Any save interval from {first:,} to {last:,} steps is as good.",
    ]


def _build_options(result: StudyResult, best: list[Projection], goodputs: dict[int, Goodput]) -> ResultTable:
    """A line for each size. Columns without a value at any size are left out."""
    lines = [_build_line(result, one, goodputs.get(one.num_gpus)) for one in sorted(best, key=lambda one: one.num_gpus)]
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    note = "chance: of the layout to be the fastest of its size."
    if goodputs:
        note += " days, USD and bands: with failures, of published clusters and storage as assumed below."
    return ResultTable(
        title="The options",
        columns=tuple(columns),
        groups=(tuple(tuple(line[name] for name in columns) for line in lines),),
        num_text=2,
        note=note,
    )


def _build_line(result: StudyResult, one: Projection, good: Goodput | None) -> dict[str, str]:
    days = band = usd = ""
    price = result.study.usd_per_gpu_hour
    if good is not None and good.days is not None and good.days_interval is not None:
        days = format_days(good.days)
        band = f"{format_days(good.days_interval.low)} - {format_days(good.days_interval.high)}"
        usd = "" if price is None else format_count(24 * one.num_gpus * price * good.days)
    has_progress = good is not None and good.problem is None
    return {
        "GPUs": f"{one.num_gpus:,}",
        "layout": describe_plan(one.plan),
        "s per step": f"{one.step.total_s:.3f}",
        "days": days,
        "80 % band": band,
        "USD": usd,
        "chance": f"{one.standing.chance_of_best:.0%}",
        "goodput": f"{good.goodput_ratio:.1%}" if good is not None else "",
        "--save-interval": f"{good.save_interval_steps:,}" if good is not None and has_progress else "",
        "spare nodes": f"{good.num_spare_nodes:,}" if good is not None and has_progress else "",
    }
