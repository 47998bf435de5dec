"""The command that serves a Hugging Face folder with vLLM, in place of llama.cpp; vLLM is a package of the user's."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_hammer.errors import PlatformError


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise PlatformError(
            "engine: vllm must be installed in this Python, got none. Run pip install vllm, or leave --engine out."
        )


def build_vllm_command(
    folder: Path,
    *,
    name: str,
    host: str,
    port: int,
    context_tokens: int | None,
    num_slots: int,
    batch_tokens: int | None,
    chat_template: Path | None,
) -> list[str]:
    """`vllm serve` with the same meanings of the flags as for llama.cpp; keys go through its environment.

    Source of the flags: vllm serve --help. Not given: what vLLM chooses, such as the model's whole context.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--served-model-name", name, "--host", host, "--port", str(port), "--max-num-seqs", str(num_slots)]
    options = {
        "--max-model-len": context_tokens,
        "--max-num-batched-tokens": batch_tokens,
        "--chat-template": chat_template,
    }
    return command + [word for flag, value in options.items() if value is not None for word in (flag, str(value))]


def build_vllm_environment(environment: Mapping[str, str], api_keys: tuple[str, ...]) -> dict[str, str]:
    """Without network: the folder is complete. The key is no argument, which every user of the machine could read."""
    keys = {"VLLM_API_KEY": api_keys[0]} if api_keys else {}
    return {**environment, "HF_HUB_OFFLINE": "1", **keys}
