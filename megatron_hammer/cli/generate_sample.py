"""Continue a prompt with a Hugging Face model: shows that an export loads and what it has learnt."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import ConversionError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="length of the continuation (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 means always the most likely token (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="choose among this many most likely tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="random seed (%(default)s)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the prompt and its continuation."""
    arguments = parse_arguments(argv)
    # transformers would take the path for the name of a repository, and its error would speak of that.
    for name in ("config.json", "tokenizer.json"):
        if not (arguments.model / name).is_file():
            raise ConversionError(
                f"{arguments.model}: model folder must hold {name}, got none. "
                "Pass a folder written by hammer convert to-hf with its tokenizer."
            )
    print(generate(arguments))


def generate(arguments: argparse.Namespace) -> str:
    """The prompt and its continuation; no code from the folder is executed."""
    # Before transformers is imported, which reads both variables then.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("torch").setLevel(logging.ERROR)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from megatron_hammer.platforms.select import select_platform

    disable_progress_bar()
    torch.manual_seed(arguments.seed)
    device = select_platform()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    # "auto": the type in which the weights are stored, and not fp32.
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=False, dtype="auto").to(device)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    with torch.inference_mode():
        output = model.generate(
            # By name: a tokenizer may also return token_type_ids, and generate() refuses what the model does not use.
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.max_new_tokens,
            # transformers refuses to sample at a temperature of 0.
            **(sampling if arguments.temperature > 0 else {"do_sample": False}),
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
