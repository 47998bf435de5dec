"""How a field of config.json is read and when it is refused; the problems are collected and raised together.

The families (families/) say which field means what.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hammer.checkpoint.hugging_face.yarn_fields import read_yarn
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import RopeScaling, YarnScaling


def _is_absent(value: Any) -> bool:
    return not value


def _is_one(value: Any) -> bool:
    return value is None or value == 1


def _is_full_attention(kinds: Any) -> bool:
    """Classes that can have a window, such as Qwen2, write layer_types also where all layers are alike."""
    return not kinds or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))


# Field of any family: (whether a value changes nothing, why other values cannot be converted). transformers reads some
# of these fields only for classes that are not mapped. In a file of a mapped class they mean that the model's author
# computes something else, so they are refused there too.
_QUIET: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layer_types": (_is_full_attention, "in this family every layer must have full attention"),
    "quantization_config": (_is_absent, "quantized weights are not mapped"),
    "compression_config": (_is_absent, "compressed weights are not mapped"),
    "partial_rotary_factor": (_is_one, "this family is mapped with a rope of every dimension of a head"),
    "rotary_pct": (_is_one, "Megatron's mapped models rotate every dimension of a head"),
    "rope_interleaved": (_is_absent, "rotated pairs must stand half a head apart"),
    "use_mrope": (_is_absent, "a rope over several axes is not mapped"),
    "qk_norm": (_is_absent, "of this family no norm on queries and keys is mapped"),
    "use_qk_norm": (_is_absent, "of this family no norm on queries and keys is mapped"),
    "qk_layernorm": (_is_absent, "of this family no norm on queries and keys is mapped"),
    "no_rope_layers": (_is_absent, "every layer must have the same position embedding"),
    "no_rope_layer_interval": (_is_absent, "every layer must have the same position embedding"),
    "alibi": (_is_absent, "ALiBi is not mapped"),
    "attention_sink": (_is_absent, "attention sinks are not mapped"),
    "attention_sinks": (_is_absent, "attention sinks are not mapped"),
    "attention_chunk_size": (_is_absent, "attention within chunks is not mapped"),
    "attn_temperature_tuning": (_is_absent, "a temperature of the attention is not mapped"),
    "attn_logit_softcapping": (_is_absent, "capped attention scores are not mapped"),
    "final_logit_softcapping": (_is_absent, "capped logits are not mapped"),
    "logit_scale": (_is_one, "scaled logits are not mapped"),
    "logits_scaling": (_is_one, "scaled logits are not mapped"),
    "embedding_multiplier": (_is_one, "scaled embeddings are not mapped"),
    "residual_multiplier": (_is_one, "scaled residuals are not mapped"),
    "attention_multiplier": (lambda value: value is None, "another scale of the attention is not mapped"),
    "use_parallel_residual": (_is_absent, "attention and MLP side by side are not mapped"),
    "parallel_attn": (_is_absent, "attention and MLP side by side are not mapped"),
    "num_nextn_predict_layers": (_is_absent, "multi-token prediction layers are not mapped"),
    "is_encoder_decoder": (_is_absent, "only decoders are mapped"),
    "pruned_heads": (_is_absent, "pruned heads are not mapped"),
    "mlp_only_layers": (_is_absent, "every layer of this family must be a mixture of experts"),
    "decoder_sparse_step": (_is_one, "every layer of this family must be a mixture of experts"),
    "first_k_dense_replace": (_is_absent, "every layer of this family must be a mixture of experts"),
    "moe_layer_freq": (_is_one, "every layer must be a mixture of experts"),
    "scoring_func": (lambda value: value in (None, "softmax"), "the router of this family uses softmax"),
    "routed_scaling_factor": (_is_one, "scaled router weights are not mapped"),
    "n_group": (_is_one, "group-limited routing is not mapped"),
    "n_shared_experts": (_is_absent, "a shared expert without a gate is not mapped"),
}
MAX_LAYERS = 100_000  # as training takes; a list of 2**31 layers would not end
MAX_COUNT = 2**31 - 1  # Megatron's kernels index with 32 bits
_LAYER_TYPES = ("full_attention", "sliding_attention")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_OWN_CODE = ("AutoModelForCausalLM", "AutoModel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """A rotary embedding in Megatron's terms; at most one of scaling and interpolation_factor is there."""

    base: int = 10_000
    scaling: RopeScaling | YarnScaling | None = None
    interpolation_factor: int | None = None
    percent: float = 1.0  # of the channels of a head


