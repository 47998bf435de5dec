"""The results of a finished run of a sweep: its step times without the warm-up, and its row of runs.csv.

The columns are those of the published tables, so `calibrate` and `validate` read both. Two more columns at the end have
the use of sequence parallelism and the expert-parallel size.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.errors import DataError
from megatron_hammer.files.csv_table import format_csv
from megatron_hammer.model.accounting import FLOP_CONVENTIONS, count_flops_per_token, count_parameters
from megatron_hammer.scaling.measured.sweep import Setting
from megatron_hammer.scaling.metrics_file import read_metrics

COLUMNS = (
    *("source", "model", "params_B", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gpus"),
    *("gpu_type", "tp", "pp", "vpp", "cp", "dp", "micro_batch", "global_batch", "precision", "recompute"),
    *("iteration_time_s", "tflops_per_gpu", "mfu", "tokens_per_s_per_gpu", "sharding", "mfu_definition"),
    *("derived_fields", "provenance", "notes", "sequence_parallel", "ep"),
)
Statistic = Literal["median", "fastest"]
CONVENTION: Literal["A"] = "A"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds per step after the warm-up. low and high enclose the middle 80 %."""

    num_steps: int
    num_warmup_steps: int
    median_s: float
    fastest_s: float
    low_s: float
    high_s: float
    peak_memory_bytes: int  # of the rank that needed the most, over all steps


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSetting:
    """One setting and the step times of each of its repeats."""

    setting: Setting
    repeats: tuple[StepTimes, ...]

    def step_time_s(self, statistic: Statistic) -> float:
        """median: of the repeats' medians. fastest: the shortest step of all, for a busy machine.

        One rank measures the times. If data-parallel ranks drift apart, a step that this rank began late is too short.
        """
        if statistic == "fastest":
            return min(times.fastest_s for times in self.repeats)
        return statistics.median(times.median_s for times in self.repeats)


def read_step_times(metrics_path: Path, *, num_steps: int, num_warmup_steps: int) -> StepTimes:
    """Raises DataError unless the file holds exactly the steps 1 to num_steps, each once and with a time."""
    lines = read_metrics(metrics_path, "step", "step_time_s")
    steps = [line["step"] for line in lines]
    if steps != list(range(1, num_steps + 1)):
        raise DataError(
            f"{metrics_path}: must hold steps 1 to {num_steps}, got {len(steps)} lines ending with step "
            f"{steps[-1] if steps else 'none'}. Run the setting again."
        )
    times_s = [line["step_time_s"] for line in lines[num_warmup_steps:]]
    deciles = statistics.quantiles(times_s, n=10, method="inclusive") if len(times_s) > 1 else [times_s[0]] * 9
    return StepTimes(
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
        median_s=statistics.median(times_s),
        fastest_s=min(times_s),
        low_s=deciles[0],
        high_s=deciles[-1],
        peak_memory_bytes=max(line.get("peak_memory_bytes", 0) for line in lines),
    )


def build_row(measured: MeasuredSetting, *, gpu_type: str, source: str, statistic: Statistic) -> dict[str, Any]:
    """One row of runs.csv. Throughput is computed from the time, TFLOP/s in convention A. MFU stays blank."""
    setting, step_time_s = measured.setting, measured.step_time_s(statistic)
    model, layout = setting.preset.model, setting.layout
    tokens_per_s_per_gpu = setting.global_batch_size * setting.seq_length / step_time_s / layout.world_size
    flops_per_token = count_flops_per_token(model, setting.seq_length, CONVENTION)
    vp = layout.virtual_pipeline_model_parallel_size
    return {
        "source": source,
        "model": model.name,
        "params_B": f"{count_parameters(model) / 1e9:.6g}",
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": model.num_attention_heads,
        "kv_heads": model.num_query_groups,
        "ffn": model.ffn_hidden_size,
        "vocab": model.vocab_size,
        "seq": setting.seq_length,
        "gpus": layout.world_size,
        "gpu_type": gpu_type,
        "tp": layout.tensor_model_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "vpp": vp if vp > 1 else "",
        "cp": layout.context_parallel_size,
        "dp": layout.data_parallel_size,
        "micro_batch": setting.micro_batch_size,
        "global_batch": setting.global_batch_size,
        "precision": setting.precision,
        "recompute": setting.recompute,
        "iteration_time_s": f"{step_time_s:.6g}",
        "tflops_per_gpu": f"{tokens_per_s_per_gpu * flops_per_token / 1e12:.6g}",
        "mfu": "",
        "tokens_per_s_per_gpu": f"{tokens_per_s_per_gpu:.6g}",
        "sharding": "distributed optimizer" if layout.has_distributed_optimizer else "none",
        "mfu_definition": f"{CONVENTION}: {FLOP_CONVENTIONS[CONVENTION]}",
        "derived_fields": "tflops_per_gpu;tokens_per_s_per_gpu",
        "provenance": "tools/scaling_study.py measure",
        "notes": describe_spread(measured, statistic),
        "sequence_parallel": "yes" if layout.has_sequence_parallel else "no",
        "ep": layout.expert_model_parallel_size,
    }


def describe_spread(measured: MeasuredSetting, statistic: Statistic) -> str:
    """median of 2 x 15 steps; 80 % of the steps of a repeat within 1.210 to 1.280 s; fastest 1.190 s"""
    first = measured.repeats[0]
    low_s, high_s = min(t.low_s for t in measured.repeats), max(t.high_s for t in measured.repeats)
    num_steps = first.num_steps - first.num_warmup_steps
    return (
        f"{statistic} of {len(measured.repeats)} x {num_steps} steps; 80 % of the steps of a repeat within "
        f"{low_s:.4g} to {high_s:.4g} s; fastest {min(t.fastest_s for t in measured.repeats):.4g} s"
    )


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The text of runs.csv."""
    return format_csv(COLUMNS, [[row.get(column) for column in COLUMNS] for row in rows])
