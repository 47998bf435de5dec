"""The flags of Megatron-LM's preprocess_data.py that ours lacks: taken where they can be, else one sentence each."""

import argparse

from megatron_hammer.errors import ConfigError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
HUGGING_FACE_TYPE = "HuggingFaceTokenizer"
GPT2_REMEDY = (
    "Convert them once with transformers: GPT2TokenizerFast(VOCAB_FILE, MERGE_FILE).save_pretrained(FOLDER), "
    "and pass --tokenizer-model FOLDER."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, without defaults of their own, so that only what is typed is looked at."""
    group = parser.add_argument_group("flags of Megatron-LM's tool")
    kinds = ", ".join((*SENTENCEPIECE_TYPES, HUGGING_FACE_TYPE))
    group.add_argument("--tokenizer-type", metavar="TYPE", help=f"checked against --tokenizer-model: {kinds}")
    template = group.add_mutually_exclusive_group()
    for prefix, includes, meaning in (
        ("", True, "put the tokens of the tokenizer's template around every text, as Megatron-LM's tool does"),
        ("no-", False, "put none there, which is the default here"),
    ):
        template.add_argument(
            f"--tokenizer-hf-{prefix}include-special-tokens",
            dest="includes_template",
            action="store_const",
            const=includes,
            help=meaning,
        )
    group.add_argument(
        "--keep-sequential-samples", action="store_true", help="keep the order of documents, which is always kept here"
    )
    group.add_argument("--log-interval", type=int, metavar="N", help="print a line on stderr after every N documents")
    group.add_argument("--dataset-impl", metavar="IMPL", help="mmap, the only format there is")
    group.add_argument("--partitions", type=int, metavar="N", help="1; use --workers, or --shard for several machines")
    for flag in ("--vocab-file", "--merge-file", "--vocab-size", "--tiktoken-pattern"):
        group.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--tokenizer-hf-no-use-fast", "--trust-remote-code"):
        group.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def refuse_what_cannot_be_taken(arguments: argparse.Namespace) -> None:
    """Raise ConfigError with a sentence for each flag whose meaning this tool cannot give it."""
    problems = []
    kind = arguments.tokenizer_type
    if kind is not None and kind not in (*SENTENCEPIECE_TYPES, HUGGING_FACE_TYPE):
        known = ", ".join((*SENTENCEPIECE_TYPES, HUGGING_FACE_TYPE))
        other_remedy = "Pass a SentencePiece model or a Hugging Face tokenizer."
        remedy = GPT2_REMEDY if kind == "GPT2BPETokenizer" else other_remedy
        problems.append(f"tokenizer-type: must be one of {known}, got {kind}. {remedy}")
    for flag, path in (("vocab-file", arguments.vocab_file), ("merge-file", arguments.merge_file)):
        if path is not None:
            problems.append(f"{flag}: GPT-2's two files are not read here, got {path}. {GPT2_REMEDY}")
    if arguments.partitions is not None and arguments.partitions != 1:
        problems.append(
            f"partitions: must be 1, got {arguments.partitions}. --workers alone uses all cores on files of any size. "
            f"On several machines, pass --shard 0/{arguments.partitions} and so on, and join the parts with merge-data."
        )
    if arguments.dataset_impl not in (None, "mmap"):
        found = arguments.dataset_impl
        problems.append(f"dataset-impl: must be mmap, got {found}. megatron-core reads no other format; drop it.")
    if arguments.log_interval is not None and arguments.log_interval < 1:
        problems.append(f"log-interval: must be at least 1, got {arguments.log_interval}. Pass --log-interval 1000.")
    reasons = {
        "vocab_size": "the size comes from the tokenizer",
        "tiktoken_pattern": "tiktoken's files are not read here",
        "tokenizer_hf_no_use_fast": "only tokenizer.json is read, which is the fast tokenizer",
        "trust_remote_code": "nothing that a tokenizer's folder carries is ever executed",
    }
    problems += [
        f"{name.replace('_', '-')}: has no meaning here: {reason}, got {getattr(arguments, name)}. Drop it."
        for name, reason in reasons.items()
        if getattr(arguments, name)
    ]
    if problems:
        raise ConfigError(*problems)
