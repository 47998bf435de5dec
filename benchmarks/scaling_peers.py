#!/usr/bin/env python3
"""Calculon's predictions beside ours, of the same published runs, in one run.

    git clone https://github.com/calculon-ai/calculon ../calculon
    python benchmarks/scaling_peers.py --calculon ../calculon

Both predict every dense Megatron-style run on the A100 and H100 with 80 GB, for which Calculon ships systems. Ours are
cross-validated by recipe: no fit has seen a run or a near copy. A run is compared only if both predict it; a run that
one of them cannot take is counted with its reason. Calculon has no input for SwiGLU and for the output layer: the width
of its feed-forward network carries their FLOPs. It takes grouped queries as multi-head attention. Both make its errors
smaller. Runs that exceed the memory it counts are predicted with more memory, and their number is printed.
"""

import argparse
import importlib
import json
import logging
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_hammer.files.tables import format_markdown_table
from megatron_hammer.scaling.evidence.validation import Prediction, cross_validate_runs
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_RUNS_PATH

SYSTEMS = {"a100-sxm-80gb": "a100_80g.json", "h100-sxm": "h100_80g_nvl8.json"}
GPUS_OF_A_NODE = 8  # the size of the first network of these systems
RECOMPUTE = {"none": "none", "selective": "attn_only", "full": "full"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One run as measured, and as both predict it. Calculon's is None if it was refused."""

    row_number: int
    source: str
    model: str
    gpu: str
    measured_s: float
    ours_s: float
    calculon_s: float | None
    refusal: str = ""  # by Calculon
    exceeds_memory: bool = False  # of Calculon's count


class RefusedError(Exception):
    """Calculon cannot take a run; the text is the reason."""


def main() -> None:
    """Print the table in Markdown, or all rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calculon", type=Path, required=True, metavar="FOLDER", help="a clone of calculon-ai/calculon"
    )
    parser.add_argument("--json", action="store_true", help="every row and the table as JSON")
    arguments = parser.parse_args()
    if not (arguments.calculon / "calculon" / "llm").is_dir():
        parser.error(f"--calculon: must be a clone of calculon-ai/calculon, got {arguments.calculon}. Clone it there.")
    sys.path.insert(0, str(arguments.calculon))
    calculon = importlib.import_module("calculon.llm")  # found there, not installed
    runs, unpredictable = read_runs(PUBLISHED_RUNS_PATH)
    announce = partial(print, file=sys.stderr, flush=True)
    report = cross_validate_runs([run for run in runs if run.is_megatron_style], [], announce)
    rows = [compare(one, calculon, arguments.calculon) for one in report.predictions if is_compared(one.run)]
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "table": build_table(rows)}, indent=2))
        return
    print(format_markdown_table(COLUMNS, build_table(rows)))
    for reason, number in Counter(row.refusal for row in rows if row.refusal).most_common():
        print(f"{number} not taken by Calculon: {reason}")
    print(f"{sum(row.exceeds_memory for row in rows)} predicted with more memory than the GPU has, by Calculon's count")
    refused = sum(row.is_megatron_style for row in unpredictable)
    print(f"{refused} Megatron-style rows of the table not taken by ours; the others ran on other GPUs")


def is_compared(run: MeasuredRun) -> bool:
    """The filter for both: a dense model on a GPU for which Calculon ships a system."""
    return run.plan.gpu.name in SYSTEMS and run.plan.model.moe is None


def compare(one: Prediction, calculon: ModuleType, folder: Path) -> Comparison:
    run, seconds, refusal, exceeds_memory = one.run, None, "", False
    try:
        seconds, exceeds_memory = predict(run.plan, calculon, folder)
    except RefusedError as error:
        refusal = str(error)
    return Comparison(
        row_number=run.row_number,
        source=run.source,
        model=run.model,
        gpu=run.plan.gpu.name,
        measured_s=run.step_time_s,
        ours_s=one.step.total_s,
        calculon_s=seconds,
        refusal=refusal,
        exceeds_memory=exceeds_memory,
    )


def predict(plan: Plan, calculon: ModuleType, folder: Path) -> tuple[float, bool]:
    """(Calculon's seconds per step, whether its own memory count refuses the run). Raises RefusedError."""
    if plan.layout.context_parallel_size > 1:
        raise RefusedError("context parallelism")
    if plan.sharding == "fsdp":
        raise RefusedError("FSDP")
    system = json.loads((folder / "systems" / SYSTEMS[plan.gpu.name]).read_text(encoding="utf-8"))
    # The systems list one 16-bit and one 8-bit format.
    datatype = "float8" if plan.precision.startswith("fp8") else "float16" if "16" in plan.precision else plan.precision
    if datatype not in system["matrix"]:
        raise RefusedError(f"precision {plan.precision}")
    application, execution = describe_application(plan), describe_execution(plan, datatype)
    try:
        return run_calculon(calculon, application, execution, system), False
    except (AssertionError, calculon.Llm.Error) as error:
        if "Mem tier1" not in str(error):
            raise RefusedError(str(error) or "an assertion without a message") from error
    system["mem1"]["GiB"] = 1_000_000
    try:
        return run_calculon(calculon, application, execution, system), True
    except (AssertionError, calculon.Llm.Error) as error:
        raise RefusedError(str(error) or "an assertion without a message") from error


def run_calculon(calculon: ModuleType, application: dict[str, Any], execution: dict[str, Any], system: Any) -> float:
    model = calculon.Llm(calculon.Llm.Application(application), logging.getLogger("calculon"))
    machine = calculon.System(system)
    model.compile(machine, calculon.Llm.Execution.from_json(execution))
    model.run(machine)
    return float(model.get_total_time())


def describe_application(plan: Plan) -> dict[str, int]:
    """The model as Calculon knows them: multi-head attention, two matrices of a feed-forward network, no output layer.

    The width of the feed-forward network carries what it has no input for, so that the FLOPs are those of the run.
    """
    model, tp = plan.model, plan.layout.tensor_model_parallel_size
    num_matrices = 3 if "swiglu" in model.activation else 2
    width = model.ffn_hidden_size * num_matrices / 2
    # The V h weights of the output layer, over the layers' 2 h weights per column.
    width += model.vocab_size / (2 * model.num_layers)
    return {
        "hidden": model.hidden_size,
        "feedforward": max(1, round(width / tp)) * tp,
        "seq_size": plan.seq_length,
        "attn_heads": model.num_attention_heads,
        "attn_size": model.head_dim,
        "num_blocks": model.num_layers,
    }


def describe_execution(plan: Plan, datatype: str) -> dict[str, Any]:
    layout = plan.layout
    tp, pp, dp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size
    has_sequence_parallel = tp > 1 and layout.has_sequence_parallel
    return {
        "num_procs": tp * pp * dp,
        "tensor_par": tp,
        "pipeline_par": pp,
        "data_par": dp,
        # The first network is NVLink. Tensor ranks are neighbours, then data ranks, then pipeline stages.
        "tensor_par_net": int(tp > GPUS_OF_A_NODE),
        "data_par_net": int(tp * dp > GPUS_OF_A_NODE),
        "pipeline_par_net": int(tp * dp * pp > GPUS_OF_A_NODE),
        "batch_size": plan.global_batch_size,
        "microbatch_size": plan.micro_batch_size,
        "datatype": datatype,
        "fused_activation": plan.has_flash_attention,  # both are of the same years
        "attention_type": "multihead",
        "activation_recompute": RECOMPUTE[plan.recompute],
        "pipeline_interleaving": layout.virtual_pipeline_model_parallel_size,
        "optimizer_sharding": plan.sharding == "distributed_optimizer" and dp > 1,
        "tensor_par_comm_type": "rs_ag" if has_sequence_parallel else "ar",
        "tensor_par_overlap": "ring" if plan.overlaps_tensor_parallel and tp > 1 else "none",
        # Megatron gathers again in the backward pass.
        "seq_par_ag_redo": has_sequence_parallel and plan.recompute != "full",
        "data_par_overlap": plan.overlaps_grad_reduce and dp > 1,
        "weight_offload": False,
        "activations_offload": False,
        "optimizer_offload": False,
        "training": True,
    }


COLUMNS = ("runs", "both", "not Calculon", "Calculon median", "mean", "bias", "ours median", "mean", "bias")


def build_table(rows: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Errors of both on the runs that both predict, by GPU and in all."""
    groups = {gpu: [row for row in rows if row.gpu == gpu] for gpu in SYSTEMS} | {"both GPUs": rows}
    table = []
    for name, group in groups.items():
        pairs = [(row.calculon_s / row.measured_s, row.ours_s / row.measured_s) for row in group if row.calculon_s]
        errors = [cell for ratios in zip(*pairs, strict=True) for cell in format_errors(ratios)]
        table.append((name, str(len(pairs)), str(len(group) - len(pairs)), *errors))
    return table


def format_errors(ratios: Sequence[float]) -> tuple[str, str, str]:
    """Median and mean of the absolute errors, and the median with its sign, of predicted over measured times."""
    errors = [ratio - 1 for ratio in ratios]
    sizes = [abs(error) for error in errors]
    return (
        f"{statistics.median(sizes):.1%}",
        f"{statistics.fmean(sizes):.1%}",
        f"{statistics.median(errors):+.1%}",
    )


if __name__ == "__main__":
    main()
