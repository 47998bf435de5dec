"""What gpu.py measures on which machine: the model, the sizes of its runs, and the rows of its sweep.

`build_setting` has two: hammer-1b4 on a GPU, and a rehearsal with hammer-tiny on the CPU, which runs every part. No
torch here.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_hammer.data.indexed.pair_writer import IndexedWriter
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.presets.preset import Recipe

FULL_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
MLP_RECOMPUTE = ("--recompute-granularity", "selective", "--recompute-modules", "mlp")
FP8 = ("--fp8-format", "hybrid", "--fp8-recipe")
DOCUMENT_TOKENS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run of the sweep. flags: beyond the setting's own; the kernels and the loss are the run's defaults."""

    backend: str  # te, torch or transformers
    micro_batch_size: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        flags = " ".join(flag.removeprefix("--") for flag in self.flags)
        return f"{self.backend}, micro-batch {self.micro_batch_size}{', ' if flags else ''}{flags}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison of losses and gradients with those of the CPU in fp32; bounds are relative differences.

    Sources of the bounds: fp32 differs in the order of its sums, 1e-6 to 1e-5 of a gradient. TransformerEngine
    multiplies fp32 as TF32, with 10 bits of mantissa: 1e-3. bf16 has 8 bits, and the weights are rounded to it
    too: `--rehearse` measured 0.011 of a parameter's gradient, 1e-5 of the loss and 1e-4 of the norm on a CPU.
    """

    backend: str
    precision: str
    loss: float
    grad_norm: float
    gradient: float  # of every parameter: the norm of the difference by the norm of the gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Model, machine and sizes of all runs."""

    preset: str
    platform: str
    global_batch_size: int  # sequences of a step
    steps: int  # measured ones; trace.NUM_STEPS at least
    warmup_steps: int
    num_token_ids: int  # of the random data: also the vocabulary of the smaller model
    check_flags: tuple[str, ...]  # a smaller model for the losses and gradients
    checks: tuple[Check, ...]
    rows: tuple[Row, ...] = field(repr=False)  # by what a cut sweep would miss most

    @property
    def model(self) -> ModelShape:
        return PRESETS[self.preset].model

    @property
    def recipe(self) -> Recipe:
        return PRESETS[self.preset].recipe

    def list_flags(self, data_prefix: Path) -> list[str]:
        """Of every run: preset, platform and data."""
        return [
            *("--preset", self.preset, "--platform", self.platform, "--data-path", str(data_prefix)),
            *("--split", "100,0,0", "--tokenizer-type", "NullTokenizer", "--eval-iters", "0"),
        ]

    def list_row_flags(self, row: Row, data_prefix: Path) -> list[str]:
        """Of a row's run, whose step has as many micro-batches as fill the global batch."""
        num_steps = self.warmup_steps + self.steps
        return [
            *self.list_flags(data_prefix),
            *("--backend", row.backend, "--micro-batch-size", str(row.micro_batch_size)),
            *("--global-batch-size", str(max(self.global_batch_size, row.micro_batch_size))),
            *("--train-iters", str(num_steps), "--lr-warmup-iters", str(num_steps // 2), *row.flags),
        ]


GPU_CHECKS = (
    Check(backend="torch", precision="fp32", loss=1e-5, grad_norm=1e-4, gradient=1e-3),
    Check(backend="torch", precision="bf16", loss=2e-3, grad_norm=2e-2, gradient=6e-2),
    Check(backend="te", precision="fp32", loss=1e-4, grad_norm=5e-3, gradient=1e-2),
    Check(backend="te", precision="bf16", loss=2e-3, grad_norm=2e-2, gradient=6e-2),
)
GPU_ROWS = (
    Row(backend="torch", micro_batch_size=4),
    Row(backend="te", micro_batch_size=4),
    Row(backend="transformers", micro_batch_size=4),
    Row(backend="torch", micro_batch_size=8),
    Row(backend="te", micro_batch_size=8),
    Row(backend="torch", micro_batch_size=8, flags=("--no-triton-kernels",)),
    Row(backend="torch", micro_batch_size=8, flags=("--cross-entropy", "chunked")),
    Row(backend="te", micro_batch_size=8, flags=(*FP8, "tensorwise")),
    Row(backend="torch", micro_batch_size=16),
    Row(backend="transformers", micro_batch_size=8),
    Row(backend="te", micro_batch_size=8, flags=(*FP8, "delayed")),
    Row(backend="te", micro_batch_size=8, flags=(*FP8, "blockwise")),
    Row(backend="torch", micro_batch_size=16, flags=MLP_RECOMPUTE),
    Row(backend="torch", micro_batch_size=32, flags=FULL_RECOMPUTE),
    Row(backend="te", micro_batch_size=16),
    Row(backend="torch", micro_batch_size=8, flags=("--no-gradient-accumulation-fusion",)),
    Row(backend="te", micro_batch_size=8, flags=("--no-rope-fusion",)),
    Row(backend="te", micro_batch_size=8, flags=("--cross-entropy", "chunked")),
    Row(backend="torch", micro_batch_size=2),
    Row(backend="torch", micro_batch_size=1),
)


def build_setting(*, is_rehearsal: bool) -> Setting:
    if not is_rehearsal:
        return Setting(
            preset="hammer-1b4",
            platform="cuda",
            global_batch_size=64,
            steps=5,
            warmup_steps=3,
            num_token_ids=32_000,
            check_flags=("--num-layers", "2", "--vocab-size", "32000"),
            checks=GPU_CHECKS,
            rows=GPU_ROWS,
        )
    return Setting(
        preset="hammer-tiny",
        platform="cpu",
        global_batch_size=4,
        steps=2,
        warmup_steps=2,
        num_token_ids=4096,
        check_flags=("--num-layers", "2"),
        checks=tuple(check for check in GPU_CHECKS if check.backend == "torch"),
        rows=(
            Row(backend="torch", micro_batch_size=2),
            Row(backend="te", micro_batch_size=2),  # refused on a CPU: a failing row does not end the sweep
            Row(backend="transformers", micro_batch_size=2),
            Row(backend="torch", micro_batch_size=4, flags=FULL_RECOMPUTE),
        ),
    )


def write_data(prefix: Path, *, num_tokens: int, vocab_size: int) -> None:
    """Indexed data of random documents."""
    generator = np.random.default_rng(1234)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    lengths = np.full(-(-num_tokens // DOCUMENT_TOKENS), DOCUMENT_TOKENS)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(generator.integers(0, vocab_size, lengths.sum()).astype(dtype), lengths)
