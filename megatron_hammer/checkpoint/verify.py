"""Does a Hugging Face folder compute what a Megatron checkpoint computes? Both run for real, each in its own process.

`verify_model` starts transformers on the folder, then Megatron's GPTModel on the checkpoint, on this CPU, and returns a
row for every check. Where the model does not fit in memory, sampled layers are compared one at a time. The converters
call it on folders that do not have their names yet, after their own exact comparison of every tensor.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

import megatron_hammer
from megatron_hammer.checkpoint.forward_exchange import (
    DEFAULT_TEXTS,
    MAX_TOKENS,
    MEGATRON_FINDINGS_FILE,
    NOT_DONE,
    TRANSFORMERS_FINDINGS_FILE,
    ForwardRequest,
    read_findings,
)
from megatron_hammer.checkpoint.hf_weights import open_hf_weights
from megatron_hammer.checkpoint.layer_check import sample_layers, sample_rows
from megatron_hammer.checkpoint.reader import VOCABULARY_TENSORS, open_checkpoint
from megatron_hammer.errors import ConversionError

Level = Literal["auto", "logits", "layers", "tensors"]
LEVELS = ("auto", "logits", "layers", "tensors")

# The whole model is compared where its fp32 weights take at most this share of the memory that is free: transformers
# holds them once, and while it merges experts some of them twice.
MODEL_MEMORY_SHARE = 1 / 3
# A layer is computed in fp32 where it takes at most this; else in bf16.
MAX_FP32_LAYER_BYTES = 1_500_000_000

# Largest difference over the standard deviation of what is compared. fp32: two orders of the same sums; measured 5e-6
# to 4e-5 on random weights, while the twins (gate and up swapped, heads not interleaved) are off by 0.1 to 10. bf16:
# every layer rounds to 8 bits.
TOLERANCE_RATIO = {"float32": 1e-4, "bfloat16": 5e-2}
# A deep or badly conditioned model amplifies rounding: then this many times the difference between transformers' own
# two attention kernels on the same weights.
NOISE_FACTOR = 10.0
_LAST_LINES = 3


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One line of the table: what was checked, what came out, and whether that is right; None: not done, `result`
    says why.
    """

    check: str
    result: str
    is_passed: bool | None


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
    except (ImportError, ValueError):
        return False


# --- planning --------------------------------------------------------------------------------------------------------


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
    which = {} if weights == "model" else {"weights": weights}
    reader = open_checkpoint(megatron_dir, iteration=iteration, **which)
    stored = open_hf_weights(hf_dir)
    config = _read_config(hf_dir)
    num_layers, vocab_size = reader.args.num_layers, config["vocab_size"]
    sizes = {name: torch.Size(tensor.shape).numel() for name, tensor in reader.tensors.items()}
    fp32_bytes = 4 * sum(sizes.values())
    free_bytes = psutil.virtual_memory().available
    if level == "auto":
        level = "logits" if fp32_bytes <= MODEL_MEMORY_SHARE * free_bytes else "layers"
    if level == "layers":
        rows = sample_rows(vocab_size)
        layer_bytes = 4 * sum(size for name, size in sizes.items() if name not in VOCABULARY_TENSORS) // num_layers
        is_fp32 = layer_bytes <= MAX_FP32_LAYER_BYTES
    else:
        rows = ()
        is_fp32 = fp32_bytes <= 2 * MODEL_MEMORY_SHARE * free_bytes
    megatron_dtype = _most_frequent({name: t.dtype for name, t in reader.tensors.items()}, sizes)
    hf_dtype = _most_frequent(stored.dtypes, {name: torch.Size(shape).numel() for name, shape in stored.shapes.items()})
    max_positions = config.get("max_position_embeddings") or config.get("n_positions") or MAX_TOKENS
    return ForwardRequest(
        megatron_dir=str(reader.directory),
        iteration=None,
        weights=weights,
        hf_dir=str(hf_dir),
        vocab_size=vocab_size,
        num_tokens=min(MAX_TOKENS, max_positions),
        dtype="float32" if is_fp32 else "bfloat16",
        megatron_rounding=_dtype_name(hf_dtype) if hf_dtype.itemsize < megatron_dtype.itemsize else None,
        hf_rounding=_dtype_name(megatron_dtype) if megatron_dtype.itemsize < hf_dtype.itemsize else None,
        texts=tuple(texts) if texts is not None else DEFAULT_TEXTS,
        layers=sample_layers(num_layers) if level == "layers" else None,
        rows=rows,
    )


def _read_config(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["vocab_size"], int):
            raise ValueError(f"vocab_size={config['vocab_size']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path}: file must describe the model and its vocab_size, got {error!r}. Fetch it again."
        ) from error
    return dict(config)


