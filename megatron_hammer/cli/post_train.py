"""Fine-tune a Hugging Face model, train a reward model, or align it with DPO, through TRL; with --lora through PEFT.

    post_train.py sft    --load hf/base --data conversations.jsonl --config sft.toml --save hf/chat
    post_train.py dpo    --load hf/chat --data preferences.jsonl --config dpo.toml --save hf/aligned --lora
    post_train.py reward --load hf/chat --data preferences.jsonl --config reward.toml --save hf/reward

The data is checked first, and every record that is not used is named. Nothing is downloaded. After a kill, run the same
command again: it continues from its newest checkpoint. On several GPUs, start it with torchrun --nproc-per-node N.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.cli.tokenizer_export import add_chat_flags
from megatron_hammer.errors import ConfigError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, importing
from megatron_hammer.files.tables import print_json
from megatron_hammer.post_training.templates.chat_template import parse_bindings
from megatron_hammer.post_training.trl.recipe import read_recipe

with importing():
    from megatron_hammer.post_training.trl.post_train import PostTrainOptions, PostTrainReport, post_train

STAGES = {
    "sft": "learn the assistant's turns of conversations",
    "reward": "learn a score that ranks chosen answers above rejected ones",
    "dpo": "prefer chosen answers to rejected ones, held to the model that it starts from",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in STAGES.items():
        add_flags(stages.add_parser(stage, help=text, description=f"{stage}: {text}."), stage)
    return parser.parse_args(argv)


def add_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags of one stage; all stages have the same ones, but their data differs."""
    records = "conversations" if stage == "sft" else "preference pairs"
    parser.add_argument("--load", type=Path, required=True, help="folder of a Hugging Face model, with its tokenizer")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help=f"{records}, .jsonl or .json")
    parser.add_argument("--config", type=Path, required=True, help="TOML file with the hyper-parameters")
    parser.add_argument("--save", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--held-out-data", nargs="+", default=[], metavar="FILE", help=f"{records} that are scored after training"
    )
    add_chat_flags(parser, default="the one in --load")
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters; the table [lora] sets their size")
    parser.add_argument(
        "--keep-adapter", action="store_true", help="write the adapter alone, where --lora merges it into the model"
    )
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="device (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="throw an unfinished run away and begin again")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in --save")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


@exit_on_interrupt("the newest checkpoint is kept")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the records that are left out, the held-out metrics and a summary."""
    arguments = parse_arguments(argv)
    if arguments.keep_adapter and not arguments.lora:
        raise ConfigError("--keep-adapter: needs --lora, got no adapter. Pass --lora, or leave it out.")
    options = PostTrainOptions(
        stage=arguments.stage,
        recipe=read_recipe(arguments.config, stage=arguments.stage, is_lora=arguments.lora),
        hf_dir=arguments.load,
        data=arguments.data,
        held_out_data=arguments.held_out_data,
        save_dir=arguments.save,
        chat_template=arguments.chat_template,
        bindings=parse_bindings(arguments.bind_token),
        is_lora=arguments.lora,
        keeps_adapter=arguments.keep_adapter,
        platform=arguments.platform,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
    )
    report = post_train(options)
    if report is None:  # the first process says it
        return
    if arguments.json:
        print_json(dataclasses.asdict(report))
        return
    for name, value in report.held_out.items():
        print(f"held out: {name} {value:.4g}")
    print(summarise(report))


def summarise(report: PostTrainReport) -> str:
    """The last line: what was read, left out, trained and written."""
    reasons = ", ".join(f"{len(places):,} {reason}" for reason, places in report.dropped.items())
    losses = list(report.losses.values())
    course = f", loss {losses[0]:.4g} -> {losses[-1]:.4g}" if losses else ""
    num_dropped = report.num_records - report.num_examples - report.num_held_out
    held_out = f"{report.num_held_out:,} held out, " if report.num_held_out else ""
    resumed = f" (continued from step {report.resumed_from_step})" if report.resumed_from_step else ""
    return (
        f"{report.save_dir}: {report.stage}{' with LoRA' if report.is_lora else ''}, {report.num_records:,} records "
        f"in, {report.num_examples:,} used, {held_out}{num_dropped:,} dropped"
        f"{f' ({reasons})' if reasons else ''}; {report.num_steps:,} steps{resumed}{course}; "
        f"{report.num_trained_parameters:,} of {report.num_parameters:,} parameters trained; {report.elapsed_s:.0f} s"
    )
