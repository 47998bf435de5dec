"""Changes of a study, one quantity at a time: what `sensitivity` varies, and how it is written on the command line.

A change is a factor (x0.5), a percentage (-10%) or a value (128256). Each quantity says which of them it takes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import Coefficients, replace_values, select_generation
from megatron_hammer.scaling.plan import PRECISIONS
from megatron_hammer.scaling.search.projection import Study
from megatron_hammer.scaling.search.study_problems import find_study_problems

NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
FACTOR = re.compile(rf"x({NUMBER})")
PERCENTAGE = re.compile(rf"([+-]{NUMBER})%")
# Of the GPU's peak: every kernel that multiplies.
KERNEL_RATIOS = ("gemm_ratio", "gemm_8bit_ratio", "gemm_4bit_ratio", "attention_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A study of one number of GPUs, and the coefficients that predict it."""

    study: Study
    coefficients: Coefficients

    @property
    def num_gpus(self) -> int:
        return self.study.gpu_counts[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """Something that may change. read: the present value, which a factor scales; write: the case with another value.

    is_whole: whether values are whole numbers. has_values: whether a value may be given instead of a factor. usual: the
    changes of a study without choices.
    """

    words: str
    read: Callable[[Case], float]
    write: Callable[[Case, Any], Case]
    is_whole: bool = False
    has_values: bool = False
    usual: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """One change: network=x0.5."""

    name: str
    change: str

    @property
    def label(self) -> str:
        return f"{QUANTITIES[self.name].words} {self.change}"


def _change_study(**changes: Any) -> Callable[[Case], Case]:
    return lambda case: replace(case, study=replace(case.study, **changes))


def _of_part(words: str, part: str, name: str, *usual: str, **kinds: bool) -> Quantity:
    """A field of one of a study's parts: its model, its GPU or its cluster. kinds: is_whole, has_values."""

    def write(case: Case, value: float) -> Case:
        changes: dict[str, Any] = {part: replace(getattr(case.study, part), **{name: value})}
        return _change_study(**changes)(case)

    def read(case: Case) -> float:
        return float(getattr(getattr(case.study, part), name))

    return Quantity(words=words, read=read, write=write, usual=usual, **kinds)


def _write_memory(case: Case, value: int) -> Case:
    """The limit of a plan. It may exceed what the GPU has: the question is what more memory would change."""
    gpu = replace(case.study.gpu, memory_bytes=max(case.study.gpu.memory_bytes, value))
    return _change_study(memory_limit_bytes=value, gpu=gpu)(case)


def _scale_kernels(case: Case, factor: float) -> Case:
    gpu = case.study.gpu
    key = gpu.name if gpu.name in case.coefficients.gpus else select_generation(gpu)
    own = case.coefficients.gpus[key]
    values = {f"{key}.{name}": getattr(own, name) * factor for name in KERNEL_RATIOS}
    most = max(KERNEL_RATIOS, key=lambda name: getattr(own, name))
    if values[f"{key}.{most}"] > 1:
        raise ConfigError(
            f"vary: kernels must stay within the GPU's peak, got {most} {getattr(own, most):.3g} times {factor:g}. "
            "Choose a smaller factor."
        )
    return replace(case, coefficients=replace_values(case.coefficients, values))


def _slow_down_one(case: Case, factor: float) -> Case:
    """All ranks wait for each other in every step, so one slow GPU costs as much as if all of them were slow.

    In a pipeline whose other stages have slack it costs less.
    """
    if factor > 1:
        raise ConfigError(
            f"vary: straggler must be at most as fast as the others, got {factor:g} of their speed. "
            "Pass straggler=-10%, or vary kernels."
        )
    return _scale_kernels(case, factor)


def _write_host(case: Case, value: float) -> Case:
    return replace(case, coefficients=replace_values(case.coefficients, {"host_s": value}))


def _write_imbalance(case: Case, value: float) -> Case:
    if case.study.model.moe is None or value < 1:
        raise ConfigError(
            f"vary: imbalance must be of a mixture of experts and stay at least 1, got {value:g} for "
            f"{case.study.model.name}. Pass imbalance=x1.2 for one."
        )
    return _change_study(experts=replace(case.study.experts, imbalance_ratio=value))(case)


def _write_gpus(case: Case, value: int) -> Case:
    return _change_study(gpu_counts=(value,))(case)


def _write_batch(case: Case, value: int) -> Case:
    return _change_study(global_batch_size=value, samples_per_gpu=None)(case)


def _write_seq_length(case: Case, value: int) -> Case:
    """The tokens of a step stay the same, so the batch changes the other way."""
    study = case.study
    samples = Fraction(study.global_batch_size_at(case.num_gpus) * study.seq_length, value)
    if samples.denominator != 1:
        raise ConfigError(
            f"seq-length: must keep the tokens of a step with whole samples, got seq_length={value} for "
            f"{study.global_batch_size_at(case.num_gpus)} samples of {study.seq_length}. "
            "Choose another length or batch."
        )
    model = replace(study.model, max_position_embeddings=max(study.model.max_position_embeddings, value))
    return _change_study(seq_length=value, global_batch_size=int(samples), samples_per_gpu=None, model=model)(case)


QUANTITIES = {
    "network": _of_part("network bandwidth", "cluster", "network_bytes_per_s", "x0.5", "x2"),
    "network-latency": _of_part("network latency", "cluster", "network_latency_s", "x2"),
    "nvlink": _of_part("NVLink bandwidth", "cluster", "nvlink_bytes_per_s", "x0.5", "x2"),
    "memory": Quantity(
        words="usable memory",
        read=lambda case: case.study.memory_limit_bytes,
        write=_write_memory,
        is_whole=True,
        usual=("-10%", "+10%"),
    ),
    "memory-bandwidth": _of_part("memory bandwidth", "gpu", "memory_bytes_per_s", "-10%", "+10%"),
    "kernels": Quantity(
        words="efficiency of matrix products and attention",
        read=lambda _: 1.0,
        write=_scale_kernels,
        usual=("-5%", "+5%"),
    ),
    "straggler": Quantity(words="speed of the slowest GPU", read=lambda _: 1.0, write=_slow_down_one, usual=("-10%",)),
    "host": Quantity(
        words="time of the host for a kernel",
        read=lambda case: case.coefficients.host_s,
        write=_write_host,
        usual=("x0.5", "x2"),
    ),
    "imbalance": Quantity(
        words="tokens of the busiest rank of experts",
        read=lambda case: case.study.experts.imbalance_ratio,
        write=_write_imbalance,
    ),
    "gpus": Quantity(
        words="GPUs",
        read=lambda case: case.num_gpus,
        write=_write_gpus,
        is_whole=True,
        has_values=True,
        usual=("x0.5", "x2"),
    ),
    "batch": Quantity(
        words="samples per step",
        read=lambda case: case.study.global_batch_size_at(case.num_gpus),
        write=_write_batch,
        is_whole=True,
        has_values=True,
        usual=("x0.5", "x2"),
    ),
    "seq-length": Quantity(
        words="sequence length",
        read=lambda case: case.study.seq_length,
        write=_write_seq_length,
        is_whole=True,
        has_values=True,
        usual=("x0.5", "x2"),
    ),
    "vocabulary": _of_part("vocabulary", "model", "vocab_size", "x0.5", "x2", is_whole=True, has_values=True),
    "query-groups": _of_part("query groups", "model", "num_query_groups", is_whole=True, has_values=True),
    "precision": Quantity(
        words="precision",
        read=lambda _: math.nan,  # a name has no factor
        write=lambda case, value: _change_study(precision=value)(case),
        has_values=True,
    ),
}


def parse_variation(text: str) -> Variation:
    """network=x0.5. Raises ConfigError for another form, an unknown quantity, or a change that it does not take."""
    name, equals, change = text.partition("=")
    if not equals or name not in QUANTITIES:
        raise ConfigError(
            f"vary: must be QUANTITY=CHANGE, got {text!r}. Use one of {', '.join(QUANTITIES)}, as in network=x0.5."
        )
    quantity = QUANTITIES[name]
    if name == "precision":
        is_good, forms = change in PRECISIONS, f"one of {', '.join(PRECISIONS)}"
    else:
        value = re.fullmatch(NUMBER, change) if quantity.has_values else None
        is_good = bool(FACTOR.fullmatch(change) or PERCENTAGE.fullmatch(change) or value)
        forms = "x0.5 or -10%" + (f" or a number such as {name}=4096" if quantity.has_values else "")
    if not is_good:
        raise ConfigError(f"vary: {name} must be {forms}, got {change!r}. Correct it.")
    return Variation(name=name, change=change)


def list_usual_variations(case: Case) -> list[Variation]:
    """The changes of every quantity that make sense for this study."""
    model = case.study.model
    groups = {model.num_attention_heads, model.num_query_groups // 2, max(1, model.num_attention_heads // 4)}
    # 0 if there is only one group, which cannot be halved. As many groups as heads is attention without groups.
    groups -= {0, model.num_query_groups}
    variations = [
        Variation(name=name, change=change) for name, quantity in QUANTITIES.items() for change in quantity.usual
    ]
    if model.moe is not None:
        variations.append(Variation(name="imbalance", change="x1.2"))
    return [*variations, *(Variation(name="query-groups", change=str(value)) for value in sorted(groups))]


def apply_variation(case: Case, variation: Variation) -> Case:
    """The case with this one change. Raises ConfigError if the study would be none that can be asked for."""
    quantity = QUANTITIES[variation.name]
    value = _find_value(quantity, quantity.read(case), variation)
    varied = quantity.write(case, value)
    problems = [*find_study_problems(varied.study), *_find_model_problems(varied)]
    if problems:
        raise ConfigError(*problems)
    return varied


def _find_value(quantity: Quantity, present: float, variation: Variation) -> Any:
    change = variation.change
    if variation.name == "precision":
        return change
    if match := FACTOR.fullmatch(change):
        value = Fraction(match[1]) * Fraction(present)
    elif match := PERCENTAGE.fullmatch(change):
        value = (1 + Fraction(match[1]) / 100) * Fraction(present)
    else:
        value = Fraction(change)
    if value <= 0:
        raise ConfigError(f"vary: {variation.name} must stay above zero, got {change}. Choose a smaller change.")
    if not quantity.is_whole:
        return float(value)
    if variation.name == "memory":
        return int(value)
    if value.denominator != 1:
        raise ConfigError(
            f"vary: {variation.name} must stay a whole number, got {float(value):g} by {change}. Choose another change."
        )
    return int(value)


def _find_model_problems(case: Case) -> list[str]:
    model = case.study.model
    if model.num_attention_heads % model.num_query_groups:
        return [
            f"query-groups: must divide the {model.num_attention_heads} heads of {model.name}, got "
            f"{model.num_query_groups}. Choose a divisor."
        ]
    return []
