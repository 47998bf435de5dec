"""Where the time of a training step goes, by kernel class: a traced run, and its trace read.

Most kernels do not say whom they work for: an exponential may belong to the loss, a multiplication to RoPE. So the
traced run marks the model's parts as they are called (`mark_parts`). A kernel belongs to the part inside which its
operator was called. One of the backward pass belongs to the part of the forward operator that has its sequence number.
What no part claims is classified by its name.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

CLASSES = (
    "matmul", "attention", "loss", "norm", "rope", "elementwise", "optimizer", "communication", "copies",
)  # fmt: skip
# Of kernels and operators, the first that fits. These four are known by name wherever they are called.
NAMED_FIRST = {
    "communication": re.compile(r"nccl|c10d|all_?reduce|reduce_scatter|all_?gather", re.IGNORECASE),
    "attention": re.compile(r"flash|fmha|sdpa|scaled_dot_product|attention", re.IGNORECASE),
    "matmul": re.compile(r"gemm|nvjet|cutlass|cublas|xmma|aten::(?:mm|addmm|bmm|baddbmm)\b", re.IGNORECASE),
    "copies": re.compile(r"^mem(?:cpy|set)", re.IGNORECASE),
}  # fmt: skip
NAMED_LAST = {
    "optimizer": re.compile(r"adam|multi_tensor|foreach", re.IGNORECASE),
    # The names that begin with _ are of our own kernels in model/, as far as no other pattern fits them.
    "loss": re.compile(r"cross_?entropy|softmax|nll_loss|^_(?:reduce_row|write_row_gradient)", re.IGNORECASE),
    "norm": re.compile(r"rms_?norm|layer_?norm|norm_(?:fwd|bwd|forward|backward)", re.IGNORECASE),
    "rope": re.compile(r"rope|rotary", re.IGNORECASE),
    "copies": re.compile(r"copy|aten::(?:cat|clone|contiguous|fill_|zero_|index)|CatArray|FillFunctor", re.IGNORECASE),
}
PART = "part:"  # in front of a marked part's class, as the trace names it
BACKWARD = "autograd::engine::evaluate_function"  # one node of the backward pass
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
NUM_STEPS = 2  # traced ones


def profile_flags(output_dir: Path, warmup_steps: int) -> list[str]:
    """Megatron's own profiler, which writes its trace beside the folder for TensorBoard."""
    first_step = warmup_steps
    return [
        *("--profile", "--use-pytorch-profiler", "--tensorboard-dir", str(output_dir / "tensorboard")),
        *("--profile-step-start", str(first_step), "--profile-step-end", str(first_step + NUM_STEPS)),
    ]


def find_trace(output_dir: Path) -> Path:
    return output_dir / "torch_profile" / "rank-0.json.gz"


def run_traced(platform: str, flags: Sequence[str]) -> None:
    """Run training with the model's parts marked in the trace."""
    from on_gpu.processes import adjust_megatron

    adjust_megatron(platform, flags)
    mark_parts()
    from megatron_hammer.training import pretrain

    pretrain.main(flags)


def mark_parts() -> None:
    import torch
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.transformer import attention

    from megatron_hammer.model.provider import HammerGPTModel

    def mark(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(PART + part):
                return function(*args, **kwargs)

        setattr(owner, name, marked)

    mark(HammerGPTModel, "compute_language_model_loss", "loss")
    mark(attention, "apply_rotary_pos_emb", "rope")
    for norm in (torch.nn.RMSNorm, torch.nn.LayerNorm):
        mark(norm, "forward", "norm")
    mark(ChainedOptimizer, "step", "optimizer")


# --- reading a trace ------------------------------------------------------------------------------------------------


def summarize(trace_path: Path) -> dict[str, float]:
    """Share of each class in the time of all kernels (on a CPU: of all operators, each without those it calls)."""
    with gzip.open(trace_path, "rt", encoding="utf8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    operators = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    parts, self_us = find_parts(operators)
    kernels = [event for event in events if event.get("cat") in GPU_CATEGORIES]
    totals = dict.fromkeys(CLASSES, 0.0)
    if kernels:
        part_by_id = {read_id(operator): part for operator, part in zip(operators, parts, strict=True)}
        for kernel in kernels:
            totals[classify(kernel["name"], part_by_id.get(read_id(kernel)))] += kernel["dur"]
    else:
        for operator, part, duration_us in zip(operators, parts, self_us, strict=True):
            if operator["cat"] == "cpu_op":
                totals[classify(operator["name"], part)] += duration_us
    total = sum(totals.values())
    return {name: us / total for name, us in totals.items()} if total else totals


def classify(name: str, part: str | None) -> str:
    """The class of one kernel or operator; part: the marked one that it belongs to."""
    for kernel_class, pattern in NAMED_FIRST.items():
        if pattern.search(name):
            return kernel_class
    if part is not None:
        return part
    return next((kernel_class for kernel_class, pattern in NAMED_LAST.items() if pattern.search(name)), "elementwise")


def read_id(event: dict[str, Any]) -> Any:
    """What links a kernel to the operator that launched it."""
    return event.get("args", {}).get("External id")


def find_parts(operators: Sequence[dict[str, Any]]) -> tuple[list[str | None], list[float]]:
    """The marked part of every operator, and its microseconds without the operators that it calls."""
    parts: list[str | None] = [None] * len(operators)
    self_us = [float(operator["dur"]) for operator in operators]
    by_thread: dict[Any, list[int]] = defaultdict(list)
    for index in sorted(range(len(operators)), key=lambda i: (operators[i]["ts"], -operators[i]["dur"])):
        by_thread[operators[index]["tid"]].append(index)
    callers = {called: caller for indices in by_thread.values() for caller, called in list_calls(operators, indices)}
    for called, caller in callers.items():
        self_us[caller] -= operators[called]["dur"]
    part_by_sequence: dict[int, str | None] = {}
    # Twice: on a GPU the backward pass has a thread of its own, and it may come first in the file.
    for _ in range(2):
        for indices in by_thread.values():
            for index in indices:  # a caller comes before what it calls
                caller = callers.get(index)
                of_caller = None if caller is None else parts[caller]
                parts[index] = find_part(operators[index], of_caller, part_by_sequence)
    return parts, self_us


def find_part(operator: dict[str, Any], of_caller: str | None, part_by_sequence: dict[int, str | None]) -> str | None:
    """Of its own mark, else of its forward operator, else of its caller; keeps what a forward operator belongs to.

    Several operators may have one sequence number: the last of them made the node of the backward pass.
    """
    if operator["name"].startswith(PART):
        return operator["name"].removeprefix(PART)
    sequence = operator.get("args", {}).get("Sequence number")
    if operator["name"].startswith(BACKWARD):
        return part_by_sequence.get(sequence)
    if sequence is not None and not operator["args"].get("Fwd thread id"):
        part_by_sequence[sequence] = of_caller
    return of_caller


def list_calls(operators: Sequence[dict[str, Any]], indices: Iterable[int]) -> list[tuple[int, int]]:
    """(caller, called) of one thread's operators, which come in the order of their starts."""
    calls, open_operators = [], list[int]()
    for index in indices:
        start = operators[index]["ts"]
        while open_operators and operators[open_operators[-1]]["ts"] + operators[open_operators[-1]]["dur"] <= start:
            open_operators.pop()
        if open_operators:
            calls.append((open_operators[-1], index))
        open_operators.append(index)
    return calls
