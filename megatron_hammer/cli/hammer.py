"""`hammer`: every tool of this package as a command, and a map of them.

A command is imported only when it runs, because torch alone takes seconds and the map must appear at once.
Each module under megatron_hammer/cli/ has a `main(argv)` and its own --help.
"""

import importlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from megatron_hammer import __version__
from megatron_hammer.errors import ConfigError, exit_on_user_error

PACKAGE = "megatron_hammer"
TITLE = "hammer: pretraining for GPT and Llama models on megatron-core, from raw text to a Hugging Face model"
USAGE = """usage: hammer COMMAND [FLAG ...]
       hammer COMMAND --help
       hammer --version"""


class Command(NamedTuple):
    name: str  # the words after `hammer`
    module: str
    text: str


# In the order in which data passes through them.
GROUPS: tuple[tuple[str, tuple[Command, ...]], ...] = (
    (
        "Text",
        (
            Command("build-machine-corpus", "cli.build_machine_corpus", "make a demonstration corpus from local text"),
            Command(
                "build-machine-conversations", "cli.build_machine_conversations", "make conversations for a small demo"
            ),
            Command("dedup-data", "cli.dedup_data", "drop duplicate and nearly duplicate documents"),
        ),
    ),
    (
        "Tokenizer",
        (
            Command("tokenizer train", "cli.tokenizer_train", "train a SentencePiece BPE tokenizer"),
            Command("tokenizer merge", "cli.tokenizer_merge", "extend a tokenizer with pieces of another"),
            Command("tokenizer analyze", "cli.tokenizer_analyze", "compare tokenizers on a corpus"),
            Command("tokenizer export", "cli.tokenizer_export", "write a Hugging Face tokenizer, verified"),
        ),
    ),
    (
        "Training data",
        (
            Command("preprocess-data", "cli.preprocess_data", "turn text into .bin/.idx files, which training reads"),
            Command("merge-data", "cli.merge_data", "join several .bin/.idx pairs into one"),
            Command("inspect-data", "cli.inspect_data", "show counts, lengths and text of .bin/.idx pairs, and verify"),
            Command("blend-data", "cli.blend_data", "weigh data sets, and preview what a run reads of each"),
            Command("build-data-cache", "cli.build_data_cache", "build a run's sample indices before it starts"),
        ),
    ),
    (
        "Training",
        (
            Command("pretrain", "training.pretrain", "train in this process, or print the plan with --dry-run"),
            Command("launch", "training.launch", "start the training processes of one node, as torchrun does"),
            Command("compare-runs", "cli.compare_runs", "compare the losses of several runs step by step"),
        ),
    ),
    (
        "Checkpoints",
        (
            Command("checkpoint inspect", "cli.inspect_checkpoint", "show what a checkpoint holds, or compare two"),
            Command("checkpoint edit", "cli.edit_checkpoint", "reshard, average, resize, strip or upcycle one"),
            Command("convert from-hf", "cli.hf_to_megatron", "Hugging Face model to Megatron checkpoint"),
            Command("convert to-hf", "cli.megatron_to_hf", "Megatron checkpoint to Hugging Face model"),
            Command("convert to-gguf", "cli.to_gguf", "either of them to a GGUF file for llama.cpp"),
            Command("resize-embeddings", "cli.resize_embeddings", "fit a Hugging Face model to an extended tokenizer"),
            Command("quantize", "cli.quantize", "Hugging Face model to GPTQ or AWQ format, and what that costs"),
            Command("generate-sample", "cli.generate_sample", "continue a prompt with a Hugging Face model"),
        ),
    ),
    (
        "Evaluation",
        (
            Command("evaluate-perplexity", "cli.evaluate_perplexity", "compare the perplexity of models by domain"),
            Command("evaluate", "cli.evaluate", "run benchmarks: C-Eval, CMMLU, HumanEval and lm-eval's tasks"),
        ),
    ),
    (
        "Post-training",
        (
            Command("preprocess-conversations", "cli.preprocess_conversations", "turn chat data into ids and masks"),
            Command("show-chat-masks", "cli.show_chat_masks", "print conversations with the loss weight of each token"),
            Command("post-train", "cli.post_train", "SFT, reward models, DPO and LoRA of a Hugging Face model"),
            Command("check-chat", "cli.check_chat", "ask a chat model questions: does it answer, and stop"),
        ),
    ),
    (
        "Serving",
        (
            Command("serve", "cli.serve", "serve a model to OpenAI's clients and a web browser"),
            Command("chat", "cli.chat", "talk with a model or a server in the terminal"),
        ),
    ),
    (
        "Planning a cluster",
        (
            Command("scaling-study", "cli.scaling_study.main", "project, measure, calibrate and validate scaling"),
            Command("check-cluster", "cli.check_cluster", "check GPUs, links, clocks and folders before a run"),
            Command("build-rank", "cli.build_rank", "build one rank of a run of any size on this CPU, and check it"),
        ),
    ),
    (
        "This installation",
        (Command("check-environment", "cli.check_environment", "print the requirements that are not installed"),),
    ),
)
COMMANDS: tuple[Command, ...] = tuple(command for _, commands in GROUPS for command in commands)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first words name, and return its exit code; without one, raises ConfigError."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"hammer {__version__}")
        return 0
    # No name is the beginning of another one, so the first match is the only one.
    for command in COMMANDS:
        name = command.name.split()
        if words[: len(name)] == name:
            return run(command, words[len(name) :])
    # `hammer tokenizer --help` shows the commands whose name begins with that word.
    family = [command for command in COMMANDS if words and command.name.startswith(f"{words[0]} ")]
    # `family[:1]` has length 1 if the first word begins the names of commands, else 0.
    if words[len(family[:1]) :] in (["-h"], ["--help"]):
        with suppress(BrokenPipeError):  # exit code 0 whether or not all of it was read: there is nothing left to do
            print(format_family(words[0], family) if family else format_map())
        return 0
    raise ConfigError(describe_unknown(words, family))