class HfFields:
    """config.json as it is read, and the problems found on the way."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._problems: list[str] = []

    def raise_problems(self) -> None:
        """Raise one ConversionError with every problem so far."""
        if self._problems:
            raise ConversionError(*dict.fromkeys(self._problems))

    def refuse(self, name: str, reason: str) -> None:
        """Note that the value of `name` cannot be converted."""
        self._problems.append(
            f"config.json, {name}: cannot be converted, got {name}={self._config.get(name)!r}: {reason}. "
            "Use a model without it."
        )

    def count(self, name: str, default: int | None = None) -> int:
        """A positive whole number. A missing or wrong one is a problem, and 1 is returned in its place."""
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        # bool first: in Python True is an int.
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            self._wrong(name, f"a positive whole number up to {MAX_COUNT:,}", value)
            return 1
        return value

    def count_or_zero(self, name: str, default: int) -> int:
        """A whole number that is not negative."""
        value = self._config.get(name, default)
        return 0 if type(value) is int and value == 0 else self.count(name, default)

    def layers(self) -> range:
        """The numbers of the layers, for rows that say something of each."""
        num_layers = self.count("num_hidden_layers")
        if num_layers > MAX_LAYERS:
            self.refuse("num_hidden_layers", f"no model has more than {MAX_LAYERS:,}")
        return range(min(num_layers, MAX_LAYERS))

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers that are not negative; empty where it is absent."""
        values = self._config.get(name) or []
        if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
            self._wrong(name, "a list of layers, counted from 0", values)
            return []
        return values

    def choices(self, name: str, allowed: Sequence[str], *, length: int) -> list[str] | None:
        """A list of that many of the allowed words; None where it is absent."""
        values = self._config.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != length or any(value not in allowed for value in values):
            self._wrong(name, f"a list of {length} of {', '.join(allowed)}", values)
            return None
        return values

    def number(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self._config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            self._wrong(name, "a number that is not negative", value)
            return default
        return float(value)

    def multiplier(self, name: str) -> float:
        """A positive number; 1 where it is absent."""
        value = self.number(name, 1.0)
        if value == 0:
            self._wrong(name, "a positive number", value)
            return 1.0
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._wrong(name, "true or false", value)
            return default
        return value

    def _is_noted(self, *names: str) -> bool:
        """Whether one of these fields is a problem already, so that its value has no meaning."""
        return any(problem.startswith(f"config.json, {name}:") for problem in self._problems for name in names)

    def _wrong(self, name: str, expected: str, value: Any) -> None:
        self._problems.append(
            f"config.json, {name}: must be {expected}, got {name}={value!r}. Restore the file as transformers wrote it."
        )

    def require_class(self, names: Sequence[str], *, is_known_code: bool) -> None:
        """The class that computes the model must be the family's own."""
        classes = self._config.get("architectures")
        if classes and not (isinstance(classes, list) and any(name in classes for name in names)):
            self._problems.append(
                f"config.json, architectures: must be {names[0]}, got architectures={classes!r}. "
                "Use the causal language model of this family."
            )
        own_code = self._config.get("auto_map") or {}
        # auto_map may also name a tokenizer or a config, which do not compute anything.
        names_a_model = not isinstance(own_code, dict) or any(name in own_code for name in _OWN_CODE)
        if names_a_model and not is_known_code:
            self.refuse("auto_map", "the folder brings code of its own, which is never run and may compute anything")

    def require_nothing_else(self, read_here: Collection[str] = ()) -> None:
        """Refuse every field, of any family, that asks for what is not mapped; read_here: those of this family."""
        for name, (is_quiet, reason) in _QUIET.items():
            if name not in read_here and not is_quiet(self._config.get(name)):
                self.refuse(name, reason)

    def require_choice(self, name: str, choices: Sequence[str], *, default: str) -> str:
        """Return the value, which must be one of `choices`."""
        value = self._config.get(name, default)
        if value not in choices:
            self.refuse(name, f"only {', '.join(choices)} can be")
        return value

    def require_false(self, name: str, reason: str) -> None:
        """A switch that must be off or absent."""
        if self._config.get(name):
            self.refuse(name, reason)

    def num_experts(self) -> int:
        """num_experts or num_local_experts: transformers 5 writes the second name, version 4 wrote the first."""
        name = "num_local_experts" if self._config.get("num_experts") is None else "num_experts"
        if self._config.get("num_local_experts") not in (None, self._config.get(name)):
            self.refuse("num_local_experts", "num_experts says something else")
        return self.count(name)

    def require_no_experts(self) -> None:
        """Refuse a number of experts in the config.json of a dense model."""
        for name in _EXPERT_COUNTS:
            if self._config.get(name):
                self.refuse(name, "this family is mapped without experts")

    def require_no_window(self, *, default: int | None) -> None:
        """Refuse a sliding window that is shorter than the longest sequence; a longer one changes nothing."""
        window = self._config.get("sliding_window", default)
        # null switches the window off in the classes of Mistral and Mixtral.
        if window is None:
            return
        longest = self._config.get("max_position_embeddings")
        if not isinstance(window, int) or not isinstance(longest, int) or window < longest:
            self._problems.append(
                f"config.json, sliding_window: must be null or at least max_position_embeddings={longest}, got "
                f"sliding_window={window!r}. Use a model with full attention, or one whose sequences fit in the window."
            )

    def has_value(self, name: str, default: Any) -> bool:
        """Whether the field is not null; an absent one has the default."""
        return self._config.get(name, default) is not None

    def window(self, default: int | None) -> int | None:
        """sliding_window; None where it is null, or as long as the longest sequence, which sees all of it anyway."""
        if not self.has_value("sliding_window", default):
            return None
        window = self.count("sliding_window", default)
        return None if window >= self.count("max_position_embeddings") else window

    def windowed_layers(self, default: Iterable[int]) -> tuple[int, ...]:
        """The layers, from 0, that layer_types gives a window; `default` without that list."""
        kinds, num_layers = self._config.get("layer_types"), self.count("num_hidden_layers")
        if kinds is None:
            return tuple(default)
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in _LAYER_TYPES for kind in kinds):
            self._wrong("layer_types", f"one of {', '.join(_LAYER_TYPES)} for each of {num_layers} layers", kinds)
            return ()
        return tuple(layer for layer, kind in enumerate(kinds) if kind == _LAYER_TYPES[1])

    def query_groups(self, heads: int, *, may_be_absent: bool) -> int:
        """Key and value heads. Null means one for every query head; so does an absent field in the older families."""
        # The defaults of these classes are numbers, such as 8 or 32, and fit one size of model only.
        if not may_be_absent and "num_key_value_heads" not in self._config:
            self._wrong("num_key_value_heads", "a positive whole number", None)
        groups = self.count("num_key_value_heads", default=heads)
        if heads % groups and not self._is_noted("num_attention_heads", "num_key_value_heads"):
            self.refuse("num_key_value_heads", f"it must divide num_attention_heads={heads}")
        return groups

    def head_dim(self, hidden_size: int, heads: int, *, default: int | None = None, must_fill: bool = False) -> int:
        """Width of a head."""
        is_filled = hidden_size % heads == 0 or self._is_noted("hidden_size", "num_attention_heads", "n_embd", "n_head")
        if (must_fill or (self._config.get("head_dim") is None and default is None)) and not is_filled:
            self._problems.append(
                f"config.json, hidden_size: must be a multiple of the number of heads, got hidden_size={hidden_size}, "
                f"heads={heads}. Restore the file as transformers wrote it."
            )
            return 1
        if must_fill:
            return hidden_size // heads
        return self.count("head_dim", default=default or hidden_size // heads)

    def layers_without_rope(self, num_layers: int, *, may_be_empty: bool = False) -> tuple[int, ...]:
        """SmolLM3's layers, from 0: those with a 0 in no_rope_layers, or without that list every 4th or so.

        may_be_empty: an empty list stands for none (Llama 4).
        """
        pattern = self._config.get("no_rope_layers")
        if pattern is None or (may_be_empty and pattern == []):
            interval = self.count("no_rope_layer_interval", default=4)
            return tuple(range(interval - 1, num_layers, interval))
        # transformers takes a longer list, of which it reads the beginning.
        if not isinstance(pattern, list) or len(pattern) < num_layers or any(has not in (0, 1) for has in pattern):
            self._wrong("no_rope_layers", f"a list with 1 or 0 for each of {num_layers} layers", pattern)
            return ()
        return tuple(layer for layer, has_rope in enumerate(pattern[:num_layers]) if not has_rope)

    def rope(
        self,
        default_theta: float,
        *,
        may_be_partial: bool = False,
        default_percent: float = 1.0,
        has_fixed_bounds: bool = True,
    ) -> Rope:
        """The rotary embedding. transformers 4 writes its scaling to rope_scaling, version 5 to rope_parameters.

        may_be_partial: the family may turn a share of a head's channels. has_fixed_bounds: a llama3 scaling must have
        the numbers that megatron-core has built in.
        """
        older, newer = self._config.get("rope_scaling") or {}, self._config.get("rope_parameters") or {}
        name = "rope_scaling" if older else "rope_parameters"
        parameters = older or newer
        if older and newer and older != newer:
            self.refuse("rope_scaling", f"rope_parameters={newer!r} says something else")
        if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
            self.refuse(name, "every layer must have the same position embedding")
            return Rope()
        # transformers 5 moved rope_theta into rope_parameters.
        theta = parameters.get("rope_theta", self._config.get("rope_theta"))
        if self._config.get("rope_theta") not in (None, theta):
            # Version 4 takes the one and version 5 the other, so nobody knows which one the model was trained with.
            self.refuse("rope_theta", f"{name} says rope_theta={theta!r}")
        theta = default_theta if theta is None else theta
        is_number = isinstance(theta, int | float) and not isinstance(theta, bool)
        if not is_number or not 1 <= theta <= sys.float_info.max or theta % 1:
            self._problems.append(
                f"config.json, rope_theta: must be a whole number, as Megatron's --rotary-base is, got "
                f"rope_theta={theta!r}. Use a model with a whole base."
            )
            return Rope()
        percent = parameters.get("partial_rotary_factor")
        if percent is None:
            percent = self._config.get("partial_rotary_factor")
        percent = default_percent if percent is None else percent
        if not may_be_partial and not _is_one(parameters.get("partial_rotary_factor")):
            self.refuse(name, "Megatron's mapped models rotate every dimension of a head")
        elif isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= 1:
            self._wrong("partial_rotary_factor", "a share of a head's channels, above 0 and up to 1", percent)
            percent = 1.0
        # Older files spell the field type.
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        scaling: RopeScaling | YarnScaling | None = None
        if kind == "llama3":
            scaling = self._llama3_scaling(name, parameters, has_fixed_bounds=has_fixed_bounds)
        elif kind == "yarn":
            scaling = self._yarn_scaling(name, parameters, rope_theta=int(theta))
        interpolation_factor = self._interpolation_factor(name, parameters) if kind == "linear" else None
        if kind not in ("default", "linear", "llama3", "yarn"):
            self.refuse(name, f"Megatron scales a rope by llama3, linear or yarn, not by {kind}")
        if kind == "yarn" and percent != 1:
            self.refuse(name, "Megatron's YaRN rotates every dimension of a head")
        share = float(percent) if may_be_partial else 1.0
        return Rope(base=int(theta), scaling=scaling, interpolation_factor=interpolation_factor, percent=share)

    def require_no_rope_scaling(self, reason: str) -> None:
        """Refuse a scaled rope, whatever its kind."""
        for name in ("rope_scaling", "rope_parameters"):
            parameters = self._config.get(name) or {}
            kind = parameters.get("rope_type", parameters.get("type")) if isinstance(parameters, dict) else None
            if kind not in (None, "default"):
                self.refuse(name, f"{kind}: {reason}")

    def _interpolation_factor(self, name: str, parameters: Mapping[str, Any]) -> int | None:
        factor = parameters.get("factor")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1 or factor % 1:
            self._problems.append(
                f"config.json, {name}.factor: must be a whole number, as Megatron's "
                f"--rotary-seq-len-interpolation-factor is, got factor={factor!r}. Use a model with a whole factor."
            )
            return None
        return None if factor == 1 else int(factor)

    def _original_positions(self, parameters: Mapping[str, Any]) -> Any:
        """As in transformers' standardize_rope_params: the field of the config overrides the one in the parameters."""
        name = "original_max_position_embeddings"
        if name in self._config:
            return self._config[name]
        return parameters.get(name, self._config.get("max_position_embeddings"))

    def _yarn_scaling(self, name: str, parameters: Mapping[str, Any], *, rope_theta: int) -> YarnScaling | None:
        positions = self._original_positions(parameters)
        scaling, problems = read_yarn(parameters, original_positions=positions, rope_theta=rope_theta)
        given = {**parameters, "original_max_position_embeddings": positions, "rope_theta": rope_theta}
        self._problems += [
            f"config.json, {name}.{key}: must be {expected}, got {key}={given.get(key)!r}. "
            "Restore the file as transformers wrote it."
            for key, expected in problems
        ]
        return scaling

    def _llama3_scaling(
        self, name: str, parameters: Mapping[str, Any], *, has_fixed_bounds: bool
    ) -> RopeScaling | None:
        given = {**parameters, "original_max_position_embeddings": self._original_positions(parameters)}
        # megatron-core takes only the factor from a flag; the other numbers are constants of its code.
        fixed = RopeScaling()
        bounds: dict[str, Any] = {}
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            bounds[key] = given.get(key)
            if not has_fixed_bounds:
                self._require_positive(f"{name}.{key}", bounds[key])
            elif bounds[key] != getattr(fixed, key):
                self._problems.append(
                    f"config.json, {name}.{key}: must be {getattr(fixed, key):g}, which megatron-core has built in, "
                    f"got {key}={bounds[key]!r}. Use a model with Llama 3.1's scaling."
                )
        factor = given.get("factor")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < float("inf"):
            self._problems.append(
                f"config.json, {name}.factor: must be a number of at least 1, got factor={factor!r}. "
                "Restore the file as transformers wrote it."
            )
            return None
        return RopeScaling(factor=float(factor)) if has_fixed_bounds else RopeScaling(factor=float(factor), **bounds)

    def _require_positive(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self._wrong(name, "a positive number", value)
