"""Calibration samples for quantization: windows of token ids from the user's own text."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder

# Windows are drawn from this many times the tokens that they need: enough to spread them over many documents, without
# reading a whole corpus.
OVERSAMPLING = 8


def draw_samples(
    inputs: Sequence[str], encoder: Encoder, *, text_key: str, num_samples: int, seq_length: int, seed: int
) -> list[Tensor]:
    """`num_samples` windows [1, seq_length] int64, drawn without overlap; every input gives an equal share of them.

    inputs: files, globs or folders, as the preprocessor reads them. Documents are joined with the end-of-document token
    between them, as in pretraining. Raises DataError naming every input that has too little text, and ConfigError for
    fewer samples than inputs.
    """
    if num_samples < len(inputs):
        raise ConfigError(
            f"num-samples: must be at least 1 for each of the {len(inputs)} inputs of --calibration, got {num_samples}."
            f" Pass {len(inputs)} or more."
        )
    generator = np.random.default_rng(seed)
    samples: list[np.ndarray] = []
    problems = []
    for position, source in enumerate(inputs):
        share = num_samples // len(inputs) + (position < num_samples % len(inputs))
        ids = _read_ids(source, encoder, text_key=text_key, most_tokens=share * seq_length * OVERSAMPLING)
        windows = ids[: len(ids) // seq_length * seq_length].reshape(-1, seq_length)
        if len(windows) < share:
            problems.append(
                f"{source}: calibration text must give {share} samples of {seq_length} tokens "
                f"({share * seq_length:,} tokens), got {len(ids):,} tokens. Pass more text, or lower --num-samples or "
                "--seq-length."
            )
            continue
        samples += list(windows[generator.permutation(len(windows))[:share]])
    if problems:
        raise DataError(*problems)
    # Shuffled over the inputs, because the quantizer takes them in batches.
    return [torch.from_numpy(samples[index].astype(np.int64))[None] for index in generator.permutation(len(samples))]


def _read_ids(source: str, encoder: Encoder, *, text_key: str, most_tokens: int) -> np.ndarray:
    end = [] if encoder.eod_id is None else [encoder.eod_id]
    parts: list[np.ndarray] = []
    num_tokens = 0
    for document in read_documents([source], text_key):
        parts += [encoder.encode(document.text), np.array(end, dtype=np.int32)]
        num_tokens += len(parts[-2]) + len(end)
        if num_tokens >= most_tokens:
            break
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
