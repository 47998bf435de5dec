"""What the check of layers feeds to both sides: which layers and rows, and hidden states that do not depend on a model.

A layer is run inside a model of one layer, whose vocabulary is the sampled rows: so the embedding, the positions, the
final norm and the head are each side's own, and the layer gets the same hidden states on both sides.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.verification.forward_exchange import SEED

NUM_ROWS = 64


def sample_layers(num_layers: int) -> tuple[int, ...]:
    """First, middle, last, and one more drawn by a fixed seed."""
    drawn = random.Random(SEED).randrange(num_layers)
    return tuple(sorted({0, num_layers // 2, num_layers - 1, drawn}))


def sample_rows(vocab_size: int) -> tuple[int, ...]:
    """Rows of the embedding and the head: the first and the last, and others drawn by a fixed seed."""
    drawn = random.Random(SEED).sample(range(vocab_size), min(NUM_ROWS, vocab_size))
    return tuple(sorted({0, vocab_size - 1, *drawn}))


def draw_hidden_states(num_tokens: int, hidden_size: int, *, seed: int) -> Tensor:
    """Hidden states [s, h] of standard deviation 1, some channels a few times larger, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    # About 2 in 100 channels are 5 times as large.
    scale = 1 + 4 * (torch.rand(hidden_size, generator=generator) > 0.98)
    return torch.randn(num_tokens, hidden_size, generator=generator) * scale


def draw_tokens(num_rows: int, *, length: int, seed: int = SEED) -> Tensor:
    """Token ids [s] below num_rows."""
    return torch.randint(0, num_rows, (length,), generator=torch.Generator().manual_seed(seed))


def describe_layer(saved: Any, layer: int) -> dict[str, Any]:
    """Megatron's arguments that differ between layers, for a model whose only layer is this one of `saved`."""
    changes: dict[str, Any] = {}
    window_frequency, rope_frequency = (
        getattr(saved, name, None) for name in ("window_attn_skip_freq", "no_rope_freq")
    )
    # Both patterns count from 1 where they are a number: every such layer has no window, or no rope.
    if window_frequency is not None:
        is_list = isinstance(window_frequency, list)
        has_window = window_frequency[layer] if is_list else (layer + 1) % window_frequency != 0
        changes["window_attn_skip_freq"] = [int(has_window)]
    if rope_frequency:
        is_list = isinstance(rope_frequency, list)
        lacks_rope = rope_frequency[layer] if is_list else (layer + 1) % rope_frequency == 0
        changes["no_rope_freq"] = [int(lacks_rope)]
    return changes


def shorten_window(window: int, shift: int, *, longest: int) -> int:
    """A window of `window` tokens less `shift`; one as long as the longest sequence changes nothing and stays."""
    return window if window >= longest else max(1, window - shift)


def select_names(names: Iterable[str], layer: int) -> dict[str, str]:
    """Stored name -> name with the layer numbered 0, of that layer's tensors and of those outside the layers."""
    selected = {}
    for name in names:
        parts = name.split(".")
        # Megatron and Llama name them layers, GPT-2 h.
        number = next((i for i in range(1, len(parts)) if parts[i].isdigit() and parts[i - 1] in ("layers", "h")), None)
        if number is None:
            selected[name] = name
        elif int(parts[number]) == layer:
            selected[name] = ".".join((*parts[:number], "0", *parts[number + 1 :]))
    return selected


@contextmanager
def replace_layer_input(layer: Any, hidden: Tensor) -> Iterator[list[Tensor]]:
    """While open, `layer` sees `hidden` as its input; yields the list that its outputs are appended to.

    The input may come as the first argument (transformers) or by the name hidden_states (megatron).
    """
    outputs: list[Tensor] = []

    def replace(
        _module: Any, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # megatron.core's TransformerBlock passes it by name, transformers' models by position.
        if "hidden_states" in named:
            return arguments, named | {"hidden_states": hidden}
        return (hidden, *arguments[1:]), named

    def record(_module: Any, _arguments: Any, output: Any) -> None:
        # Megatron's TransformerLayer returns (hidden states, context).
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    hooks = (layer.register_forward_pre_hook(replace, with_kwargs=True), layer.register_forward_hook(record))
    try:
        yield outputs
    finally:
        # The same layer may run again with another attention kernel.
        for hook in hooks:
            hook.remove()
