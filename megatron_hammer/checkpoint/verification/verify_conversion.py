"""Does a Hugging Face folder compute what a Megatron checkpoint computes? Both run for real, each in its own process.

`verify_model` starts transformers on the folder, then Megatron's GPTModel on the checkpoint, on this CPU, and returns a
row for every check. Where the model does not fit in memory, sampled layers are compared one at a time. The converters
call it on folders that do not have their names yet, after their own exact comparison of every tensor.
"""

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

import megatron_hammer
from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME
from megatron_hammer.checkpoint.verification.forward_exchange import (
    DEFAULT_TEXTS,
    MAX_TOKENS,
    MEGATRON_FINDINGS_FILE,
    NOT_DONE,
    TRANSFORMERS_FINDINGS_FILE,
    ForwardRequest,
    read_findings,
)
from megatron_hammer.checkpoint.verification.layer_check import sample_layers, sample_rows
from megatron_hammer.checkpoint.verification.verdicts import CheckRow, judge_layers, judge_logits
from megatron_hammer.checkpoint_files.checkpoint_reader import name_dtype
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.safetensors.weight_files import open_hf_weights
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.typed import read_json

__all__ = ["LEVELS", "CheckRow", "Level", "most_frequent_dtype", "verify_model"]

Level = Literal["auto", "logits", "layers", "tensors"]
LEVELS = ("auto", "logits", "layers", "tensors")

# The whole model is compared where its fp32 weights take at most this share of the memory that is free: while it
# loads, transformers was measured to need 1.6 times as much (hammer-1b4: 8.6 GiB), and Megatron's side less.
MODEL_MEMORY_SHARE = 1 / 3
# A layer is computed in fp32 where it takes at most this; else in bf16.
MAX_FP32_LAYER_BYTES = 1_500_000_000

_LAST_LINES = 3


def verify_model(
    megatron_dir: Path,
    hf_dir: Path,
    *,
    level: Level = "auto",
    iteration: int | None = None,
    texts: Sequence[str] | None = None,
    weights: str = "model",
) -> list[CheckRow]:
    """Compare what Megatron computes from `megatron_dir` with what transformers computes from `hf_dir`.

    level: "logits" the whole model on `texts`; "layers" sampled layers; "auto" whichever fits; "tensors" nothing (the
    converters compare every tensor exactly themselves). weights: "model" or "master", as for `open_checkpoint`.
    A side that crashes is a failed row. Raises HammerError only if one of the two cannot be opened.
    """
    if level not in LEVELS:
        raise ConversionError(f"verify: level must be one of {', '.join(LEVELS)}, got {level}. Choose one of them.")
    if level == "tensors":
        return []
    absent = [name for name in ("transformers", "megatron.training") if not _is_installed(name)]
    if absent:
        reason = f"{' and '.join(absent)} not installed: pip install megatron-core transformers"
        return [CheckRow("Megatron against transformers", reason, None)]
    request = plan_comparison(megatron_dir, hf_dir, level=level, iteration=iteration, texts=texts, weights=weights)
    with tempfile.TemporaryDirectory(prefix="megatron_hammer_") as name:
        folder = Path(name)
        request.write(folder)
        return _run_both(request, folder)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    # find_spec imports the parents of a dotted name, which a broken installation may not allow.
    except (ImportError, ValueError):
        return False


# --- planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What is read of config.json. GPT-2 spells the positions n_positions."""

    vocab_size: int
    max_position_embeddings: int | None = None
    n_positions: int | None = None
    sliding_window: int | None = None


