#!/usr/bin/env python3
"""The training step of hammer-tiny on the CPU against the same model in transformers, as a ratio of their times.

    python benchmarks/train_step.py --threads 1 2

Both sides do the same work in fp32: global batch 8 as 4 micro-batches of 2 x 256 tokens, clip at 1.0, AdamW, from
the same weights over the same tokens. Ours is the training command itself, data loading and metrics included;
theirs is the plain loop of on_gpu/transformers_loop.py, its tokens already in memory. The two run in turn, each in
a process of its own, and medians of the step times after the warm-up are compared round by round.

How sameness is made and checked: one run of ours with a learning rate of zero writes its weights as a checkpoint and
every micro-batch it reads as an array. Ours loads that checkpoint; transformers loads the same tensors through the
checkpoint mapping and trains on the array. The losses of the first step must agree within 1e-5 relative, those of all
steps within 1e-3 (they share the optimizer's settings, not its kernels).
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from on_gpu.setting import write_data

ROOT = Path(__file__).resolve().parents[1]
PRESET = "hammer-tiny"
FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-3
LR = 1e-3  # constant, so that a short run does what a step in the middle of a long one does


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What one run measured."""

    losses: list[float]
    times_s: list[float]


# --- the two sides, each in a process of its own --------------------------------------------------------------------


def train_with_hammer(work_dir: Path, num_steps: int, num_threads: int) -> Steps:
    """The training command, one process."""
    metrics_path = work_dir / "metrics.jsonl"
    launch = ["-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", "1", "--"]
    flags = ["--load", str(work_dir / "start"), "--finetune", "--lr", str(LR), "--lr-decay-style", "constant"]
    flags += ["--metrics-path", str(metrics_path)]
    run([*launch, *hammer_flags(work_dir, num_steps), *flags], num_threads)
    lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf8").splitlines()]
    return Steps(losses=[line["loss"] for line in lines], times_s=[line["step_time_s"] for line in lines])


def hammer_flags(work_dir: Path, num_steps: int) -> list[str]:
    return [
        *("--preset", PRESET, "--platform", "cpu", "--data-path", str(work_dir / "data"), "--split", "100,0,0"),
        *("--tokenizer-type", "NullTokenizer", "--train-iters", str(num_steps), "--eval-iters", "0"),
        *("--lr-warmup-iters", "0"),
    ]


def train_with_transformers(work_dir: Path) -> None:
    """Print the losses and times of LlamaForCausalLM (sdpa) under torch.optim.AdamW with torch's defaults, as JSON."""
    import torch
    from on_gpu.transformers_loop import build_optimizer, train_step

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = read_recipe()
    model = load_into_transformers(work_dir / "start").float().train()
    optimizer = build_optimizer(model, recipe, lr=LR)
    batches = torch.from_numpy(np.load(work_dir / "batches.npy"))  # [step, micro-batch, tokens or labels, b, s]
    losses, times_s = [], []
    for step in batches:
        started_at_s = time.perf_counter()
        losses.append(train_step(model, optimizer, step, recipe.clip_grad))
        times_s.append(time.perf_counter() - started_at_s)
    print(json.dumps({"losses": losses, "times_s": times_s}))


def load_into_transformers(checkpoint_dir: Path) -> Any:
    """LlamaForCausalLM with exactly the tensors of our checkpoint."""
    import torch
    import transformers

    from megatron_hammer.checkpoint.hugging_face.config_json import build_config
    from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
    from megatron_hammer.checkpoint.hugging_face.family import expand
    from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_dropout, read_saved_model
    from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint

    reader = open_checkpoint(checkpoint_dir)
    model_shape = read_saved_model(reader.args)
    reader.remove_vocab_padding(model_shape.vocab_size)
    family = select_family(model_shape)
    values = build_config(
        family, model_shape, read_saved_dropout(reader.args), dtype="float32", bos_id=None, eos_id=None
    )
    config = transformers.LlamaConfig(**values, attn_implementation="sdpa")
    weights: dict[str, torch.Tensor] = {}
    for pair in expand(family, model_shape):
        parts = pair.layout.split(reader.read(pair.megatron_name), model_shape)
        weights |= dict(zip(pair.hf_names, parts, strict=True))
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True)
    return model


# --- what both start from -------------------------------------------------------------------------------------------