def run(command: Command, arguments: list[str]) -> int | None:
    sys.argv = [f"hammer {command.name}", *arguments]  # argparse calls the program what argv[0] says
    result: int | None = importlib.import_module(f"{PACKAGE}.{command.module}").main(arguments)
    return result


def format_map() -> str:
    groups = (f"{heading}\n{format_lines(commands)}" for heading, commands in GROUPS)
    return "\n\n".join((TITLE, USAGE, *groups))


def format_family(word: str, family: Iterable[Command]) -> str:
    return f"usage: hammer {word} COMMAND [FLAG ...]\n\n{format_lines(family)}"


def format_lines(commands: Iterable[Command]) -> str:
    width = max(len(command.name) for command in COMMANDS)
    return "\n".join(f"  {command.name:{width}}  {command.text}" for command in commands)


def describe_unknown(words: Sequence[str], family: Sequence[Command]) -> str:
    """The error for a command that is not in the map, with the names that are near. family: of the first word."""
    if not words:
        return "command: must be given, got none. Run hammer --help for the list."
    # Where the first word begins the names of commands, both words are the wrong name.
    typed = " ".join(words[: 1 + bool(family)])
    # A family without its second word: every command of it is near.
    near = [command.name for command in family] if len(words) == 1 else []
    near = near or find_near(typed)
    remedy = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"command: must be one of hammer's, got {typed}. {remedy}Run hammer --help for the list."


def find_near(typed: str) -> list[str]:
    """The commands whose name, or whose script's, resembles what was typed."""
    import difflib  # here: it would double the time to show the map

    names = {command.name: command.name for command in COMMANDS}
    # The scripts in tools/ and checkpoint_convert/ have the names of the modules: megatron_to_hf.py is convert to-hf.
    names |= {command.module.split(".")[-1].replace("_", "-"): command.name for command in COMMANDS}
    near = difflib.get_close_matches(typed.removesuffix(".py").replace("_", "-"), names, n=3)
    return list(dict.fromkeys(names[name] for name in near))
