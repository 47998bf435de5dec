#!/usr/bin/env python3
"""One command on a machine with a GPU: is training right there, how fast is it, and where does its time go?

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --rehearse --output rehearsal.json

In this order, within --minutes:

1. Losses and gradients of both backends, bf16 and fp32, against the CPU's in fp32, from one checkpoint
   (on_gpu/gradients).
2. The ceiling: the model's matrix products alone, and a copy (on_gpu/ceiling).
3. The sweep: each row is a training run of hammer-1b4, with our launcher and Megatron's loop, or the same shape in
   transformers with torch.compile (on_gpu/setting, on_gpu/transformers_loop). A row that fails is reported with its
   reason. Rows that matter most come first, and those for which no time is left are reported as not run.
4. The time of the best row by kernel class (on_gpu/trace).

The JSON is written after every part, so a run that is stopped keeps what it has. --rehearse runs every part with
hammer-tiny on the CPU, where no figure means anything. Exit code 1: a check of losses and gradients failed.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone, wherever this is started

from on_gpu import report, trace
from on_gpu.processes import LAUNCH, run_python
from on_gpu.setting import Row, Setting, build_setting, write_data

from megatron_hammer.files.publish import publish_files

ROW_TIMEOUT_S = 150.0
PROFILE_S = 75.0  # kept for the profile of the best row, whose trace takes as long to write as its steps
CEILING_SECONDS = 0.1  # of each product


@dataclass(kw_only=True, slots=True)
class Session:
    """One run of this command: what is measured where, until when, and what is known so far."""

    setting: Setting
    work_dir: Path
    output: Path
    deadline_s: float
    result: dict[str, Any]

    @property
    def remaining_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def find_lack(self, backend: str) -> str | None:
        """Why a backend cannot run here: its many rows need not be started to find that out, at seconds each."""
        failure = self.result["about"].get("te_failure")
        return f"TransformerEngine does not work here: {failure}" if backend == "te" and failure else None

    def save(self) -> None:
        publish_files({self.output: json.dumps(self.result, indent=1) + "\n"})

    def run_side(self, side: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
        """A part that needs a process of its own; its JSON, or {"reason": why there is none}."""
        rehearsal = ["--rehearse"] if self.setting.platform == "cpu" else []
        answer_path = self.work_dir / "answer.json"  # not stdout: training diverts it
        command = [str(Path(__file__).resolve()), *rehearsal, "--side", side, "--output", str(answer_path), *arguments]
        ended = run_python(command, timeout_s=min(timeout_s, self.remaining_s))
        if ended.reason is not None:
            return {"reason": ended.reason}
        answer: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf8"))
        return answer


def check_gradients(session: Session) -> None:
    from on_gpu import gradients  # torch, which --help need not wait for

    setting, checks = session.setting, session.result["checks"]
    reason = gradients.record_reference(setting, session.work_dir, session.remaining_s)
    for check in setting.checks:
        lack = session.find_lack(check.backend)
        if lack is not None:
            checks.append({"backend": check.backend, "precision": check.precision, "passed": False, "reason": lack})
        elif reason is None:
            checks.append(gradients.run_check(setting, check, session.work_dir, session.remaining_s))
        else:
            reason = f"the reference failed: {reason}"
            checks.append({"backend": check.backend, "precision": check.precision, "passed": False, "reason": reason})
        session.save()


def measure_ceiling(session: Session) -> None:
    session.result["ceiling"] = session.run_side("ceiling", timeout_s=ROW_TIMEOUT_S)
    session.save()


def sweep(session: Session) -> None:
    """Run the rows while time is left; each takes about as long as the longest before it."""
    rows = session.setting.rows
    plans = session.run_side("plan", timeout_s=ROW_TIMEOUT_S)
    longest_s = 0.0
    for row in rows:
        entry: dict[str, Any] = {"name": row.name, **asdict(row)}
        if session.remaining_s - PROFILE_S < longest_s:
            entry |= {"status": "not run", "reason": "no time was left for it"}
        else:
            started_at_s = time.monotonic()
            entry |= run_row(session, row, plans.get(row.name, {}))
            entry["wall_s"] = time.monotonic() - started_at_s
            longest_s = max(longest_s, entry["wall_s"] if entry["status"] == "measured" else 0.0)
        session.result["rows"].append(entry)
        session.save()
        print(f"{row.name}: {entry['status']} {entry.get('reason', '')}", file=sys.stderr)


def run_row(session: Session, row: Row, plan: dict[str, Any]) -> dict[str, Any]:
    """A row's figures, or why it has none."""
    lack = session.find_lack(row.backend)
    if lack is not None:
        return {"status": "failed", "reason": lack}
    ceiling = session.result["ceiling"]
    known = {**plan, "ceiling_tflops": ceiling.get("tflops")}
    if row.backend == "transformers":
        run = session.run_side(
            "transformers", str(session.work_dir / "data"), str(row.micro_batch_size), timeout_s=ROW_TIMEOUT_S
        )
    else:
        metrics_path = session.work_dir / f"metrics-{len(session.result['rows'])}.jsonl"
        flags = session.setting.list_row_flags(row, session.work_dir / "data")
        command = [*LAUNCH, *flags, "--metrics-path", str(metrics_path)]
        ended = run_python(command, timeout_s=min(ROW_TIMEOUT_S, session.remaining_s))
        run = {"reason": ended.reason} if ended.reason else report.read_run(metrics_path)
    if "reason" in run:
        return {"status": "failed", "reason": run["reason"]}
    peak_tflops = run.get("peak_tflops") or session.result["about"]["peak_tflops"]
    return report.build_row(session.setting, row, run, known | {"peak_tflops": peak_tflops})


