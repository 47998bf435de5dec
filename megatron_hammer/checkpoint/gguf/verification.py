"""The proof of a GGUF file by llama.cpp itself: it loads the file, and its tokens and logits are compared.

The tokenizer with the one that the vocabulary stands for (tokenizer_check.py), greedy continuations with
transformers (logits_check.py). What cannot be done on this machine says why and passes nothing.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint.gguf.llama_cpp import LlamaCpp, open_llama_cpp
from megatron_hammer.checkpoint.gguf.logits_check import (
    compare_with_transformers,
    continue_prompts,
    find_obstacle,
    judge,
)
from megatron_hammer.checkpoint.gguf.special_token_check import check_special_tokens
from megatron_hammer.checkpoint.gguf.tokenizer import GgufVocabulary
from megatron_hammer.checkpoint.gguf.tokenizer_check import (
    compare_tokenizers,
    list_examples,
    summarise_tokenizers,
)
from megatron_hammer.checkpoint.verification.verify_conversion import CheckRow
from megatron_hammer.corpus.readers import Document, read_documents
from megatron_hammer.data.preprocess.worker_pool import count_cores
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import SAMPLE_TEXTS

CONTEXT_TOKENS = 128  # more than the prompts and their continuations need; the cache of keys stays small
NUM_SAMPLED_PIECES = 2_000
NUM_EXAMPLES = 3  # of each cause
MOST_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufProof:
    """The rows of the table, and some texts that llama.cpp encodes in another way, one line each."""

    rows: tuple[CheckRow, ...]
    examples: tuple[str, ...] = ()


def explain_absence(*, is_asked: bool) -> str | None:
    """Why llama.cpp is not asked, if it is not."""
    if not is_asked:
        return "not asked: --no-verify"
    is_installed = importlib.util.find_spec("xllamacpp") is not None
    return None if is_installed else "not asked: xllamacpp is not installed (pip install xllamacpp)"


def verify_with_llama_cpp(
    path: Path,
    hf_dir: Path,
    vocabulary: GgufVocabulary,
    *,
    file_type: str,
    num_parameters: int,
    max_positions: int,
    corpus: tuple[str, ...] = (),
    text_key: str = "text",
    on_text: Callable[[int], None] = lambda num_texts: None,
) -> GgufProof:
    """Load `path` with llama.cpp and compare it with the folder that it was made from.

    Raises ConversionError if llama.cpp does not load it, DataError if `corpus` cannot be read.
    """
    max_tokens = min(CONTEXT_TOKENS, max_positions)
    num_threads = min(count_cores(), MOST_THREADS)
    sources = {"tokenizer, samples": _list_samples(vocabulary)}
    if corpus:
        sources["tokenizer, corpus"] = read_documents(corpus, text_key)
    rows: list[CheckRow] = []
    examples: list[str] = []
    with open_llama_cpp(path, num_context_tokens=max_tokens, num_threads=num_threads) as llama_cpp:
        for check, documents in sources.items():
            row, found = _compare(check, llama_cpp, vocabulary, documents, on_text)
            rows.append(row)
            examples += found
        rows += check_special_tokens(llama_cpp, vocabulary)
        continuations = continue_prompts(llama_cpp, vocabulary, max_tokens=max_tokens)
    # Asked after llama.cpp has ended, whose memory is free again by then.
    if obstacle := find_obstacle(num_parameters):
        rows.append(CheckRow("greedy tokens", f"llama.cpp answers; not compared: {obstacle}", None))
        return GgufProof(rows=tuple(rows), examples=tuple(examples))
    try:
        result = judge(compare_with_transformers(hf_dir, continuations), file_type)
    # What from_pretrained raises for a folder that it does not support. Other errors are defects and must be seen.
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        result = f"llama.cpp answers; not compared: transformers does not load the model ({reason})", None
    rows.append(CheckRow("greedy tokens", *result))
    return GgufProof(rows=tuple(rows), examples=tuple(examples))


def _compare(
    check: str,
    llama_cpp: LlamaCpp,
    vocabulary: GgufVocabulary,
    documents: Iterable[Document],
    on_text: Callable[[int], None],
) -> tuple[CheckRow, list[str]]:
    def tokenize(text: str) -> list[int]:
        return llama_cpp.tokenize(text, reads_control_tokens=vocabulary.reads_control_tokens)

    comparison = compare_tokenizers(vocabulary, tokenize, documents, on_text)
    return CheckRow(check, *summarise_tokenizers(comparison)), list_examples(comparison, most=NUM_EXAMPLES)


def _list_samples(vocabulary: GgufVocabulary) -> Iterable[Document]:
    """Texts that have told tokenizers apart, and pieces evenly spread over the vocabulary, each as a text."""
    # The ids of the encoder, not those of the file: padding rows have names that no text means.
    step = max(1, len(vocabulary.tokens) // NUM_SAMPLED_PIECES)
    pieces = (vocabulary.encoder.decode([token_id]) for token_id in range(0, vocabulary.encoder.vocab_size, step))
    texts = [*SAMPLE_TEXTS, *pieces]
    return (Document(text, "sample text", line) for line, text in enumerate(texts, start=1))
