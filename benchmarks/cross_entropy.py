#!/usr/bin/env python3
"""The ways to compute the loss of a language model from bf16 hidden states: how far each is from fp64, and its time.

    python benchmarks/cross_entropy.py --chunks 4 16

Each way gets the same hidden states [n, h], output weight [v, h] and labels, rounded to bf16, and returns the mean loss
and both gradients. "weight" is the error of the weight gradient as a bf16 tensor, which is what PyTorch alone returns;
"fp32" that of a weight gradient accumulated in fp32, as --gradient-accumulation-fusion does. Errors are relative to
fp64 from the same bf16 numbers. "time" is CPU time of one thread relative to Megatron's loss, the matrix products
included, a median over rounds in turn.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor


class Result(NamedTuple):
    """logit_gradient: [n, v], where the way makes one for all tokens at once."""

    mean_loss: float
    hidden_gradient: Tensor
    weight_gradient: Tensor
    logit_gradient: Tensor | None = None


def build_problem(num_tokens: int, hidden_size: int, vocab_size: int) -> Problem:
    """Normal hidden states, and a weight that gives logits of about unit size, as an untrained model has."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).bfloat16()
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).bfloat16()
    return Problem(hidden, weight, torch.randint(0, vocab_size, (num_tokens,), generator=generator))


def differentiate(problem: Problem, compute: Callable[[Tensor, Tensor], Tensor]) -> Result:
    """compute: from hidden states and weight to the losses [n], or to their sum."""
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    losses = compute(hidden, weight)
    losses.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(losses.detach().double().sum().item() / len(problem.hidden), hidden.grad, weight.grad)


# --- the ways -------------------------------------------------------------------------------------------------------


def compute_exact(problem: Problem) -> Result:
    exact = Problem(problem.hidden.double(), problem.weight.double(), problem.labels)
    return differentiate(exact, lambda h, w: F.cross_entropy(h @ w.t(), exact.labels, reduction="none"))


def compute_by(loss: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Result:
    """By a loss of logits [n, 1, v] and labels [n, 1]."""
    gradients = []

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).unsqueeze(1)
        logits.register_hook(lambda gradient: gradients.append(gradient[:, 0]))
        return loss(logits, problem.labels[:, None])

    return differentiate(problem, compute)._replace(logit_gradient=gradients[0])


def compute_in_chunks(loss: Callable[[Tensor, Tensor], Tensor], size: int, problem: Problem) -> Result:
    """What model/chunked_cross_entropy.py does around megatron's output layer."""

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        def compute_chunk(rows: Tensor, labels: Tensor) -> Tensor:
            return loss((rows @ weight.t()).unsqueeze(1), labels[:, None])

        chunks = zip(hidden.split(size), problem.labels.split(size), strict=True)
        return torch.cat([checkpoint(compute_chunk, *chunk, use_reentrant=False) for chunk in chunks])

    return differentiate(problem, compute)


def compute_by_torch(reduction: str, size: int, problem: Problem) -> Result:
    """torch.nn.functional.linear_cross_entropy, of torch 2.13 or later."""
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=size, chunking_method=None, acc_policy="compact", acc_dtype=torch.float32
    )
    return differentiate(
        problem, lambda h, w: F.linear_cross_entropy(h, w, problem.labels, reduction=reduction, options=options)
    )


def list_ways(num_tokens: int, chunks: Sequence[int]) -> dict[str, Callable[[Problem], Result]]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as megatron_loss

    from megatron_hammer.model.cross_entropy import vocab_parallel_cross_entropy

    group = torch.distributed.group.WORLD

    def loss_in_place(logits: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, labels, num_tokens=None, group=group)

    ways: dict[str, Callable[[Problem], Result]] = {
        "Megatron": lambda problem: compute_by(
            lambda logits, labels: megatron_loss(logits, labels, tp_group=group), problem
        ),
        "in-place": lambda problem: compute_by(loss_in_place, problem),
    }
    for number in chunks:
        size = -(-num_tokens // number)
        ways[f"chunked, {number} chunks"] = lambda problem, size=size: compute_in_chunks(loss_in_place, size, problem)
        if hasattr(F, "linear_cross_entropy"):
            for reduction in ("none", "sum"):
                ways[f"linear_cross_entropy, {reduction}, {number} chunks"] = (
                    lambda problem, size=size, reduction=reduction: compute_by_torch(reduction, size, problem)
                )
    return ways


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(problem: Problem, ways: dict[str, Callable[[Problem], Result]], num_rounds: int) -> list[dict[str, Any]]:
    exact = compute_exact(problem)
    times: dict[str, list[float]] = {name: [] for name in ways}
    rows = {}
    for _ in range(num_rounds):
        for name, compute in ways.items():
            started_at_s = time.process_time()  # which other work on the machine hardly changes
            result = compute(problem)
            times[name].append(time.process_time() - started_at_s)
            rows[name] = describe(result, exact, problem)
    first = times[next(iter(ways))]
    for name, row in rows.items():
        row["time"] = statistics.median(own / base for own, base in zip(times[name], first, strict=True))
    return [{"way": name, **row} for name, row in rows.items()]


def describe(result: Result, exact: Result, problem: Problem) -> dict[str, Any]:
    in_fp32 = None
    if result.logit_gradient is not None:
        in_fp32 = find_error(result.logit_gradient.float().t() @ problem.hidden.float(), exact.weight_gradient)
    return {
        "loss": abs(result.mean_loss / exact.mean_loss - 1),
        "hidden": find_error(result.hidden_gradient, exact.hidden_gradient),
        "weight": find_error(result.weight_gradient, exact.weight_gradient),
        "fp32": in_fp32,
    }


def find_error(computed: Tensor, exact: Tensor) -> float:
    """Relative, in the 2-norm over all elements."""
    return ((computed.double() - exact).norm() / exact.norm()).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    from megatron_hammer.checkpoint.verification.megatron_model import single_rank

    with single_rank():
        problem = build_problem(args.tokens, args.hidden_size, args.vocab_size)
        rows = measure(problem, list_ways(args.tokens, args.chunks), args.rounds)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'':38}{'loss':>9}{'hidden':>9}{'weight':>9}{'fp32':>9}{'time':>7}")
    for row in rows:
        in_fp32 = "" if row["fp32"] is None else f"{row['fp32']:.1e}"
        errors = "".join(f"{row[name]:9.1e}" for name in ("loss", "hidden", "weight"))
        print(f"{row['way']:38}{errors}{in_fp32:>9}{row['time']:7.2f}")


if __name__ == "__main__":
    main()
