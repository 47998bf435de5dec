"""Compares what llama.cpp computes from a GGUF file with what transformers computes from its Hugging Face folder.

llama.cpp continues prompts greedily. transformers reads prompt and continuation in one pass: if every generated token
is also its likeliest, its own greedy continuation is the same, token by token. Only one of the two models is in memory
at a time. transformers computes in f32 from the stored weights, llama.cpp with its own kernels: for f16 and bf16 files
it also rounds activations, for quantized ones it quantizes them, which is why the tolerance depends on the type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_hammer.checkpoint.gguf.llama_cpp import GreedyStep, LlamaCpp
from megatron_hammer.checkpoint.gguf.tokenizer import GgufVocabulary

PROMPTS = (
    "春天来了，山里的茶农一早就上了路。老人说，头一场雨之后的三天，叶子最嫩，香气也最清，",
    "The keeper of the lighthouse wrote the number of every wave in a book that nobody read. In the autumn of 1987",
    "def merge_sorted(left, right):\n    merged = []\n    while left and right:\n        source = left if left[0]",
)
NUM_PROMPT_TOKENS = 48
NUM_GENERATED_TOKENS = 16
NUM_LIKELIEST = 20
# Largest difference of the log-probability of a likely token, and margin below which two tokens count as equally
# likely, in standard deviations of the logits. Measured at most on random models (3 layers, hidden 384, logits with
# standard deviation 0.6 to 1.6): f32 2e-5, f16 0.009, bf16 0.09; with weights of standard deviation 1, which
# magnify every rounding, bf16 0.33. Rows in a wrong order are beyond 2.
# Quantized files are not judged: q8_0 had 0.3 and q4_k_m 1.7 there, the price of quantization, not a mistake.
TOLERANCES: dict[str, float | None] = {"f32": 1e-3, "f16": 0.05, "bf16": 0.6}
MEMORY_RESERVE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """A prompt's ids and what llama.cpp made of them."""

    prompt: tuple[int, ...]
    steps: tuple[GreedyStep, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyComparison:
    """Over all prompts. num_equal: steps where both choose the same token.

    largest_margin: where they do not, by how much transformers prefers its own, at most; largest_difference: of a
    log-probability. Both in nats; logit_std is the standard deviation of transformers' logits.
    """

    num_steps: int
    num_equal: int
    largest_margin: float
    largest_difference: float
    logit_std: float


def continue_prompts(llama_cpp: LlamaCpp, vocabulary: GgufVocabulary, *, max_tokens: int) -> list[Continuation]:
    """Let llama.cpp continue every prompt greedily within `max_tokens` positions."""
    # The prompt is sent as ids, and `encode` adds no bos, so it is put in front here.
    bos = [vocabulary.bos_id] if vocabulary.adds_bos and vocabulary.bos_id is not None else []
    # A model with few positions must hold both the prompt and its continuation.
    num_generated = min(NUM_GENERATED_TOKENS, max(1, max_tokens // 2))
    num_prompt_tokens = min(NUM_PROMPT_TOKENS, max_tokens - num_generated)
    continuations = []
    for text in PROMPTS:
        prompt = (bos + vocabulary.encoder.encode(text).tolist())[:num_prompt_tokens]
        steps = llama_cpp.continue_greedily(prompt, num_tokens=num_generated, num_likeliest=NUM_LIKELIEST)
        continuations.append(Continuation(prompt=tuple(prompt), steps=tuple(steps)))
    return continuations


def compare_with_transformers(hf_dir: Path, continuations: Sequence[Continuation]) -> GreedyComparison:
    """Read every continuation with transformers; raises what transformers raises if it does not load the folder."""
    model = _load_model(hf_dir)
    expected = [_compute_next_logits(model, one) for one in continuations]
    return compare_steps(expected, continuations)


def compare_steps(expected: Sequence[Tensor], continuations: Sequence[Continuation]) -> GreedyComparison:
    """expected: for every continuation the reference's logits [steps, v] from which each of its tokens was chosen."""
    # 0 as a first entry: max() of the lists is defined if no token was generated at all.
    num_equal, margins, differences = 0, [0.0], [0.0]
    for logits, continuation in zip(expected, continuations, strict=True):
        log_probabilities = logits.log_softmax(-1)
        for row, step in zip(log_probabilities, continuation.steps, strict=True):
            num_equal += int(row.argmax()) == step.token
            # 0 where both choose the same token.
            margins.append((row.max() - row[step.token]).item())
            differences += [abs(row[token].item() - value) for token, value in step.log_probabilities.items()]
    return GreedyComparison(
        num_steps=sum(len(one.steps) for one in continuations),
        num_equal=num_equal,
        largest_margin=max(margins),
        largest_difference=max(differences),
        logit_std=torch.cat(list(expected)).std().item(),
    )


def judge(comparison: GreedyComparison, file_type: str) -> tuple[str, bool | None]:
    """A sentence for the table, and whether the two agree within the type's limit; None: the type has no limit."""
    tolerance = TOLERANCES.get(file_type)
    largest = comparison.largest_difference / comparison.logit_std
    sentence = (
        f"{comparison.num_equal} of {comparison.num_steps} greedy tokens equal; log-probabilities within "
        f"{comparison.largest_difference:.2g} nats of logits with standard deviation {comparison.logit_std:.2g}"
    )
    if comparison.num_equal < comparison.num_steps:
        sentence += f"; where they differ, transformers' margin is at most {comparison.largest_margin:.2g} nats"
    if tolerance is None:
        return sentence, None
    # Two tokens may change places if they are nearly equally likely; the margin says how nearly.
    is_near = largest <= tolerance and comparison.largest_margin / comparison.logit_std <= tolerance
    # No step at all (the model ends the text at once) proves nothing.
    return sentence, is_near and comparison.num_steps > 0


def find_obstacle(num_parameters: int) -> str | None:
    """Why transformers cannot read the model in f32 here, if so."""
    needed_bytes = 4 * num_parameters + MEMORY_RESERVE_BYTES  # f32
    available_bytes = psutil.virtual_memory().available
    if needed_bytes <= available_bytes:
        return None
    return (
        f"transformers needs {needed_bytes / 1e9:.1f} GB of memory for the model in f32, "
        f"{available_bytes / 1e9:.1f} GB are available"
    )


def _load_model(hf_dir: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def _compute_next_logits(model: Any, continuation: Continuation) -> Tensor:
    tokens = torch.tensor([[*continuation.prompt, *(step.token for step in continuation.steps)]])
    num_steps = len(continuation.steps)
    # The logits at a position choose the next token, so those of the last token choose none that llama.cpp generated.
    return model(tokens, logits_to_keep=num_steps + 1).logits[0, :num_steps].float()
