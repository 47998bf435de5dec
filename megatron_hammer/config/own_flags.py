"""The flags that are ours; every other flag is Megatron's and passes through unchanged."""

import argparse
from collections.abc import Sequence

from megatron_hammer.files.command_line import CommandParser


def add_own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `megatron_hammer` group to `parser`."""
    group = parser.add_argument_group("megatron_hammer")
    group.add_argument("--preset", help="model and recipe to start from; any other flag overrides it")
    group.add_argument(
        # Replaced by the recorded arguments before these are parsed; see training/supervision/run_folder.py.
        "--from-run",
        metavar="DIR",
        help="repeat the run that saved into this folder: its arguments, then those given here (needs a new --save)",
    )
    group.add_argument(
        "--load-hf",
        metavar="DIR",
        help="the model and the first weights of a Hugging Face folder; the checkpoint in --load, once there is one, "
        "is resumed instead",
    )
    group.add_argument(
        "--platform",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="default: cuda if PyTorch sees a GPU, else cpu",
    )
    group.add_argument(
        "--backend",
        choices=["auto", "te", "torch"],
        default="auto",
        help="te: TransformerEngine kernels; torch: PyTorch alone; auto: te where it imports and there is a GPU",
    )
    group.add_argument(
        "--precision", choices=["bf16", "fp32", "fp16"], help="of weights and activations (default: the preset's)"
    )
    _add_model_flags(group)
    _add_data_flags(group)
    _add_sft_flags(group)
    _add_checkpoint_flags(group)
    _add_bad_loss_flags(group)
    _add_output_flags(group)
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    """What Megatron's models lack, and how ours are computed."""
    group.add_argument(
        "--cross-entropy",
        choices=["in-place", "chunked"],
        default="in-place",
        help="in-place: the gradient of the logits takes their place in memory; chunked: no more than 4,096 tokens "
        "have logits at a time, which are computed again in the backward pass",
    )
    group.add_argument(
        "--triton-kernels",
        action=argparse.BooleanOptionalAction,
        help="rotary embeddings and norms of the torch backend by our kernels instead of PyTorch's (default: on a GPU)",
    )
    group.add_argument("--embedding-norm", action="store_true", help="LayerNorm on the embedding's output")
    group.add_argument(
        "--residual-multiplier",
        type=float,
        default=1.0,
        help="of the outputs of attention and MLP before they are added to the residual (Granite)",
    )
    group.add_argument(
        # Megatron has only the positive flag, and our default is on, so a way to switch it off is needed.
        "--no-distributed-optimizer",
        action="store_false",
        dest="use_distributed_optimizer",
        help="keep the whole optimizer state on every data-parallel rank (default: sharded)",
    )
    group.add_argument(
        # As for the optimizer: Megatron's flag is positive, and our default is on.
        "--no-async-save",
        action="store_false",
        dest="async_save",
        help="let training wait until a checkpoint is written (default: it waits until the state is copied, and a "
        "thread writes the copies; torch_dist only)",
    )


def _add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    """What a run checks of the checkpoint that it loads, and which of its own it keeps."""
    group.add_argument(
        "--no-verify-checkpoint",
        action="store_false",
        dest="verify_checkpoint",
        help="do not compare the files of the checkpoint with the hashes that were saved with it",
    )
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="keep the newest N checkpoints and remove older ones after each save (default: keep all); with 2 or more, "
        "a damaged one has another to fall back to",
    )
    group.add_argument(
        "--keep-every", type=int, metavar="STEPS", help="with --keep-last: keep also those that are multiples of STEPS"
    )
    group.add_argument(
        "--keep-iterations", type=int, nargs="+", metavar="STEP", help="with --keep-last: keep also these milestones"
    )


