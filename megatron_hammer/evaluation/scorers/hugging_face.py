"""A Hugging Face folder, computed by transformers. No code of the folder is run and nothing is fetched."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.errors import ConversionError
from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores, plan_batches, require_vocabulary
from megatron_hammer.files.command_line import importing
from megatron_hammer.tokenizer.encoding.encoder import (
    Encoder,
    HuggingFaceEncoder,
    load_encoder,
    load_through_transformers,
)
from megatron_hammer.tokenizer.encoding.loading_by_class import describe_other_loading, is_known_to_load_alike

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS_AT_ONCE = 256  # of logits that are brought to fp32: 0.1 GB at a vocabulary of 105,000


class HuggingFaceScorer(Scorer):
    """See Scorer. device: `cpu` or `cuda`. max_batch_tokens: that are computed at once."""

    def __init__(
        self, folder: Path, *, device: str, precision: str, max_batch_tokens: int, encoder: Encoder | None = None
    ):
        self.name = folder.absolute().name
        self.encoder = load_folder_encoder(folder) if encoder is None else encoder
        self.precision, self.max_batch_tokens = precision, max_batch_tokens
        self.model = load_model(folder, DTYPES[precision]).to(device)
        require_vocabulary(self.encoder, self.model.get_input_embeddings().weight.shape[0], str(folder))
        self.max_length = read_max_length(self.model.config, folder)

    def score(self, sequences: Sequence[Sequence[int]], num_targets: Sequence[int] | None = None) -> list[TokenScores]:
        counts = self.count_targets(sequences, num_targets)
        scores: list[TokenScores | None] = [None] * len(sequences)
        for batch in plan_batches([len(ids) for ids in sequences], self.max_batch_tokens):
            inputs = [sequences[number][:-1] for number in batch]
            first = min(len(ids) - counts[number] for ids, number in zip(inputs, batch, strict=True))
            logits = self._compute_logits(inputs, first)
            for row, (number, ids) in zip(logits, zip(batch, inputs, strict=True), strict=True):
                targets = torch.tensor(sequences[number][-counts[number] :], device=row.device)
                scores[number] = score_rows(row[len(ids) - counts[number] - first : len(ids) - first], targets)
        return [one for one in scores if one is not None]

    def choose_next(self, sequences: Sequence[Sequence[int]]) -> list[int]:
        chosen = [0] * len(sequences)
        for batch in plan_batches([len(ids) for ids in sequences], self.max_batch_tokens):
            inputs = [sequences[number] for number in batch]
            first = min(map(len, inputs)) - 1
            for row, number in zip(self._compute_logits(inputs, first), batch, strict=True):
                chosen[number] = int(row[len(sequences[number]) - 1 - first].argmax())
        return chosen

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, is_done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """As Scorer.generate, one prompt after the other with a cache of keys and values."""
        return [self._continue(list(prompt), max_new_tokens, is_done) for prompt in prompts]

    @torch.inference_mode()
    def _continue(self, prompt: list[int], max_new_tokens: int, is_done: Callable[[list[int]], bool]) -> list[int]:
        new: list[int] = []
        cache, ids = None, prompt
        while len(new) < max_new_tokens and len(prompt) + len(new) <= self.max_length:
            tokens = torch.tensor([ids], device=self.model.device)
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            new.append(int(output.logits[0, -1].argmax()))
            if is_done(new):
                break
            cache, ids = output.past_key_values, new[-1:]
        return new

    @torch.inference_mode()
    def _compute_logits(self, inputs: Sequence[Sequence[int]], first: int) -> Tensor:
        """Logits [b, s - first, v] from position `first` on; padding is on the right, where nothing attends to it."""
        longest = max(map(len, inputs))
        tokens = torch.zeros(len(inputs), longest, dtype=torch.int64)
        mask = torch.zeros(len(inputs), longest, dtype=torch.int64)
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        device = self.model.device
        logits: Tensor = self.model(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            logits_to_keep=longest - first,
            use_cache=False,
        ).logits
        return logits


def score_rows(logits: Tensor, targets: Tensor) -> TokenScores:
    """Scores of targets [n] under whole logits [n, v]."""
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(rows.float(), ids, reduction="none")
            for rows, ids in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
        ]
    )
    is_greedy: np.ndarray = (logits.argmax(-1) == targets).cpu().numpy()
    return TokenScores(-losses.double().cpu().numpy(), is_greedy)


def load_folder_encoder(folder: Path) -> Encoder:
    """The tokenizer that AutoTokenizer makes of the folder, which can differ from its tokenizer.json by its class."""
    encoder = load_encoder(folder)
    is_known = isinstance(encoder, HuggingFaceEncoder) and is_known_to_load_alike(encoder)
    if is_known or describe_other_loading(encoder) is None:
        return encoder
    return load_through_transformers(folder)


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model in evaluation mode; raises ConversionError with transformers' words if it does not load."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    with importing():
        import transformers
        from transformers import AutoModelForCausalLM
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own for a damaged folder
        raise ConversionError(
            f"{folder}: transformers must load the model, got: {(str(error) or repr(error)).splitlines()[0]}. "
            "Pass a folder that save_pretrained or hammer convert to-hf wrote."
        ) from error
    # transformers fills missing tensors with random numbers and only warns.
    if missing := sorted(loading["missing_keys"]) or sorted(map(str, loading["mismatched_keys"])):
        raise ConversionError(
            f"{folder}: weights must hold every tensor of the model, got none that fits for {missing[:3]}. "
            "Copy the folder again."
        )
    return model.eval()


def read_max_length(config: Any, folder: Path) -> int:
    """The longest sequence that the model was made for; raises ConversionError if its config.json does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise ConversionError(
            f"{folder / 'config.json'}: max_position_embeddings must be a positive number, got {length}. Add it."
        )
    return length
