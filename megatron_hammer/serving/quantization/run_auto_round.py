"""Runs AutoRound on a model in this process: it learns the rounding of the weights, block by block, and packs them.

Offline: the samples are our own, and the model and tokenizer are local folders. Torch, transformers and AutoRound are
imported here only.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_hammer.errors import ConversionError, PlatformError
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

# Under AutoRound's names. gptq is symmetric: its first version, which all kernels read, cannot store a zero point of 0.
# awq is asymmetric, as AutoAWQ writes it.
FORMATS = {"gptq": ("auto_gptq", True), "awq": ("auto_awq", False)}
BITS = {"gptq": (4, 8), "awq": (4,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingOptions:
    """format: a key of FORMATS. iterations: per block. device: `cpu`, or `cuda` for the first GPU."""

    format: str = "gptq"
    bits: int = 4
    group_size: int = 128
    iterations: int = 200
    batch_size: int = 8
    seed: int = 1234
    device: str = "cpu"


def require_auto_round() -> None:
    """Raise PlatformError if the package is not installed."""
    from importlib.util import find_spec

    if find_spec("auto_round") is None:
        raise PlatformError('auto-round: must be installed, got none. Run pip install "megatron_hammer[quantization]".')


def quantize_folder(folder: Path, output_dir: Path, samples: Sequence[Tensor], options: RoundingOptions) -> Path:
    """Quantize the linear layers of the blocks; returns the folder inside `output_dir` that AutoRound wrote.

    samples: token ids [1, s] each. The same samples, options and number of threads give the same files.
    """
    # huggingface_hub reads it when it is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    with quiet_libraries(), _process_state_restored():
        import torch
        import transformers
        from auto_round import AutoRound
        from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

        transformers.logging.set_verbosity_error()
        logging.getLogger("autoround").setLevel(logging.ERROR)
        is_cpu = options.device == "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            # CPU cores have no fast half precision. On a GPU, the stored type saves memory.
            dtype=torch.float32 if is_cpu else "auto",
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = load_with_transformers(folder)
        name, is_symmetric = FORMATS[options.format]
        rounding = SignRoundConfig(iters=options.iterations)
        rounding.bits, rounding.group_size, rounding.sym = options.bits, options.group_size, is_symmetric
        quantizer = AutoRound(
            model,
            tokenizer,
            alg_configs=rounding,
            dataset=list(samples),
            nsamples=len(samples),
            seqlen=samples[0].shape[1],
            batch_size=min(options.batch_size, len(samples)),
            seed=options.seed,
            device_map="cpu" if is_cpu else "cuda:0",
            amp=not is_cpu,
            enable_torch_compile=False,
            enable_deterministic_algorithms=True,
        )
        quantizer.quantize_and_save(output_dir=str(output_dir), format=name)
    # AutoRound puts the model into a folder of its own, whose name it makes from the source's.
    found = sorted(path.parent for path in output_dir.rglob("config.json"))
    if len(found) != 1:
        raise ConversionError(
            f"{output_dir}: AutoRound must write one model, got {len(found)}. This is a defect of the command."
        )
    return found[0]


@contextmanager
def _process_state_restored() -> Iterator[None]:
    """AutoRound switches deterministic algorithms on and sets a variable for cuBLAS; both end with it."""
    import torch

    environment, deterministic_mode = dict(os.environ), torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(deterministic_mode)
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings that a user can do nothing about, and progress bars only on a terminal."""
    from tqdm import tqdm

    build_bar = tqdm.__init__
    if not sys.stderr.isatty():
        # tqdm reads TQDM_DISABLE when it is imported, and others have done that.
        tqdm.__init__ = functools.partialmethod(build_bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = build_bar