def _add_bad_loss_flags(group: argparse._ArgumentGroup) -> None:
    """What a run does about a step that would break its weights."""
    group.add_argument(
        "--on-bad-loss",
        choices=["stop", "skip-batch", "roll-back"],
        default="stop",
        help="where a loss or gradient is not finite, or the loss spikes. stop: end with the last good weights saved; "
        "skip-batch: leave the batch out; roll-back: start again from the newest checkpoint before it and leave out "
        "the batches of --rolled-back-steps (default: %(default)s)",
    )
    group.add_argument(
        "--loss-spike-factor",
        type=float,
        metavar="F",
        help="a loss of more than F times the median of the last 64 steps is bad too (default: none is)",
    )
    group.add_argument(
        "--rolled-back-steps",
        type=int,
        default=1,
        metavar="N",
        help="batches that a roll-back leaves out, up to that of the bad step (default: %(default)s)",
    )


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    """The order of samples, and what a run may do with data only on demand."""
    group.add_argument(
        "--data-order",
        # MEGATRON and EPOCHWISE of data/order/order.py.
        choices=["megatron", "epochwise"],
        default="megatron",
        help="megatron: all epochs of a source shuffled together, a longer run has another order; epochwise: each "
        "epoch shuffled by itself, so that a longer run is the same order, continued (the first epoch is megatron's)",
    )
    group.add_argument(
        "--data-order-samples",
        type=int,
        help="build megatron's order for this many samples, as many as the run may ever be extended to; with "
        "--data-order epochwise, the samples that its first block of epochs is built for, to continue a run begun in "
        "megatron's order (default: one epoch)",
    )
    group.add_argument(
        "--accept-data-order-change",
        action="store_true",
        help="resume although samples would come again and others be skipped; preflight counts them",
    )
    group.add_argument(
        "--accept-many-epochs",
        action="store_true",
        help="train although some data would be read more than 1,000 times",
    )


def _add_sft_flags(group: argparse._ArgumentGroup) -> None:
    """With Megatron's --sft: how conversations are trained on."""
    group.add_argument(
        "--sft-unpacked",
        action="store_true",
        help="with --sft: one conversation in each sequence, padded (default: as many as fit, none attends to another)",
    )
    group.add_argument(
        "--sft-truncate",
        action="store_true",
        help="with --sft: cut conversations that are longer than --seq-length at their end (default: refuse them)",
    )
    group.add_argument(
        "--sft-epochs",
        type=float,
        metavar="N",
        help="with --sft: passes over the training data, instead of --train-iters (default: the recipe's)",
    )


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    """What is planned, printed and written."""
    group.add_argument("--dry-run", action="store_true", help="print what would run and every problem found, then stop")
    group.add_argument(
        "--world-size", type=int, dest="requested_world_size", help="processes to plan for (with --dry-run)"
    )
    group.add_argument("--json", action="store_true", help="print the dry run as JSON")
    group.add_argument("--gpu-memory-gib", type=float, help="memory of a GPU, for --dry-run on a machine without it")
    group.add_argument("--peak-tflops", type=float, help="dense peak of a GPU for MFU (default: by device name)")
    group.add_argument("--metrics-path", help="one JSON object per step (default: metrics.jsonl under --save)")
    group.add_argument(
        "--prometheus-file",
        metavar="FILE",
        help="step, loss, speed, restarts and age of the checkpoint as Prometheus text",
    )
    group.add_argument(
        "--prometheus-port", type=int, metavar="PORT", help="serve the same at /metrics on the host of the last rank"
    )
    group.add_argument(
        "--evaluate-every",
        type=int,
        metavar="N",
        help="evaluate the checkpoint of every N steps, and the last one, in another process while training continues; "
        "needs --evaluate-suite",
    )
    group.add_argument(
        "--evaluate-suite", metavar="FILE", help="tasks and data of --evaluate-every, as for hammer evaluate --suite"
    )
    group.add_argument(
        "--fingerprint-interval",
        type=int,
        metavar="N",
        help="every N steps, each rank records a hash of its batch, gradients and weights beside the metrics, for "
        "compare_runs --bit-exact",
    )
    group.add_argument(
        "--deterministic", action="store_true", dest="deterministic_mode", help="same as --deterministic-mode"
    )
    group.add_argument("--verbose", action="store_true", help="megatron's own output on the terminal, not in a file")


def read_option(argv: Sequence[str], name: str, default: str | None = None) -> str | None:
    """The value of one option without building Megatron's parser (which takes seconds to import)."""
    # No help: --help must reach the full parser. No abbreviations: --pre must not be read as --preset.
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, dest="value", default=default)
    return parser.parse_known_args(list(argv))[0].value
