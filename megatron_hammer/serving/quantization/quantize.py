"""A Hugging Face folder to a folder in GPTQ or AWQ format: checked before, calibrated on the user's text, read back.

The path: open the source and refuse what does not suit, draw the samples, let AutoRound quantize, bring the rest to
fp16, read every packed layer back and compare it with the source, publish. Embeddings, the head, norms and biases are
not quantized: kernels for these formats read them in fp16. What the quantization costs is measured by comparison.py.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, read_config
from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.checkpoint_files.safetensors.weight_files import HfWeights, open_hf_weights
from megatron_hammer.errors import ConfigError, ConversionError
from megatron_hammer.files.publish import publish_directory, require_apart, require_result_folder
from megatron_hammer.serving.quantization.calibration import draw_samples
from megatron_hammer.serving.quantization.packed_weights import (
    PACKED_ENDINGS,
    copy_other_files,
    list_packed_layers,
    read_packed_layer,
    read_quantization,
)
from megatron_hammer.serving.quantization.run_auto_round import BITS, RoundingOptions, quantize_folder
from megatron_hammer.serving.quantization.source_model import GROUP_SIZES, QuantizableModel, open_quantizable
from megatron_hammer.tokenizer.encoding.encoder import load_encoder

REPORT_NAME = "quantization_report.json"
DEFAULT_SEQ_LENGTH = 2048
# In steps of the quantization, the mean over a layer. Rounding to nearest has a distance of 0.25; learned rounding had
# up to 0.61 with random weights. Normal weights in a wrong order have 2.8 with 4 bits and 45 with 8.
LARGEST_DISTANCE_STEPS = 1.5
# Of the signed difference, which is 0 for any rounding and 1 for a zero point that is off by one.
LARGEST_SHIFT_STEPS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationOptions:
    """calibration: files, globs or folders of documents; text_key: their field. seq_length: None for 2048, or the
    model's positions if it has fewer.
    """

    load_dir: Path
    save_dir: Path
    calibration: tuple[str, ...]
    rounding: RoundingOptions = field(default_factory=RoundingOptions)
    text_key: str = "text"
    num_samples: int = 128
    seq_length: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """What was written. source_bytes, quantized_bytes: of the weights. not_quantized: the other tensors."""

    save_dir: Path
    format: str
    bits: int
    group_size: int
    num_layers: int
    not_quantized: tuple[str, ...]
    source_bytes: int
    quantized_bytes: int
    num_samples: int
    seq_length: int
    seed: int
    checks: tuple[CheckRow, ...]
    elapsed_s: float


def quantize(
    options: QuantizationOptions, on_stage: Callable[[str, int, int | None], None] = lambda *_: None
) -> QuantizationReport:
    """Quantize a folder; the new one is there when it is complete, with `quantization_report.json`.

    Raises HammerError for a source, a shape, an option or a text that does not suit, before anything is computed.
    """
    started_at_s = time.monotonic()
    rounding = options.rounding
    _validate(options)
    require_apart(options.save_dir, [options.load_dir])
    if options.overwrite:
        require_result_folder(options.save_dir, REPORT_NAME)
    on_stage("source and samples", 0, 1)
    source = open_quantizable(options.load_dir, group_size=rounding.group_size)
    seq_length = _select_seq_length(options, source)
    samples = draw_samples(
        options.calibration,
        load_encoder(options.load_dir),
        text_key=options.text_key,
        num_samples=options.num_samples,
        seq_length=seq_length,
        seed=rounding.seed,
    )
    on_stage("source and samples", 1, 1)
    with publish_directory(options.save_dir, overwrite=options.overwrite, sources=[options.load_dir]) as partial_dir:
        on_stage("AutoRound", 0, 1)
        with tempfile.TemporaryDirectory(dir=partial_dir) as work_dir:
            written_dir = quantize_folder(options.load_dir, Path(work_dir), samples, rounding)
            _collect(written_dir, partial_dir, source)
        on_stage("AutoRound", 1, 1)
        checks, not_quantized = verify(source, partial_dir)
        report = QuantizationReport(
            save_dir=options.save_dir,
            format=rounding.format,
            bits=rounding.bits,
            group_size=rounding.group_size,
            num_layers=len(source.layers),
            not_quantized=not_quantized,
            source_bytes=source.weights.num_bytes,
            quantized_bytes=open_hf_weights(partial_dir).num_bytes,
            num_samples=options.num_samples,
            seq_length=seq_length,
            seed=rounding.seed,
            checks=checks,
            elapsed_s=time.monotonic() - started_at_s,
        )
        recipe = {**asdict(report), **asdict(rounding), "calibration": options.calibration}
        del recipe["elapsed_s"]  # the same input gives the same bytes
        recipe["save_dir"] = options.save_dir.name
        (partial_dir / REPORT_NAME).write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
    return report


def _validate(options: QuantizationOptions) -> None:
    rounding = options.rounding
    positive = {
        "iterations": rounding.iterations,
        "batch-size": rounding.batch_size,
        "num-samples": options.num_samples,
        "seq-length": 1 if options.seq_length is None else options.seq_length,
    }
    problems = [
        f"{name}: must be at least 1, got {value}. Pass a positive number."
        for name, value in positive.items()
        if value < 1
    ]
    if not 0 <= rounding.seed < 2**32:
        problems.append(f"seed: must be from 0 to {2**32 - 1}, got {rounding.seed}. Pass another.")
    if rounding.group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        problems.append(
            f"group-size: must be one of {allowed}, which kernels read, got {rounding.group_size}. Pass one of them."
        )
    if rounding.bits not in BITS[rounding.format]:
        allowed = " or ".join(map(str, BITS[rounding.format]))
        problems.append(
            f"bits: must be {allowed} with --format {rounding.format}, got {rounding.bits}. Pass --bits {allowed[0]}."
        )
    if problems:
        raise ConfigError(*problems)


def _select_seq_length(options: QuantizationOptions, source: QuantizableModel) -> int:
    positions = source.model.shape.max_position_embeddings
    seq_length = options.seq_length or min(DEFAULT_SEQ_LENGTH, positions)
    if seq_length > positions:
        raise ConfigError(
            f"seq-length: must be at most the model's positions, got seq_length={seq_length} for {positions}. "
            f"Pass --seq-length {positions}."
        )
    return seq_length


def _collect(written_dir: Path, target_dir: Path, source: QuantizableModel) -> None:
    """Bring AutoRound's weights, in fp16, and config.json, with the source's other files, into the output folder."""
    for path in sorted(written_dir.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(torch.float16)
                if not tensors[name].isfinite().all():
                    raise ConversionError(
                        f"{source.folder}: {name} must be within fp16, got values up to {tensor.abs().max():.3g}. "
                        "Kernels of this format compute in fp16: use checkpoint_convert/to_gguf.py."
                    )
        save_file(tensors, target_dir / path.name, metadata={"format": "pt"})
        del tensors
    for index_path in written_dir.glob("*.safetensors.index.json"):
        shutil.copyfile(index_path, target_dir / index_path.name)
    config = read_config(written_dir / CONFIG_NAME)
    # The source's fields, so that nothing of them changes; "torch_dtype" is what engines of before transformers 5 read.
    config = {**source.model.config, "quantization_config": config["quantization_config"]}
    for name in ("dtype", "torch_dtype"):
        config[name] = "float16"
    (target_dir / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    copy_other_files(source.folder, target_dir)


def verify(source: QuantizableModel, quantized_dir: Path) -> tuple[tuple[CheckRow, ...], tuple[str, ...]]:
    """Read a quantized folder back; returns the checks, and the names of the tensors that are not quantized.

    Raises ConversionError if a layer is not packed, or far from the source, or if another tensor has changed.
    """
    quantization = read_quantization(quantized_dir)
    weights = open_hf_weights(quantized_dir)
    packed = set(list_packed_layers(weights))
    problems = [
        f"{quantized_dir}: {layer} must be quantized, got plain weights. This is a defect of the command."
        for layer in source.layers
        if layer not in packed
    ]
    distances: dict[str, float] = {}
    for layer in sorted(packed & set(source.layers)):
        distances[layer], shift = _measure_difference(source, weights, layer, quantization)
        # Written so that a NaN is a problem too.
        if not (distances[layer] <= LARGEST_DISTANCE_STEPS and shift <= LARGEST_SHIFT_STEPS):
            problems.append(
                f"{quantized_dir}: {layer} must be near the source, got weights that differ by {distances[layer]:.3g} "
                f"steps of the quantization on average, and by {shift:.3g} in one direction. Look for weights that "
                "are not finite in the source; else this is a defect of the command."
            )
    others = tuple(name for name in weights.shapes if name.rpartition(".")[2] not in PACKED_ENDINGS)
    problems += [
        f"{quantized_dir}: {name} must be the source's in fp16, got other values. This is a defect of the command."
        for name in others
        if name not in source.weights.shapes
        or not torch.equal(weights.read(name), source.weights.read(name).to(torch.float16))
    ]
    if problems:
        raise ConversionError(*problems)
    return _describe_checks(distances, others), others


def _measure_difference(
    source: QuantizableModel, weights: HfWeights, layer: str, quantization: dict[str, Any]
) -> tuple[float, float]:
    """The mean distance of a layer's weights from the source's, and the size of their mean shift, both in steps."""
    expected = source.weights.read(f"{layer}.weight").float()
    got, steps = read_packed_layer(weights, layer, quantization)
    if got.shape != expected.shape:
        return math.nan, math.nan
    difference = (got - expected) / steps
    return difference.abs().mean().item(), abs(difference.mean().item())


def _describe_checks(distances: dict[str, float], others: tuple[str, ...]) -> tuple[CheckRow, ...]:
    worst = max(distances, key=lambda layer: distances[layer])
    return (
        CheckRow("packed layers", f"{len(distances)}: all linear layers of the blocks, read back", True),
        CheckRow("distance to the source", f"on average at most {distances[worst]:.2f} steps, in {worst}", True),
        CheckRow("other tensors", f"{len(others)}, embedding and head among them, equal to the source in fp16", True),
    )
