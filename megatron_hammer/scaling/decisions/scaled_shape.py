"""A model of another size with the proportions of a given one, for plans whose size a loss law chooses.

Kept: the vocabulary, the width of a head, the number of query heads for each key, the ratio of the MLP to the hidden
size, and, as far as whole layers allow, the ratio of the hidden size to the number of layers.
"""

import math
from dataclasses import replace

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.loss_law.runs import ParameterConvention, count_size

SMALLEST_PARAMETERS, LARGEST_PARAMETERS = 1e6, 1e14
MOST_LAYERS = 512
SAME_SIZE_RATIO = 0.05  # the best size is far less certain than this, and the given model is a real one
LARGEST_MISS_RATIO = 0.1  # small models consist of their vocabulary, and cannot come closer
FFN_MULTIPLE = 128  # of the MLP's width, for whole tiles of matrix products at any tensor parallelism in use
# How much a miss of the size weighs against a miss of the proportions, both as squared logarithms.
SIZE_WEIGHT = 400.0


def scale_shape(base: ModelShape, num_parameters: float, convention: ParameterConvention) -> ModelShape:
    """The shape of about this N. Raises ConfigError if the base has no proportions that can be kept."""
    if base.moe is not None or base.latent_attention is not None:
        raise ConfigError(
            f"model: must be dense with plain attention for another size of it, got {base.name}. "
            "Pass --keep-model to plan this model, or another --preset."
        )
    if not SMALLEST_PARAMETERS <= num_parameters <= LARGEST_PARAMETERS:
        raise ConfigError(
            f"model: must have {SMALLEST_PARAMETERS:.0e} to {LARGEST_PARAMETERS:.0e} parameters, got "
            f"num_parameters={num_parameters:.3g} from the loss law. Choose a target nearer to its runs."
        )
    if abs(count_size(base, convention) / num_parameters - 1) < SAME_SIZE_RATIO:
        return base
    group = max(1, base.num_attention_heads // base.num_query_groups)
    unit = base.head_dim * group  # a key and its query heads stay whole
    aspect = base.hidden_size / base.num_layers
    best: tuple[float, ModelShape] | None = None
    multiple = 1
    while multiple * unit <= 16 * aspect * MOST_LAYERS:
        shape = _choose_layers(base, multiple * unit, num_parameters, convention)
        miss = math.log(count_size(shape, convention) / num_parameters)
        bend = math.log(shape.hidden_size / shape.num_layers / aspect)
        score = SIZE_WEIGHT * miss**2 + bend**2
        if best is None or score < best[0]:
            best = (score, shape)
        # Even numbers of keys, and multiples of eight beyond 16, so that tensor parallelism can divide them.
        multiple += 1 if multiple < 4 else 2 if multiple < 16 else 8 if multiple < 64 else multiple // 64 * 8
    assert best is not None
    found = count_size(best[1], convention)
    if abs(found / num_parameters - 1) > LARGEST_MISS_RATIO:
        raise ConfigError(
            f"model: must have about {num_parameters:.3g} parameters, got {found:.3g} as the nearest size with the "
            f"vocabulary of {base.name}. Choose another --preset, or a target of a larger model."
        )
    return best[1]


def _choose_layers(
    base: ModelShape, hidden_size: int, num_parameters: float, convention: ParameterConvention
) -> ModelShape:
    """The shape of this width whose number of layers comes closest; N is linear in the layers."""
    heads = hidden_size // base.head_dim
    ffn = max(1, round(hidden_size * base.ffn_hidden_size / base.hidden_size / FFN_MULTIPLE)) * FFN_MULTIPLE
    one = replace(
        base,
        name=f"{base.name}-scaled",
        source=f"proportions of {base.name}",
        num_layers=1,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=max(1, heads * base.num_query_groups // base.num_attention_heads),
        sliding_window=None,
        layers_without_rope=(),
    )
    alone = count_size(one, convention)
    layer = count_size(replace(one, num_layers=2), convention) - alone
    layers = min(max(1, round((num_parameters - alone) / layer + 1)), MOST_LAYERS)
    # An even number can be divided over pipeline stages.
    layers += layers % 2 if layers > 4 else 0
    return replace(one, num_layers=layers)