def _most_frequent(dtypes: dict[str, torch.dtype], sizes: dict[str, int]) -> torch.dtype:
    """The dtype of most elements."""
    counts: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        counts[dtype] += sizes[name]
    return counts.most_common(1)[0][0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- running ---------------------------------------------------------------------------------------------------------


def _run_both(request: ForwardRequest, folder: Path) -> list[CheckRow]:
    """transformers, then Megatron; the first that does not finish is the only row."""
    sides = (
        ("transformers runs the folder", "transformers_forward", TRANSFORMERS_FINDINGS_FILE),
        ("Megatron runs the checkpoint", "megatron_forward", MEGATRON_FINDINGS_FILE),
    )
    findings = []
    for check, module, findings_file in sides:
        result = _run_side(module, folder)
        if result.returncode:
            return [CheckRow(check, _describe_end(result), False)]
        findings.append(read_findings(folder / findings_file))
        if NOT_DONE in findings[-1]:
            return [CheckRow(check, findings[-1][NOT_DONE], None)]
    describe = describe_logits if request.layers is None else describe_layers
    return describe(request, *findings)


def _run_side(module: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A side in a process of its own, which sees no GPU and no network; modules of the working directory stay out."""
    root = str(Path(megatron_hammer.__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)  # of a launcher that this process may run under
    command = [sys.executable, "-P", "-m", f"megatron_hammer.checkpoint.{module}", str(folder)]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _describe_end(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()][-_LAST_LINES:]
    how = f"killed by signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
    return f"{how}: {' | '.join(lines) or 'no message'}"


# --- rows ------------------------------------------------------------------------------------------------------------


def describe_logits(request: ForwardRequest, theirs: dict[str, Any], ours: dict[str, Any]) -> list[CheckRow]:
    """The rows of the whole model."""
    tolerance, cause = _tolerance(request, theirs["std"], theirs["noise"])
    source = "texts" if theirs["has_tokenizer"] else "sequences of random ids (the folder has no tokenizer)"
    on = f"{theirs['class']} in {request.dtype} on {theirs['num_texts']} {source}, {ours['num_tokens']} tokens"
    if not theirs["std"] > 0:
        return [CheckRow(f"logits, {on}", f"standard deviation {theirs['std']:.3g}: nothing to compare", False)]
    loss, expected_loss = (ours[name] / ours["num_targets"] for name in ("loss_sum", "reference_loss_sum"))
    return [
        CheckRow(
            f"logits, {on}",
            f"max |difference| {ours['max_logit']:.2e} at a standard deviation of {theirs['std']:.3g}; "
            f"tolerance {tolerance:.2e}, {cause}",
            ours["max_logit"] <= tolerance,
        ),
        CheckRow(
            "log-probabilities",
            f"max |difference| {ours['max_log_probability']:.2e}; tolerance {2 * tolerance:.2e}",
            ours["max_log_probability"] <= 2 * tolerance,
        ),
        CheckRow(
            "most probable token",
            f"equal at {ours['num_same_choice']} of {ours['num_tokens']} positions"
            + _describe_changed(ours, tolerance),
            ours["changed_margin"] <= 2 * tolerance,
        ),
        CheckRow(
            "mean loss",
            f"Megatron {loss:.6f}, transformers {expected_loss:.6f}",
            abs(loss - expected_loss) <= 2 * tolerance,
        ),
    ]


def _describe_changed(ours: dict[str, Any], tolerance: float) -> str:
    if ours["num_same_choice"] == ours["num_tokens"]:
        return ""
    return f"; the others were {ours['changed_margin']:.2e} apart at most, tolerance {2 * tolerance:.2e}"


def _tolerance(request: ForwardRequest, std: float, noise: float) -> tuple[float, str]:
    """The largest difference that is still rounding, and why that much."""
    plain = TOLERANCE_RATIO[request.dtype] * std
    if NOISE_FACTOR * noise > plain:
        return NOISE_FACTOR * noise, f"{NOISE_FACTOR:g} times what transformers' eager and sdpa attention differ by"
    return plain, f"{TOLERANCE_RATIO[request.dtype]:g} of it: {request.dtype} sums in another order"


def describe_layers(request: ForwardRequest, theirs: dict[str, Any], ours: dict[str, Any]) -> list[CheckRow]:
    """The rows of the sampled layers."""
    layers = ", ".join(map(str, request.layers or ()))
    output_tolerance, output_cause = _tolerance(request, ours["output_std"], theirs["noise"])
    logits_tolerance, logits_cause = _tolerance(request, ours["logits_std"], 0.0)
    return [
        CheckRow(
            f"decoder layers {layers}, {theirs['class']} in {request.dtype} on {request.num_tokens} hidden states each",
            f"max |difference| {ours['output']:.2e} at a contribution of standard deviation {ours['output_std']:.3g}; "
            f"tolerance {output_tolerance:.2e}, {output_cause}",
            ours["output"] <= output_tolerance,
        ),
        CheckRow(
            f"final norm and {len(request.rows)} rows of the head after them",
            f"max |difference| {ours['logits']:.2e} at a standard deviation of {ours['logits_std']:.3g}; "
            f"tolerance {logits_tolerance:.2e}, {logits_cause}",
            ours["logits"] <= logits_tolerance,
        ),
        CheckRow(
            f"{len(request.rows)} rows of the embedding",
            "equal" if ours["embedding"] == 0 else f"max |difference| {ours['embedding']:.2e}",
            ours["embedding"] == 0,
        ),
    ]
