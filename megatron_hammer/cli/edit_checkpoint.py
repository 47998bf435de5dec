"""Edit a Megatron torch_dist checkpoint on a CPU, without training, a process group or megatron.

reshard: another TP/PP/VPP/EP layout, weights and optimizer bit for bit; training resumes from it with --load.
average: the mean of several checkpoints' weights.
resize-vocab: more or fewer tokens, or those of an extended tokenizer.
weights-only: no optimizer, random states or schedule.
upcycle: a dense model as a mixture of experts that computes the same function.

The result is read back and compared before it is renamed into place. An interrupted edit leaves nothing that loads.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.surgery.average import average
from megatron_hammer.checkpoint.surgery.reshard import TargetLayout, reshard
from megatron_hammer.checkpoint.surgery.resize_vocabulary import NewVocabulary, resize_vocabulary
from megatron_hammer.checkpoint.surgery.upcycle import ExpertShape, upcycle
from megatron_hammer.checkpoint.surgery.weights_only import keep_weights
from megatron_hammer.errors import ConfigError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import show_stages

OnTensor = Callable[[str, int, int], None]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_reshard(commands)
    add_average(commands)
    add_resize_vocab(commands)
    add_command(commands, "weights-only", run_weights_only, "drop everything but the weights")
    add_upcycle(commands)
    return parser.parse_args(argv)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, OnTensor], str], text: str, *, has_load: bool = True
) -> argparse.ArgumentParser:
    """A subcommand that reads one checkpoint and writes another."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    # main calls this function, so the subcommands need no chain of ifs.
    parser.set_defaults(run=run)
    if has_load:
        parser.add_argument(
            "--load", type=Path, required=True, help="directory that training saved into, or one iteration"
        )
        parser.add_argument("--iteration", type=int, help="iteration to read (default: the latest)")
    parser.add_argument("--save", type=Path, required=True, help="directory to write, for training's --load")
    parser.add_argument("--overwrite", action="store_true", help="replace the same iteration in --save")
    return parser


def add_reshard(commands: Any) -> None:
    """The subcommand reshard: its flags are those of training for a layout."""
    parser = add_command(commands, "reshard", run_reshard, "another layout, weights and optimizer bit for bit")
    # No defaults: None means the checkpoint's own value, which the command does not know yet.
    for flag, text in (
        ("tensor-model-parallel-size", "ranks that share every matrix"),
        ("pipeline-model-parallel-size", "pipeline stages"),
        ("num-virtual-stages-per-pipeline-rank", "chunks per stage, with interleaving"),
        ("expert-model-parallel-size", "ranks that share the experts"),
        ("expert-tensor-parallel-size", "ranks that share every expert's matrices"),
        ("decoder-first-pipeline-num-layers", "layers of the first stage, if stages are uneven"),
        ("decoder-last-pipeline-num-layers", "layers of the last stage, if stages are uneven"),
    ):
        parser.add_argument(f"--{flag}", type=int, help=f"{text} (default: the checkpoint's)")


def add_average(commands: Any) -> None:
    # Several checkpoints are positional arguments here, so that a shell's wildcard can name them.
    parser = add_command(commands, "average", run_average, "the mean of several checkpoints' weights", has_load=False)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="directories of --save, or iterations of them")
    parser.add_argument("--weights", help="one number per checkpoint, separated by commas (default: all equal)")


def add_resize_vocab(commands: Any) -> None:
    """The subcommand resize-vocab."""
    parser = add_command(commands, "resize-vocab", run_resize_vocab, "another number of tokens")
    parser.add_argument("--vocab-size", type=int, help="tokens, without padding (default: the new tokenizer's)")
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        help="extended tokenizer: a new piece's row is the mean of the old pieces' that spell it",
    )
    parser.add_argument(
        "--old-tokenizer-model", type=Path, help="the model's own tokenizer (default: the checkpoint's)"
    )


