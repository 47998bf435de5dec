"""The HTML report of a projection: one file without links to others, so it can be sent and kept.

The tables are those of the terminal, the plots are embedded, and every assumption stands beside the numbers.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hammer.model.accounting import FLOP_CONVENTIONS, count_parameters
from megatron_hammer.scaling.report.decision import Decision
from megatron_hammer.scaling.report.projection_tables import (
    GIB,
    build_tables,
    describe_batch,
    describe_knee,
    describe_result,
    describe_study,
    format_amount,
    format_tokens,
    list_problems,
)
from megatron_hammer.scaling.search.projection import (
    StudyResult,
    describe_plan,
    estimate_bill,
    estimate_mfu_ratio,
    select_peak_tflops,
)

TEMPLATE_DIR = Path(__file__).resolve().parent
PLOT_TITLES = {
    "scaling": "Throughput and MFU over the number of GPUs, with the band that holds 80 % of measured steps",
    "breakdown": "Share of each part in the step time",
    "memory": "Estimated memory of one GPU of the heaviest pipeline stage",
}
MAX_LISTED = 8  # entries of a list in the provenance; longer ones are counted


def render_html_report(result: StudyResult, plots: Mapping[str, bytes], decision: Decision) -> str:
    """The page; plots: PNG bytes by the names of projection_plots.py."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        title=describe_study(result),
        decision=decision,
        summary=list_findings(result),
        problems=list_problems(result),
        tables=build_tables(result),
        plots=[
            {"title": PLOT_TITLES[name], "name": name, "data": base64.b64encode(image).decode("ascii")}
            for name, image in plots.items()
        ],
        assumptions=list_assumptions(result),
        sources=_list_sources(result),
        provenance=flatten_provenance(result.provenance),
        counts=describe_result(result),
    )


def list_findings(result: StudyResult) -> list[str]:
    """The main findings: the knee, and the plan at the knee and at the largest size."""
    findings = [describe_knee(result)]
    feasible = {size.num_gpus: size.best for size in result.sizes if size.best is not None}
    if result.knee is None:
        return findings
    for num_gpus in dict.fromkeys((result.knee.num_gpus, max(feasible))):
        best = feasible[num_gpus]
        letter = result.study.mfu_convention
        text = (
            f"{num_gpus:,} GPUs: {format_amount(best.step.total_s)} s per step "
            f"({format_amount(best.step.low_s)} to {format_amount(best.step.high_s)}), "
            f"{best.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU {estimate_mfu_ratio(best, letter):.1%} (convention "
            f"{letter}), with {describe_plan(best.plan)}."
        )
        if result.study.train_tokens is not None:
            price = result.study.usd_per_gpu_hour
            bill = estimate_bill(best, train_tokens=result.study.train_tokens, usd_per_gpu_hour=price)
            cost = "" if bill.cost_usd is None else f" and {format_amount(bill.cost_usd)} USD"
            text += (
                f" {format_tokens(result.study.train_tokens)} tokens take {format_amount(bill.days)} days "
                f"({format_amount(bill.low_days)} to {format_amount(bill.high_days)}) without failures, "
                f"{format_amount(bill.energy_mwh)} MWh{cost}."
            )
        findings.append(text)
    return findings


def list_assumptions(result: StudyResult) -> list[str]:
    """Every assumption behind the numbers."""
    study, cluster, gpu = result.study, result.study.cluster, result.study.gpu
    letter = study.mfu_convention
    peak = select_peak_tflops(gpu, study.precision)
    price = study.usd_per_gpu_hour
    return [
        f"Batch: {describe_batch(result)}; sequences of {study.seq_length:,} tokens without padding.",
        "A step is forward, backward, communication and optimizer on healthy machines. Start-up, evaluation, "
        "checkpoints, failures and waiting for data are not in it, nor in days, energy and cost. Only the decision and "
        "its options add failures and checkpoints.",
        f"MFU is in convention {letter}: {FLOP_CONVENTIONS[letter]}; of a dense peak of {peak:g} TFLOP/s "
        f"({study.precision}). Other conventions differ by up to 24 %.",
        _describe_band(result),
        f"A plan may need {study.memory_limit_bytes / GIB:.1f} GiB of a GPU's {gpu.memory_bytes / GIB:.1f} GiB, CUDA's "
        "own memory and fragmentation included as allowances.",
        "Attention is fused (flash attention). Tensor parallelism is with sequence parallelism. Gradients travel in "
        f"{study.gradient_bytes} bytes, and gradients and parameters beside computation where ranks share them.",
        f"Energy: {gpu.power_w:g} W per GPU at full load, {cluster.cpu_power_w_per_node:g} W for the rest of a node of "
        f"{cluster.gpus_per_node}, power usage effectiveness {cluster.power_usage_effectiveness:g}; an upper side, as "
        "waiting GPUs draw less.",
        "Cost: no price is known." if price is None else f"Cost: {price:g} USD per GPU-hour, for every GPU and hour.",
        "Every layout was considered that would start and fits in memory; the fastest of each family are shown. Left "
        "out: uneven stages beyond one for each pipeline size, FSDP together with pipeline stages, offloading that was "
        "not asked for.",
        f"The knee is the largest size up to which a GPU does at least {study.knee_ratio:.0%} of the best tokens/s/GPU "
        "of any smaller size.",
    ]


def _describe_band(result: StudyResult) -> str:
    """What the band means, how wide it is here, and the error of the coefficients on runs that they had not seen."""
    text = "The band holds 80 % of measured steps that the coefficients had not been fitted to"
    steps = [size.best.step for size in result.sizes if size.best is not None]
    if steps:
        low, high = steps[0].low_s / steps[0].total_s - 1, steps[0].high_s / steps[0].total_s - 1
        text += f"; for this GPU and precision {low:+.0%} to {high:+.0%}"
    error = result.provenance.get("cross_validated_median_ratio")
    if error is None:
        return f"{text}. The coefficients file states no error on runs that it had not seen."
    return f"{text}. The median error of the step time on such runs, each source left out in turn, is {error:.1%}."


def _list_sources(result: StudyResult) -> list[tuple[str, str]]:
    study = result.study
    origin = f"preset {study.preset}" if study.preset else str(study.hf_config)
    return [
        (f"Model {study.model.name} ({count_parameters(study.model):,} parameters)", f"{origin}: {study.model.source}"),
        (f"GPU {study.gpu.name}", study.gpu.source),
        (f"Cluster {study.cluster.name}", study.cluster.source),
    ]


def flatten_provenance(provenance: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, words) of every entry of a coefficients file's provenance; long lists are counted."""
    rows: list[tuple[str, str]] = []
    for name, value in provenance.items():
        words = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flatten_provenance(value, f"{prefix}{name}: ")
        elif isinstance(value, list | tuple):
            is_long = len(value) > MAX_LISTED
            rows.append((words, f"{len(value)} entries" if is_long else ", ".join(str(entry) for entry in value)))
        else:
            rows.append(_describe_value(words, value))
    return rows


def _describe_value(words: str, value: Any) -> tuple[str, str]:
    """A ratio in per cent, a number with four digits, everything else unchanged."""
    if isinstance(value, float) and words.endswith(" ratio"):
        return words.removesuffix(" ratio"), f"{value:.1%}"
    return words, f"{value:.4g}" if isinstance(value, float) else str(value)