def record_start(work_dir: Path, num_steps: int) -> None:
    """Run ours with a learning rate of zero: its weights become work_dir/start, its micro-batches batches.npy."""
    from megatron_hammer.platforms import megatron_compat

    megatron_compat.install("cpu")  # before anything imports megatron

    from megatron_hammer.training import pretrain
    from megatron_hammer.training.forward_step import ForwardStep

    read_batch = ForwardStep.read_batch
    batches = []

    def record(self: ForwardStep, *arguments: Any, **options: Any) -> Any:
        batch = read_batch(self, *arguments, **options)
        batches.append(np.stack([batch["tokens"].numpy(), batch["labels"].numpy()]))  # type: ignore[union-attr]
        return batch

    ForwardStep.read_batch = record  # type: ignore[method-assign]
    pretrain.main([*hammer_flags(work_dir, num_steps), "--lr", "0", "--min-lr", "0", "--save", str(work_dir / "start")])
    np.save(work_dir / "batches.npy", np.stack(batches).reshape(num_steps, -1, *batches[0].shape))


def read_recipe() -> Any:
    from megatron_hammer.presets.catalogue import PRESETS

    return PRESETS[PRESET].recipe


def run(arguments: Sequence[str], num_threads: int) -> str:
    """Run Python with our package on its path; returns its stdout, or ends with its stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout


# --- the measurement ------------------------------------------------------------------------------------------------


def check_losses(ours: Steps, theirs: Steps) -> float:
    """The largest relative difference of the losses; ends the benchmark where the two do not train the same model."""
    ratios = [abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    if ratios[0] > FIRST_LOSS_TOLERANCE or max(ratios) > LOSS_TOLERANCE:
        sys.exit(f"the two sides do not do the same work: losses {ours.losses} against {theirs.losses}")
    return max(ratios)


def measure(work_dir: Path, num_threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn; medians and their ratio for every round."""
    num_steps = arguments.warmup_steps + arguments.steps
    rounds = []
    for number in range(1, arguments.rounds + 1):
        ours = train_with_hammer(work_dir, num_steps, num_threads)
        theirs = Steps(**json.loads(run([__file__, "--side", "transformers", str(work_dir)], num_threads)))
        ours_s, theirs_s = (side.times_s[arguments.warmup_steps :] for side in (ours, theirs))
        result = {
            "ours_median_s": statistics.median(ours_s),
            "theirs_median_s": statistics.median(theirs_s),
            "median_ratio": statistics.median(ours_s) / statistics.median(theirs_s),
            "fastest_ratio": min(ours_s) / min(theirs_s),
            "max_loss_difference_ratio": check_losses(ours, theirs),
        }
        rounds.append(result)
        print(
            f"threads {num_threads}, round {number}: ours {result['ours_median_s']:.3f} s, "
            f"transformers {result['theirs_median_s']:.3f} s, ratio {result['median_ratio']:.3f} "
            f"(fastest steps {result['fastest_ratio']:.3f})",
            file=sys.stderr,
        )
    return {"threads": num_threads, "rounds": rounds}


def summarize(measured: dict[str, Any]) -> str:
    rounds = measured["rounds"]
    medians = sorted(result["median_ratio"] for result in rounds)
    fastest = sorted(result["fastest_ratio"] for result in rounds)
    difference = max(result["max_loss_difference_ratio"] for result in rounds)
    return (
        f"threads {measured['threads']}: ours / transformers {statistics.median(medians):.3f} "
        f"(min {medians[0]:.3f}, max {medians[-1]:.3f} of {len(rounds)} rounds); "
        f"fastest steps {statistics.median(fastest):.3f}; losses agree within {difference:.1e}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of both sides (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="ours and theirs in turn (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a run (%(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--json", action="store_true", help="every round, as JSON")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "DIR"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    num_steps = arguments.warmup_steps + arguments.steps
    if arguments.side:
        side, work_dir = arguments.side[0], Path(arguments.side[1])
        if side == "start":
            record_start(work_dir, num_steps)
        else:
            train_with_transformers(work_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        recipe = read_recipe()
        num_samples = num_steps * recipe.global_batch_size
        num_tokens = (num_samples + 2) * (recipe.seq_length + 1)  # enough for every sample once
        write_data(work_dir / "data", num_tokens=num_tokens, vocab_size=4096)
        steps = ["--steps", str(arguments.steps), "--warmup-steps", str(arguments.warmup_steps)]
        run([__file__, "--side", "start", folder, *steps], num_threads=1)
        measured = [measure(work_dir, num_threads, arguments) for num_threads in arguments.threads]
    if arguments.json:
        print(json.dumps(measured, indent=2))
    else:
        print("\n".join(map(summarize, measured)))


if __name__ == "__main__":
    main()