def plan_comparison(
    megatron_dir: Path,
    hf_dir: Path,
    *,
    level: Level,
    iteration: int | None,
    texts: Sequence[str] | None,
    weights: str,
) -> ForwardRequest:
    """What to compare and in which dtype, from the sizes of both sides and the memory that is free."""
    reader = open_checkpoint(megatron_dir, iteration=iteration, weights=weights)
    stored = open_hf_weights(hf_dir)
    config = read_json(hf_dir / CONFIG_NAME, _Sizes, remedy="Fetch the file again.", raises=ConversionError)
    num_layers, vocab_size = reader.args.num_layers, config.vocab_size
    sizes = {name: math.prod(tensor.shape) for name, tensor in reader.tensors.items()}
    fp32_bytes = 4 * sum(sizes.values())
    free_bytes = psutil.virtual_memory().available
    # Only one side is in memory at a time, so one model's size decides.
    if level == "auto":
        level = "logits" if fp32_bytes <= MODEL_MEMORY_SHARE * free_bytes else "layers"
    if level == "layers":
        rows = sample_rows(vocab_size)
        layer_bytes = 4 * _count_largest_layer(sizes)
        is_fp32 = layer_bytes <= MAX_FP32_LAYER_BYTES
    else:
        rows = ()
        # True for every model that "auto" takes. A larger one, if "logits" was asked for, is computed in bf16.
        is_fp32 = fp32_bytes <= 2 * MODEL_MEMORY_SHARE * free_bytes
    # Of most elements: a few tensors, such as norms or routers, may be stored in fp32 beside bf16 weights.
    megatron_dtype = most_frequent_dtype((reader.tensors[name].dtype, size) for name, size in sizes.items())
    hf_dtype = most_frequent_dtype((stored.dtypes[name], math.prod(shape)) for name, shape in stored.shapes.items())
    # GPT-2's table of positions has no entry beyond this.
    max_positions = config.max_position_embeddings or config.n_positions or MAX_TOKENS
    num_tokens = min(MAX_TOKENS, max_positions)
    return ForwardRequest(
        megatron_dir=str(reader.directory),
        weights=weights,
        hf_dir=str(hf_dir),
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        window_shift=_plan_window_shift(reader.saved_args, config.sliding_window, num_tokens, max_positions),
        has_experts=bool(getattr(reader.args, "num_experts", None)),
        dtype="float32" if is_fp32 else "bfloat16",
        hf_dtype=name_dtype(hf_dtype),
        # An export may round (fp32 masters to bf16): the side with more bits is rounded alike before they are compared.
        megatron_rounding=name_dtype(hf_dtype) if hf_dtype.itemsize < megatron_dtype.itemsize else None,
        hf_rounding=name_dtype(megatron_dtype) if megatron_dtype.itemsize < hf_dtype.itemsize else None,
        texts=tuple(texts) if texts is not None else DEFAULT_TEXTS,
        layers=sample_layers(num_layers) if level == "layers" else None,
        rows=rows,
    )


def _plan_window_shift(saved: Any, sliding_window: int | None, num_tokens: int, max_positions: int) -> int:
    """Such that the longer of both sides' windows is a quarter of the texts.

    Both are shortened by as much, so that a difference between them stays, be it one token.
    """
    before = (getattr(saved, "window_size", None) or [-1])[0]
    windows = [window for window in (before + 1, sliding_window or 0) if window < max_positions]
    return max(0, max(windows, default=0) - num_tokens // 4)


def _count_largest_layer(sizes: Mapping[str, int]) -> int:
    """Elements of the largest layer; a mixture of experts has many times those of a dense layer."""
    layers: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith("decoder.layers."):
            layers[name.split(".")[2]] += size
    return max(layers.values(), default=0)


def most_frequent_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype of most elements. tensors: the dtype and the number of elements of each."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, num_elements in tensors:
        counts[dtype] += num_elements
    return counts.most_common(1)[0][0]


# --- running ---------------------------------------------------------------------------------------------------------


def _run_both(request: ForwardRequest, folder: Path) -> list[CheckRow]:
    """transformers, then Megatron; the first that does not finish is the only row."""
    sides = (
        ("transformers runs the folder", "transformers_forward", TRANSFORMERS_FINDINGS_FILE),
        ("Megatron runs the checkpoint", "megatron_forward", MEGATRON_FINDINGS_FILE),
    )
    findings = []
    for check, module, findings_file in sides:
        # One after the other: two models at a time need not fit, and Megatron reads what transformers has written.
        result = _run_side(module, folder)
        if result.returncode:
            return [CheckRow(check, _describe_end(result), False)]
        findings.append(read_findings(folder / findings_file))
        if NOT_DONE in findings[-1]:
            return [CheckRow(check, findings[-1][NOT_DONE], None)]
    judge = judge_logits if request.layers is None else judge_layers
    return judge(request, *findings)


def _run_side(module: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A side in a process of its own, which sees no GPU and no network; modules of the working directory stay out."""
    root = str(Path(megatron_hammer.__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": "",
        # Nothing is fetched, whatever names the folder mentions.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)  # of a launcher that this process may run under
    # -P: without it the working directory would be first on sys.path, with any file named like a module.
    command = [sys.executable, "-P", "-m", f"megatron_hammer.checkpoint.verification.{module}", str(folder)]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _describe_end(result: subprocess.CompletedProcess[str]) -> str:
    # The last lines of a Python traceback are the error itself.
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()][-_LAST_LINES:]
    how = f"killed by signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
    return f"{how}: {' | '.join(lines) or 'no message'}"
