"""A comparison in sentences, tables, JSON, CSV and a chart of days against cost."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_hammer.files import csv_table
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.decisions.compare import CRITERIA, Comparison, Option, Verdict, find_interval
from megatron_hammer.scaling.report.projection_tables import ResultTable, format_amount, format_tokens
from megatron_hammer.scaling.search.projection import describe_plan

FORMAT = "megatron_hammer.scaling.comparison"
FORMAT_VERSION = 1
BEST_NAMES = {
    "days": "Fastest",
    "cost_usd": "Cheapest",
    "energy_mwh": "Least energy",
    "co2_tonnes": "Least CO2",
}
UNITS = {"days": "days", "cost_usd": "USD", "energy_mwh": "MWh", "co2_tonnes": "t CO2"}
# What to pass for a criterion that no option has.
HINTS = {
    "cost_usd": "Cost: not known, because no price is. Pass --usd-per-gpu-hour.",
    "co2_tonnes": "CO2: not counted. Pass --grid-kgco2-per-kwh.",
}
ENERGY_NOTE = (
    "Energy is that of boards at full load, with the rest of their nodes and the building (PUE), so it is the upper "
    "side. CO2 is that of this energy; making the hardware is not counted. Restarts and evaluation are not counted."
)


def name_option(option: Option) -> str:
    """h100-sxm x 256 (dgx-h100) bf16."""
    study = option.study
    return f"{study.gpu.name} x {option.size.num_gpus:,} ({study.cluster.name}) {study.precision}"


def describe_verdict(comparison: Comparison, verdict: Verdict) -> str:
    """Who is best at a criterion, and how sure that is."""
    options, name = comparison.options, BEST_NAMES[verdict.criterion]
    best = options[verdict.best]
    amount = f"{_format(best, verdict.criterion)} {UNITS[verdict.criterion]}"
    if verdict.ties:
        others = ", ".join(
            f"{name_option(options[one])} (+{_percent(comparison, one, verdict)})" for one in verdict.ties
        )
        text = (
            f"{name}: a tie. {name_option(best)}, {amount}, is not ahead of {others} by more than the errors explain."
        )
    else:
        text = f"{name}: {name_option(best)}, {amount}."
    if len(verdict.probabilities) > 1:
        text += f" Probability of being the best: {format_probability(verdict.probabilities[verdict.best])}."
    if verdict.unknown:
        text += f" Not known for {', '.join(name_option(options[one]) for one in verdict.unknown)}."
    return text


def format_probability(share: float) -> str:
    """A share of random draws is never certain."""
    return "above 99%" if share > 0.99 else "below 1%" if share < 0.01 else f"{share:.0%}"


def _percent(comparison: Comparison, position: int, verdict: Verdict) -> str:
    return f"{find_interval(comparison, position, verdict.best, verdict.criterion)[0] - 1:.1%}"


def _format(option: Option, criterion: str) -> str:
    value = None if option.amounts is None else getattr(option.amounts, criterion)
    return "" if value is None else format_amount(value)


def describe_comparison(comparison: Comparison) -> list[str]:
    """The decisions, then why some options have none."""
    sentences = [describe_verdict(comparison, verdict) for verdict in comparison.verdicts]
    known = _list_known(comparison)
    hints = [hint for name, hint in HINTS.items() if known and name not in known]
    problems = [f"{name_option(one)}: {one.size.problem}" for one in comparison.options if one.size.problem]
    return sentences + hints + problems


def build_tables(comparison: Comparison) -> list[ResultTable]:
    """The amounts of every option, and their ratios to the best ones. Empty if nothing fits."""
    options = [(position, one) for position, one in enumerate(comparison.options) if one.amounts is not None]
    if not options:
        return []
    tables = [_build_amount_table(comparison)]
    if len(options) > 1:
        tables.append(_build_ratio_table(comparison))
    return tables


def _list_known(comparison: Comparison) -> list[str]:
    known = {verdict.criterion for verdict in comparison.verdicts}
    return [name for name in CRITERIA if name in known]


def _build_amount_table(comparison: Comparison) -> ResultTable:
    known = _list_known(comparison)
    rows = []
    for position, one in enumerate(comparison.options):
        if one.best is None or one.bill is None:
            continue
        rows.append(
            (
                name_option(one),
                describe_plan(one.best.plan),
                f"{one.best.step.total_s:.3f}",
                f"{one.best.memory.total_bytes / GIB:.1f}",
                f"{format_amount(one.bill.low_days)} - {format_amount(one.bill.high_days)}",
                *(_format(one, name) for name in known),
                format_amount(one.bill.gpu_hours),
                "yes" if position in comparison.front else "",
            )
        )
    columns = ("option", "layout to start from", "s per step", "GiB", "80 % band of days")
    study = comparison.options[0].study
    return ResultTable(
        title=f"{study.model.name}, {format_tokens(study.train_tokens or 0)} tokens, "
        f"{study.global_batch_size:,} samples of {study.seq_length:,} tokens per step",
        columns=(*columns, *(UNITS[name] for name in known), "GPU-hours", "on the front"),
        groups=(tuple(rows),),
        num_text=2,
        note=f"on the front: no other option is as good in days and {UNITS[comparison.rival]}. {ENERGY_NOTE}",
    )


def _build_ratio_table(comparison: Comparison) -> ResultTable:
    """Every amount over the best one, with its 80% interval, and the probability of being the best."""
    columns = ["option"]
    for verdict in comparison.verdicts:
        columns += [f"{UNITS[verdict.criterion]} / best", "80 %", "P(best)"]
    rows = []
    for position, one in enumerate(comparison.options):
        if one.amounts is None:
            continue
        cells = [name_option(one)]
        for verdict in comparison.verdicts:
            if position not in verdict.probabilities:
                cells += ["", "", ""]
                continue
            ratio, low, high = find_interval(comparison, position, verdict.best, verdict.criterion)
            mark = " tie" if position in verdict.ties else ""
            is_best = position == verdict.best
            interval = "best" if is_best else f"{low:.2f} - {high:.2f}{mark}"
            cells += [f"{ratio:.2f}", interval, format_probability(verdict.probabilities[position])]
        rows.append(tuple(cells))
    return ResultTable(
        title="Against the best option",
        columns=tuple(columns),
        groups=(tuple(rows),),
        num_text=1,
        note="Errors of two predictions are independent between generations of GPUs, and correlated within one.",
    )


# --- files -----------------------------------------------------------------------------------------------------------


def build_document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON."""
    study = comparison.options[0].study
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": study.model.name,
        "train_tokens": study.train_tokens,
        "seq_length": study.seq_length,
        "global_batch_size": study.global_batch_size,
        "options": list_rows(comparison),
        "verdicts": [
            {
                "criterion": verdict.criterion,
                "best": name_option(comparison.options[verdict.best]),
                "is_tie": bool(verdict.ties),
                "ties": [name_option(comparison.options[one]) for one in verdict.ties],
                "unknown": [name_option(comparison.options[one]) for one in verdict.unknown],
                "sentence": describe_verdict(comparison, verdict),
            }
            for verdict in comparison.verdicts
        ],
        "front": {
            "criteria": ["days", comparison.rival],
            "options": [name_option(comparison.options[one]) for one in comparison.front],
        },
    }


