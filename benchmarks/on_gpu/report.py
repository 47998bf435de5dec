"""The figures of a row from what its run measured, and the tables of a whole result. No torch here."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.files.tables import build_table, open_console
from megatron_hammer.model.accounting import count_flops_per_token
from megatron_hammer.model.byte_units import GIB
from on_gpu.setting import Row, Setting

CONVENTIONS = ("A", "D")  # of megatron_hammer/model/flops.py


def build_row(setting: Setting, row: Row, run: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """run: losses, times_s and peak_memory_bytes of all steps. plan: peak_tflops and ceiling_tflops of the GPU, where
    known, and estimated_bytes.

    The median of the steps after the warm-up is what counts. MFU is model FLOP/s by the GPU's dense peak;
    share_of_ceiling is FLOP/s of convention A by what the matrix products alone reached here.
    """
    step_s = statistics.median(run["times_s"][setting.warmup_steps :])
    seq_length = setting.recipe.seq_length
    tokens_per_s = max(setting.global_batch_size, row.micro_batch_size) * seq_length / step_s
    tflops = {
        name: tokens_per_s * count_flops_per_token(setting.model, seq_length, name) / 1e12 for name in CONVENTIONS
    }
    peak, ceiling, estimate = (plan.get(name) for name in ("peak_tflops", "ceiling_tflops", "estimated_bytes"))
    return {
        "status": "measured",
        "step_time_s": step_s,
        "step_times_s": list(run["times_s"]),
        "losses": list(run["losses"]),
        "tokens_per_s": tokens_per_s,
        "model_tflops": tflops,
        "mfu": {name: value / peak for name, value in tflops.items()} if peak else None,
        "share_of_ceiling": tflops["A"] / ceiling if ceiling else None,
        "peak_memory_bytes": run["peak_memory_bytes"],
        "estimated_bytes": estimate,
        "estimated_to_measured": estimate / run["peak_memory_bytes"] if estimate else None,
    }


def read_run(metrics_path: Path) -> dict[str, Any]:
    """What training wrote about itself."""
    steps = [json.loads(line) for line in metrics_path.read_text(encoding="utf8").splitlines()]
    return {
        "losses": [step["loss"] for step in steps],
        "times_s": [step["step_time_s"] for step in steps],
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "peak_tflops": steps[0]["peak_tflops"],
    }


def select_best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The measured row of ours with most tokens per second."""
    ours = [row for row in rows if row["status"] == "measured" and row["backend"] != "transformers"]
    return max(ours, key=lambda row: row["tokens_per_s"], default=None)


def print_result(result: Mapping[str, Any]) -> None:
    console = open_console()
    about = result["about"]
    console.print(f"{about['device']}, torch {about['torch']}, TransformerEngine {about['te'] or 'none'}")
    console.print(build_table("losses and gradients against the CPU in fp32", *_check_table(result["checks"])))
    if result.get("ceiling"):
        console.print(build_table("matrix products and copies alone", *_ceiling_table(result["ceiling"])))
    columns = (
        "run", "MFU A", "MFU D", "of ceiling", "tokens/s", "step s", "GiB", "estimated", "reason",
    )  # fmt: skip
    console.print(build_table("training", columns, [_list_cells(row) for row in result["rows"]]))
    profile = result.get("profile")
    if profile:
        shares = [(name, f"{share:.1%}") for name, share in profile.get("shares", {}).items()]
        title = f"time by kernel class: {profile['name']}"
        console.print(build_table(title, ("class", "share"), shares or [("", profile["reason"])]))


def _check_table(checks: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    columns = ("backend", "loss", "gradient norm", "worst gradient", "bounds", "passed", "reason")
    rows = []
    for check in checks:
        measured, bounds = check.get("differences", {}), check.get("bounds", {})
        cells = (f"{measured[name]:.1e}" if name in measured else "" for name in ("loss", "grad_norm", "gradient"))
        of_bounds = ", ".join(f"{bound:.0e}" for bound in bounds.values())
        name = f"{check['backend']} {check['precision']}"
        rows.append((name, *cells, of_bounds, "yes" if check["passed"] else "NO", check["reason"] or ""))
    return columns, rows


def _ceiling_table(ceiling: Mapping[str, Any]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    if "reason" in ceiling:
        return ("", ""), [("failed", ceiling["reason"])]
    rows = [(f"{p['product']} {p['direction']}", f"{p['tflops']:.4g}") for p in ceiling["products"]]
    rows.append((f"all, of a micro-batch of {ceiling['num_tokens']} tokens", f"{ceiling['tflops']:.4g}"))
    rows.append(("copy, GB/s", f"{ceiling['copy_gb_per_s']:.4g}"))
    return (f"{ceiling['dtype']} product", "TFLOP/s"), rows


def _list_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["status"] != "measured":
        return (row["name"], *[""] * 7, f"{row['status']}: {row['reason']}")
    mfu, share, ratio = row["mfu"] or {}, row["share_of_ceiling"], row["estimated_to_measured"]
    return (
        row["name"],
        *(f"{mfu[name]:.1%}" if mfu else "" for name in CONVENTIONS),
        f"{share:.1%}" if share else "",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['step_time_s']:.3f}",
        f"{row['peak_memory_bytes'] / GIB:.1f}",
        f"{ratio:.3f}" if ratio else "",
        "",
    )