def profile_best(session: Session) -> None:
    best = report.select_best(session.result["rows"])
    if best is None:
        return
    row = Row(backend=best["backend"], micro_batch_size=best["micro_batch_size"], flags=tuple(best["flags"]))
    flags = session.setting.list_row_flags(row, session.work_dir / "data")
    output_dir = session.work_dir / "profile"
    shares = session.run_side(
        "profile",
        str(output_dir),
        *flags,
        *trace.profile_flags(output_dir, session.setting.warmup_steps),
        timeout_s=ROW_TIMEOUT_S,
    )
    session.result["profile"] = {"name": row.name, **(shares if "reason" in shares else {"shares": shares})}
    session.save()


# --- parts with a process of their own ------------------------------------------------------------------------------


def run_part(setting: Setting, side: str, output: Path, arguments: Sequence[str]) -> None:
    """Run one part, and write what it found as JSON."""
    if side == "gradients":
        from on_gpu import gradients

        platform, *flags = arguments
        gradients.record(platform, output, flags)
        return
    if side == "profile":
        output_dir, *flags = arguments
        trace.run_traced(setting.platform, flags)
        answer: Any = trace.summarize(trace.find_trace(Path(output_dir)))
    elif side == "about":
        answer = describe_machine(setting)
    elif side == "plan":
        answer = plan_rows(setting)
    elif side == "ceiling":
        from on_gpu import ceiling

        micro_batch_size = max(row.micro_batch_size for row in setting.rows[:4])
        num_tokens = micro_batch_size * setting.recipe.seq_length
        dtype = setting.recipe.precision
        answer = ceiling.measure(setting.model, setting.platform, num_tokens, dtype, CEILING_SECONDS)
    else:
        from on_gpu import transformers_loop

        data_prefix, micro_batch_size_text = arguments
        answer = transformers_loop.measure(setting, Path(data_prefix), int(micro_batch_size_text))
    output.write_text(json.dumps(answer), encoding="utf8")


def describe_machine(setting: Setting) -> dict[str, Any]:
    import torch

    from megatron_hammer.platforms.device import read_device_memory_bytes, read_device_name
    from megatron_hammer.platforms.gpu_peaks import find_dense_peak_tflops
    from megatron_hammer.platforms.select import find_te_failure

    device = read_device_name(setting.platform)
    te_failure = find_te_failure()
    return {
        "device": device,
        "memory_bytes": read_device_memory_bytes(setting.platform),
        "peak_tflops": find_dense_peak_tflops(device),
        "torch": torch.__version__,
        "te": None if te_failure else importlib.metadata.version("transformer-engine"),
        "te_failure": te_failure,
        "preset": setting.preset,
        "global_batch_size": setting.global_batch_size,
    }


def plan_rows(setting: Setting) -> dict[str, Any]:
    """The memory model's peak of each row that can be planned, as torch's allocator counts it."""
    from megatron_hammer.config.preflight.memory import estimate_run_memory
    from megatron_hammer.errors import HammerError
    from megatron_hammer.training import pretrain

    plans = {}
    for row in setting.rows:
        if row.backend == "transformers":
            continue
        flags = [*setting.list_row_flags(row, Path("data")), "--world-size", "1"]
        try:
            plan = pretrain.prepare(flags, is_plan=True).require_plan()
        except HammerError:
            continue  # its own run says why
        plans[row.name] = {"estimated_bytes": max(stage.allocated_bytes for stage in estimate_run_memory(plan))}
    return plans


# --- entry ----------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON of everything (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="hammer-tiny on the CPU: whether every part runs")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(setting: Setting, output: Path, minutes: float) -> dict[str, Any]:
    """All parts; the result is also in `output`, after every part."""
    deadline_s = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"checks": [], "ceiling": {}, "rows": [], "profile": None}
        session = Session(setting=setting, work_dir=Path(folder), output=output, deadline_s=deadline_s, result=result)
        num_sequences = (setting.warmup_steps + setting.steps + 1) * setting.global_batch_size
        num_tokens = num_sequences * (setting.recipe.seq_length + 1)
        write_data(session.work_dir / "data", num_tokens=num_tokens, vocab_size=setting.num_token_ids)
        result["about"] = {"peak_tflops": None, "te": None, "torch": "", "device": "unknown"}
        result["about"] |= session.run_side("about", timeout_s=ROW_TIMEOUT_S)
        for part in (check_gradients, measure_ceiling, sweep, profile_best):
            part(session)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    setting = build_setting(is_rehearsal=arguments.rehearse)
    if arguments.side:
        run_part(setting, arguments.side, arguments.output, arguments.arguments)
        return
    result = measure(setting, arguments.output, arguments.minutes)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        report.print_result(result)
    if not all(check["passed"] for check in result["checks"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