def list_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat record for each option; null where nothing fits or nothing is known."""
    return [_build_row(comparison, position) for position in range(len(comparison.options))]


def _build_row(comparison: Comparison, position: int) -> dict[str, Any]:
    one = comparison.options[position]
    study, best, bill = one.study, one.best, one.bill
    amounts = dict.fromkeys(CRITERIA) if one.amounts is None else asdict(one.amounts)
    return {
        "option": name_option(one),
        "gpu": study.gpu.name,
        "cluster": study.cluster.name,
        "gpus": one.size.num_gpus,
        "precision": study.precision,
        "problem": one.size.problem,
        "layout": None if best is None else describe_plan(best.plan),
        "step_time_s": None if best is None else best.step.total_s,
        "low_s": None if best is None else best.step.low_s,
        "high_s": None if best is None else best.step.high_s,
        "memory_bytes": None if best is None else best.memory.total_bytes,
        "low_days": None if bill is None else bill.low_days,
        "high_days": None if bill is None else bill.high_days,
        "gpu_hours": None if bill is None else bill.gpu_hours,
        **amounts,
        "usd_per_gpu_hour": study.usd_per_gpu_hour,
        "power_usage_effectiveness": study.cluster.power_usage_effectiveness,
        "is_on_front": position in comparison.front,
        **{
            f"probability_least_{verdict.criterion}": verdict.probabilities.get(position)
            for verdict in comparison.verdicts
        },
    }


def format_csv(comparison: Comparison) -> str:
    rows = list_rows(comparison)
    names = list(rows[0])
    return csv_table.format_csv(names, [[row[name] for name in names] for row in rows])


# Paul Tol's palette, safe for the colour-blind: one colour for each machine.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#332288", "#BBBBBB")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DOTS_PER_INCH = 130


def draw_front(comparison: Comparison) -> bytes | None:
    """Days against cost (or energy) with the bands, as PNG. None with fewer than two options to draw."""
    from matplotlib.figure import Figure

    shown = [
        position
        for position, one in enumerate(comparison.options)
        if one.amounts is not None and getattr(one.amounts, comparison.rival) is not None
    ]
    if len(shown) < 2:
        return None
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    axis = figure.subplots()
    machines: dict[str, list[int]] = {}
    for position in shown:
        study = comparison.options[position].study
        machines.setdefault(f"{study.machine} {study.precision}", []).append(position)
    for number, (name, positions) in enumerate(machines.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        _draw_machine(axis, comparison, positions, name, style)
    if len(comparison.front) > 1:
        points = [_find_point(comparison, position) for position in comparison.front]
        axis.plot(*zip(*points, strict=True), color="#222222", linestyle=":", linewidth=1.3, zorder=1, label="front")
    _label_axes(axis, comparison)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    image = io.BytesIO()
    # Without matplotlib's version, which it writes by default, the same result gives the same bytes.
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return image.getvalue()


def _find_point(comparison: Comparison, position: int) -> tuple[float, float]:
    amounts = comparison.options[position].amounts
    return amounts and amounts.days, getattr(amounts, comparison.rival)  # type: ignore[return-value]


def _draw_machine(
    axis: Any, comparison: Comparison, positions: Sequence[int], name: str, style: dict[str, str]
) -> None:
    """The options of one machine, each with its number of GPUs; the bands of days and cost are the same error."""
    for number, position in enumerate(positions):
        option = comparison.options[position]
        days, rival = _find_point(comparison, position)
        assert option.best is not None
        low, high = (edge / option.best.step.total_s for edge in (option.best.step.low_s, option.best.step.high_s))
        # A step that takes longer costs more: the band is a line along both axes at once.
        axis.plot(
            [low * days, high * days], [low * rival, high * rival], color=style["color"], linewidth=2.5, alpha=0.45
        )
        label = name if number == 0 else None
        # Hollow, so that two options at nearly the same place are both seen.
        axis.plot(
            [days], [rival], **style, fillstyle="none", markersize=8, linestyle="none", markeredgewidth=1.8, label=label
        )
        axis.annotate(f"{option.size.num_gpus:,}", (days, rival), xytext=(6, 6), textcoords="offset points", fontsize=9)


def _label_axes(axis: Any, comparison: Comparison) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    study = comparison.options[0].study
    axis.set_title(
        f"{study.model.name}, {format_tokens(study.train_tokens or 0)} tokens: each point has its number of GPUs,\n"
        "each bar is the 80 % band of the step time",
        fontsize=10,
    )
    for one, scale, words in (
        (axis.xaxis, axis.set_xscale, "days"),
        (axis.yaxis, axis.set_yscale, UNITS[comparison.rival]),
    ):
        scale("log")
        one.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        one.set_minor_formatter(NullFormatter())
        one.set_label_text(words)
    axis.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
