"""A GGUF file, computed by llama.cpp on the CPU with its own tokenizer.

llama.cpp's server gives probabilities only of tokens that it generates. So each scored token is one request: the tokens
before it as the prompt, and a bias that forces the choice. The answer has the probability without the bias. This is
exact and slow, some milliseconds per token; limit the documents.
"""

import contextlib
import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_hammer.checkpoint.gguf.header import read_gguf_header
from megatron_hammer.checkpoint.gguf.llama_cpp import LlamaCpp, open_llama_cpp
from megatron_hammer.errors import ConversionError, PlatformError
from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores
from megatron_hammer.tokenizer.encoding.encoder import Encoder
from megatron_hammer.tokenizer.encoding.special_tokens import SpecialTokens

MAX_CONTEXT_TOKENS = 4096  # keys and values are kept in fp32; llama.cpp takes fewer where the model reads fewer
MAX_THREADS = 8
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"


class LlamaCppEncoder(Encoder):
    """The tokenizer inside a GGUF file; control tokens that are spelt out in a text stay text."""

    def __init__(self, path: Path, llama_cpp: LlamaCpp):
        self._llama_cpp = llama_cpp
        header = read_gguf_header(path, arrays=(_TOKENS, _MERGES))
        tokens, merges = header[_TOKENS], header.get(_MERGES)
        self.path, self.vocab_size = path, len(tokens)
        self.sha256 = hashlib.sha256(repr((tokens, merges)).encode(errors="surrogatepass")).hexdigest()
        self.special_tokens = SpecialTokens(path)
        for name, key in (("bos_token", "bos"), ("eos_token", "eos")):
            self.special_tokens.ids[name] = header.get(f"tokenizer.ggml.{key}_token_id")  # type: ignore[index]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._llama_cpp.tokenize(text), dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._llama_cpp.detokenize([int(token) for token in ids])


class GgufScorer(Scorer):
    """See Scorer; obtain it with `open_gguf`."""

    def __init__(self, path: Path, llama_cpp: LlamaCpp):
        self.encoder = LlamaCppEncoder(path, llama_cpp)
        self._llama_cpp = llama_cpp
        self.name = path.stem
        described = llama_cpp.read_model()
        self.precision = f"{described['ftype']} in llama.cpp"
        # One position is left for the token that is generated.
        self.max_length = described["n_ctx"] - 1
        # A whole character: of a part of one, llama.cpp says no probability.
        self._anchor = int(self.encoder.encode("a")[-1])

    def score(self, sequences: Sequence[Sequence[int]], num_targets: Sequence[int] | None = None) -> list[TokenScores]:
        counts = self.count_targets(sequences, num_targets)
        scores = []
        for ids, count in zip(sequences, counts, strict=True):
            found = [self._score_token(ids[:end], ids[end]) for end in range(len(ids) - count, len(ids))]
            logs, are_greedy = zip(*found, strict=True)
            scores.append(TokenScores(np.array(logs), np.array(are_greedy)))
        return scores

    def choose_next(self, sequences: Sequence[Sequence[int]]) -> list[int]:
        chosen = []
        for ids in sequences:
            tokens = self._llama_cpp.complete(ids)["tokens"]
            # llama.cpp leaves out the token that ends a text.
            chosen.append(tokens[0] if tokens else self._find_end())
        return chosen

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, is_done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """As Scorer.generate, one prompt after the other: llama.cpp keeps what it has computed of the last one."""
        continue_one = functools.partial(super().generate, max_new_tokens=max_new_tokens, is_done=is_done)
        return [continue_one([prompt])[0] for prompt in prompts]

    def _score_token(self, ids: Sequence[int], target: int) -> tuple[float, bool]:
        """Log-probability of `target` behind `ids`, and whether it is the likeliest token there."""
        entries = self._llama_cpp.complete(ids, forced=target, num_likeliest=1).get("completion_probabilities")
        if entries and entries[0]["id"] == target:
            return _read_number(entries[0]["logprob"]), entries[0]["top_logprobs"][0]["id"] == target
        # A part of a character, or the end of a text: another token is forced, and all probabilities are listed.
        answer = self._llama_cpp.complete(ids, forced=self._anchor, num_likeliest=self.encoder.vocab_size)
        likeliest = answer["completion_probabilities"][0]["top_logprobs"]
        found = [one["logprob"] for one in likeliest if one["id"] == target]
        return _read_number(found[0] if found else None), likeliest[0]["id"] == target

    def _find_end(self) -> int:
        if self.encoder.eod_id is None:
            raise ConversionError(f"{self.encoder.path}: file must name the token that ends a text, got none.")
        return self.encoder.eod_id


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[GgufScorer]:
    """Load the file with llama.cpp; raises PlatformError without it, ConversionError if the file does not load."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise PlatformError(
            f"{path}: a GGUF file needs xllamacpp, which is not installed. Run pip install 'megatron_hammer[gguf]'."
        )
    num_threads = min(torch.get_num_threads(), MAX_THREADS)  # which OMP_NUM_THREADS sets
    with open_llama_cpp(path, num_context_tokens=MAX_CONTEXT_TOKENS, num_threads=num_threads) as llama_cpp:
        yield GgufScorer(path, llama_cpp)


def _read_number(value: float | None) -> float:
    """JSON has no NaN: llama.cpp writes null."""
    return math.nan if value is None else float(value)