def add_upcycle(commands: Any) -> None:
    """The subcommand upcycle: its flags are those of training for a mixture of experts."""
    parser = add_command(commands, "upcycle", run_upcycle, "a dense model as a mixture of experts")
    # The names of training's own flags, so they can be copied from its command line.
    parser.add_argument("--num-experts", type=int, required=True, help="experts in every layer")
    parser.add_argument("--moe-router-topk", type=int, required=True, help="experts per token")
    parser.add_argument(
        "--moe-upcycling-granularity", type=int, default=1, help="slices to cut the dense MLP into (%(default)s)"
    )
    parser.add_argument(
        "--moe-ffn-hidden-size",
        type=int,
        help="width of an expert (default: the dense width divided by the granularity)",
    )
    parser.add_argument(
        "--moe-router-pre-softmax",
        action="store_true",
        help="softmax over all experts before the top k; the function is then not exactly the dense one",
    )
    parser.add_argument(
        "--router-init-std",
        type=float,
        help="standard deviation of the router's random rows (default: the model's init_method_std)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="random seed of the router's rows (%(default)s)")


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints one line of what was written; notes go to stderr."""
    arguments = parse_arguments(argv)
    # The result is printed after the live line has ended, so the two do not mix.
    with show_stages("{} tensors") as show:
        summary = arguments.run(arguments, show)
    print(summary)


def select_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_command` that every edit of one checkpoint takes."""
    return {"iteration": arguments.iteration, "overwrite": arguments.overwrite}


def run_reshard(arguments: argparse.Namespace, on_tensor: OnTensor) -> str:
    """Reshard as the flags say; returns the last line. Notes go to stderr."""
    # The fields of TargetLayout have the names of the flags that add_reshard adds.
    target = TargetLayout(**{name: getattr(arguments, name) for name in TargetLayout.__dataclass_fields__})
    report = reshard(arguments.load, arguments.save, target, **select_options(arguments), on_tensor=on_tensor)
    for note in report.notes:
        # On stderr: stdout has one line, for scripts.
        print(f"note: {note}", file=sys.stderr)
    return (
        f"{report.save_dir}: {name_iteration(report.iteration)} from {report.layout_before} to {report.layout}; "
        f"{report.num_weights} weights and {report.num_optimizer_tensors} optimizer tensors in and out, all read back "
        f"equal; {report.num_bytes:,} bytes; {report.elapsed_s:.1f} s"
    )


def run_average(arguments: argparse.Namespace, on_tensor: OnTensor) -> str:
    """Average as the flags say; returns the last line. The share of each checkpoint goes to stderr."""
    # One word with commas: nargs="+" would swallow the checkpoints that follow.
    weights = parse_numbers(arguments.weights) if arguments.weights is not None else None
    report = average(
        arguments.checkpoints, arguments.save, weights=weights, overwrite=arguments.overwrite, on_tensor=on_tensor
    )
    for path, share in report.sources:
        # The shares are normalised, so they may differ from the numbers of --weights.
        print(f"note: {share:.6f} x {path}", file=sys.stderr)
    return (
        f"{report.save_dir}: mean of {len(report.sources)} checkpoints; {report.num_weights} weights out "
        f"({report.num_parameters:,} numbers), all recomputed equal, no optimizer; {report.elapsed_s:.1f} s"
    )


def parse_numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"weights: must be numbers with commas between them, got {text}. Pass --weights 0.5,0.3,0.2."
        ) from None


def run_resize_vocab(arguments: argparse.Namespace, on_tensor: OnTensor) -> str:
    """Resize as the flags say; returns the last line."""
    if arguments.old_tokenizer_model and not arguments.tokenizer_model:
        raise ConfigError(
            f"old-tokenizer-model: is compared with --tokenizer-model, got {arguments.old_tokenizer_model} alone. "
            "Pass the new tokenizer, or drop this."
        )
    vocabulary = NewVocabulary(
        vocab_size=arguments.vocab_size,
        old_tokenizer_path=arguments.old_tokenizer_model,
        new_tokenizer_path=arguments.tokenizer_model,
    )
    report = resize_vocabulary(
        arguments.load, arguments.save, vocabulary, **select_options(arguments), on_tensor=on_tensor
    )
    # Negative where the vocabulary grew, which drops nothing.
    num_dropped = max(0, report.num_tokens_before - report.num_tokens)
    return (
        f"{report.save_dir}: {name_iteration(report.iteration)} with {report.num_tokens:,} tokens (was "
        f"{report.num_tokens_before:,}), padded to {report.num_padded_rows:,} (was "
        f"{report.num_padded_rows_before:,}); {report.num_new_rows:,} new rows, {report.num_spelled:,} of them spelled "
        f"by old pieces, {num_dropped:,} dropped; {' and '.join(report.resized)} resized, "
        f"{report.num_copied_tensors} tensors copied, all read back equal; {report.elapsed_s:.1f} s"
    )


def run_weights_only(arguments: argparse.Namespace, on_tensor: OnTensor) -> str:
    """Drop everything but the weights; returns the last line."""
    report = keep_weights(arguments.load, arguments.save, **select_options(arguments), on_tensor=on_tensor)
    return (
        f"{report.save_dir}: release of iteration {report.iteration}; {report.num_weights} weights kept and read back "
        f"equal, {report.num_dropped_tensors} optimizer tensors and {report.num_dropped_objects} states of the run "
        f"dropped; {report.num_bytes_before:,} bytes before, {report.num_bytes:,} after; {report.elapsed_s:.1f} s"
    )


def run_upcycle(arguments: argparse.Namespace, on_tensor: OnTensor) -> str:
    """Upcycle as the flags say; returns the last line."""
    shape = ExpertShape(
        num_experts=arguments.num_experts,
        router_topk=arguments.moe_router_topk,
        granularity=arguments.moe_upcycling_granularity,
        has_pre_softmax=arguments.moe_router_pre_softmax,
        router_std=arguments.router_init_std,
        seed=arguments.seed,
    )
    report = upcycle(
        arguments.load,
        arguments.save,
        shape,
        expert_ffn_hidden_size=arguments.moe_ffn_hidden_size,
        **select_options(arguments),
        on_tensor=on_tensor,
    )
    function = "the dense function up to rounding" if report.is_exact else "near the dense function, not equal to it"
    return (
        f"{report.save_dir}: release of iteration {report.iteration} with {report.num_experts} experts of width "
        f"{report.expert_ffn_hidden_size}, {function}; {report.num_parameters_before:,} numbers in, "
        f"{report.num_parameters:,} out, all recomputed equal, no optimizer; {report.elapsed_s:.1f} s"
    )


def name_iteration(iteration: int | None) -> str:
    return "release" if iteration is None else f"iteration {iteration}"
