"""YaRN in config.json, read and written: the fields of rope_scaling or rope_parameters with rope_type yarn.

transformers names the factor of sines and cosines (`attention_factor`) or derives it from `mscale` and
`mscale_all_dim`; Megatron always derives it, so a named factor becomes the mscale that gives it.
Source: transformers.modeling_rope_utils._compute_yarn_parameters and megatron's YarnRotaryEmbedding.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_hammer.model.shape import YarnScaling

_FIELDS = """
    rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast
    beta_slow mscale mscale_all_dim truncate finetuned
"""
FIELDS = frozenset(_FIELDS.split())


def read_yarn(
    parameters: Mapping[str, Any], *, original_positions: Any, rope_theta: int
) -> tuple[YarnScaling | None, list[tuple[str, str]]]:
    """The scaling, None where it cannot be had; and (field, what it must be) of every field against it.

    original_positions: what transformers takes for original_max_position_embeddings.
    """
    factor: Any = parameters.get("factor")
    attention_factor: Any = parameters.get("attention_factor")
    # transformers' own `or`: null and 0 both mean the default.
    fast, slow = parameters.get("beta_fast") or 32.0, parameters.get("beta_slow") or 1.0
    mscale, mscale_all_dim = parameters.get("mscale") or 0.0, parameters.get("mscale_all_dim") or 0.0
    problems = [] if _is_number(factor, least=1) else [("factor", "a number of at least 1")]
    positions = original_positions
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
        problems.append(("original_max_position_embeddings", "a positive whole number"))
    problems += [
        (name, "a number that is not negative, or null")
        for name in ("attention_factor", "mscale", "mscale_all_dim")
        if parameters.get(name) is not None and not _is_number(parameters[name], least=0)
    ]
    if not (_is_number(fast, least=0) and _is_number(slow, least=0)) or slow <= 0 or fast < slow:
        problems.append(("beta_fast", f"a number of at least beta_slow={slow!r}, both above 0"))
    if attention_factor == 0:
        problems.append(("attention_factor", "above 0, or null"))
    if not isinstance(parameters.get("truncate", True), bool):
        problems.append(("truncate", "true or false"))
    problems += [(name, "left out, since no YaRN has it") for name in sorted(parameters.keys() - FIELDS)]
    if rope_theta <= 1:
        problems.append(("rope_theta", "above 1, since YaRN divides by its logarithm"))
    if problems:
        return None, problems
    if attention_factor is not None:
        if factor == 1 and attention_factor != 1:
            return None, [("attention_factor", "1 or null beside factor=1, where Megatron multiplies by nothing")]
        mscale, mscale_all_dim = _find_mscale(float(factor), float(attention_factor)), 0.0
    elif not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1.0, 0.0
    scaling = YarnScaling(
        factor=float(factor),
        original_max_position_embeddings=positions,
        beta_fast=float(fast),
        beta_slow=float(slow),
        mscale=float(mscale),
        mscale_all_dim=float(mscale_all_dim),
        has_whole_bounds=parameters.get("truncate", True),
    )
    return scaling, []


def write_yarn(scaling: YarnScaling) -> dict[str, Any]:
    """The fields that `read_yarn` reads back to an equal function."""
    fields: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    if scaling.mscale > 0 and scaling.mscale_all_dim > 0:
        fields |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    elif (scaling.mscale, scaling.mscale_all_dim) != (1.0, 0.0):
        # transformers reads the two only where neither is 0.
        fields["attention_factor"] = scaling.attention_factor
    if not scaling.has_whole_bounds:
        fields["truncate"] = False
    return fields


def _find_mscale(factor: float, attention_factor: float) -> float:
    """The mscale of which Megatron makes `attention_factor`, beside mscale_all_dim=0."""
    return 1.0 if factor == 1 else (attention_factor - 1) / (0.1 * math.log(factor))


def _is_number(value: Any, *, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf
