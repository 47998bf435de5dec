"""Check the values of a study before the search starts: every problem is a sentence with its remedy."""

import math

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.memory.options import EXPERT_OFFLOAD_MODULES
from megatron_hammer.scaling.plan import FUSED_DISPATCHERS, NATURAL_IMBALANCE_RATIO
from megatron_hammer.scaling.search.projection import Study, select_peak_tflops
from megatron_hammer.scaling.search.search_space import SIZE_FLAGS, is_cpu_host, list_recomputations

# Beyond every cluster and batch. The search lists the divisors of these numbers, which takes their square root.
LARGEST_SIZE = 10**9
LARGEST_LAYERS = 2_000  # twice the deepest published model; stages are counted layer by layer
LARGEST_TOKENS = 10**18  # a thousand times what all people have written
MOST_USD_PER_GPU_HOUR = 1e6
CPU_PRECISIONS = ("fp32", "bf16")  # platforms/cpu.py


def find_study_problems(study: Study) -> list[str]:
    """All problems; empty if the search can start. What does not fit at one size is that size's own `problem`."""
    return [
        *_find_depth_problems(study),
        *_find_expert_problems(study),
        *_find_routing_problems(study),
        *_find_number_problems(study),
        *_find_batch_problems(study),
        *_find_precision_problems(study),
        *_find_sequence_problems(study),
        *_find_offload_problems(study),
    ]


def _find_routing_problems(study: Study) -> list[str]:
    problems = []
    ratio = study.experts.imbalance_ratio
    if not 1 <= ratio < math.inf:
        problems.append(f"moe-imbalance: must be at least 1, got {ratio:g}. Pass 1 for tokens that are spread evenly.")
    fused = [name for name in study.dispatchers if name in FUSED_DISPATCHERS]
    if fused and is_cpu_host(study.cluster):
        problems.append(
            f"moe-dispatcher: must be alltoall or allgather on CPU processes, got {', '.join(fused)}, "
            f"cluster={study.cluster.name}. Drop it."
        )
    if study.model.moe is None:
        given = {
            "moe-dispatcher": study.space.dispatchers is not None or study.experts.dispatcher != "alltoall",
            "moe-imbalance": ratio != NATURAL_IMBALANCE_RATIO,
            "moe-comm-overlap": study.space.overlaps_experts is not None,
        }
        problems += [refuse_without_experts(flag, study.model.name) for flag, is_given in given.items() if is_given]
    return problems


def refuse_without_experts(flag: str, model: str) -> str:
    """The problem of a flag that would have no effect on this model."""
    return f"{flag}: must be left out for a model without experts, got it for {model}. Drop it."


def _find_depth_problems(study: Study) -> list[str]:
    layers = study.model.num_layers
    if layers <= LARGEST_LAYERS:
        return []
    return [
        f"model: must have at most {LARGEST_LAYERS:,} layers, got num_layers={layers:,} in {study.model.name}. "
        "Correct its configuration."
    ]


def _find_expert_problems(study: Study) -> list[str]:
    """A dense model has nothing that sizes of experts could cut, so they would be ignored."""
    if study.model.moe is not None:
        return []
    given = [
        name for name in ("expert_model_parallel_sizes", "expert_tensor_parallel_sizes") if getattr(study.space, name)
    ]
    return [
        f"{SIZE_FLAGS[name]}: must be left out for a model without experts, got "
        f"{', '.join(map(str, getattr(study.space, name)))} for {study.model.name}. Drop it."
        for name in given
    ]


def _find_number_problems(study: Study) -> list[str]:
    problems = []
    for flag, sizes in (("gpus", study.gpu_counts), *_list_restricted_sizes(study)):
        wrong = [size for size in sizes if size < 1]
        if wrong or not sizes:
            got = ", ".join(str(size) for size in wrong) or "none"
            problems.append(f"{flag}: must be whole numbers of at least 1, got {got}. Pass some, as in --{flag} 8,64.")
        problems += [
            f"{flag}: must be at most {LARGEST_SIZE:,}, got {size:,}. Correct it."
            for size in sizes
            if size > LARGEST_SIZE
        ]
    repeated = sorted({count for count in study.gpu_counts if study.gpu_counts.count(count) > 1})
    if repeated:
        got = ", ".join(str(count) for count in repeated)
        problems.append(f"gpus: must name each size once, got {got} more than once. Drop the repetition.")
    memory_gib, price = study.memory_limit_bytes / GIB, study.usd_per_gpu_hour
    limits = [
        ("top", study.num_best, study.num_best >= 1, "at least 1", "--top 5"),
        (
            "memory-gib",
            memory_gib,
            0 < study.memory_limit_bytes <= study.gpu.memory_bytes,
            f"above 0 and at most the {study.gpu.memory_bytes / GIB:g} of {study.gpu.name}",
            "--memory-gib 76",
        ),
        (
            "memory-margin",
            study.memory_margin_ratio,
            0 <= study.memory_margin_ratio < 1,
            "at least 0 and below 1",
            "--memory-margin 0.1",
        ),
        ("knee", study.knee_ratio, 0 < study.knee_ratio <= 1, "above 0 and at most 1", "--knee 0.8"),
    ]
    if study.train_tokens is not None:
        is_good = 1 <= study.train_tokens <= LARGEST_TOKENS
        bound = f"at least 1 and at most {LARGEST_TOKENS:g}"
        limits.append(("train-tokens", study.train_tokens, is_good, bound, "--train-tokens 15T"))
    if price is not None:
        bound = f"at least 0 and at most {MOST_USD_PER_GPU_HOUR:g}"
        is_good = 0 <= price <= MOST_USD_PER_GPU_HOUR
        limits.append(("usd-per-gpu-hour", price, is_good, bound, "--usd-per-gpu-hour 2.5"))
    problems += [
        f"{flag}: must be {bound}, got {value:g}. Pass {example}."
        for flag, value, is_good, bound, example in limits
        if not is_good
    ]
    return problems


def _find_offload_problems(study: Study) -> list[str]:
    """The rules of megatron.core's TransformerConfig and of validate_args of megatron.training."""
    space = study.space
    num_layers, modules, ratio = space.num_offloaded_layers, space.offload_modules, space.optimizer_offload_ratio
    stages = space.pipeline_model_parallel_sizes
    in_experts = [name for name in modules if name in EXPERT_OFFLOAD_MODULES]
    checks = [
        (
            0 <= num_layers < study.model.num_layers,
            f"cpu-offloading-num-layers: must be below the {study.model.num_layers} layers of {study.model.name}, got "
            f"{num_layers}. Pass a smaller number.",
        ),
        (
            not num_layers or stages == (1,),
            f"cpu-offloading-num-layers: must have no pipeline beside it, got num_layers={num_layers}. "
            "Pass --pipeline-model-parallel-size 1 with it.",
        ),
        (
            not num_layers or space.recomputes == ("none",),
            f"cpu-offloading-num-layers: must have no recomputation beside it, got num_layers={num_layers}. "
            "Pass --recompute none with it.",
        ),
        (
            not (num_layers and modules),
            f"offload-modules: must be passed without --cpu-offloading-num-layers, got {', '.join(modules)}. "
            "Drop one of the two.",
        ),
        (
            not in_experts or study.model.moe is not None,
            f"offload-modules: must be of a model with experts for {', '.join(in_experts)}, got {study.model.name}. "
            "Drop them.",
        ),
        (
            "fused_group_mlp" not in modules,
            "offload-modules: must be without fused_group_mlp, whose kernel no training here has, got "
            f"{', '.join(modules)}. Pass expert_fc1,moe_act.",
        ),
        (
            bool(list_recomputations(study.model, study.precision, study.cluster, space)),
            f"recompute: must keep what --offload-modules {','.join(modules)} moves to the host, got "
            f"{', '.join(space.recomputes)}. Add none to it.",
        ),
        (
            "attn_proj" not in modules or "core_attn" in modules,
            "offload-modules: must have core_attn beside attn_proj, whose input is its output, got "
            f"{', '.join(modules)}. Add core_attn.",
        ),
        (
            0 <= ratio <= 1,
            f"optimizer-offload-fraction: must be from 0 to 1, got {ratio:g}. Pass 1 to move all of the optimizer.",
        ),
        (
            not ratio or space.shardings == ("distributed_optimizer",),
            f"optimizer-offload-fraction: must have the distributed optimizer beside it, got {ratio:g}. "
            "Pass --sharding distributed_optimizer with it.",
        ),
        (
            not is_cpu_host(study.cluster) or not (num_layers or modules or ratio),
            f"cluster: must have GPUs to offload from, got cluster={study.cluster.name}. Drop the flags of offloading.",
        ),
    ]
    return [text for is_good, text in checks if not is_good]


def _list_restricted_sizes(study: Study) -> list[tuple[str, tuple[int, ...]]]:
    given = ((flag, getattr(study.space, name)) for name, flag in SIZE_FLAGS.items())
    return [(flag, sizes) for flag, sizes in given if sizes is not None]


def _find_batch_problems(study: Study) -> list[str]:
    largest = study.global_batch_size or max(float(study.samples_per_gpu or 0) * n for n in (*study.gpu_counts, 0))
    if largest > LARGEST_SIZE:
        return [f"global-batch-size: must be at most {LARGEST_SIZE:,} samples, got {largest:,.0f}. Correct it."]
    if study.global_batch_size is not None and study.global_batch_size < 1:
        return [
            f"global-batch-size: must be at least 1, got {study.global_batch_size}. "
            "Pass the samples of a step, as in --global-batch-size 512."
        ]
    if study.samples_per_gpu is None:
        return []
    samples = study.samples_per_gpu
    broken = [count for count in study.gpu_counts if samples <= 0 or (samples * count).denominator != 1]
    if not broken:
        return []
    return [
        f"samples-per-gpu: must give whole samples per step at every size, got samples_per_gpu={float(samples):g} with "
        f"gpus={', '.join(str(count) for count in broken)}. Pass a whole number, or sizes that are multiples of "
        f"{samples.denominator}."
    ]


def _find_precision_problems(study: Study) -> list[str]:
    if is_cpu_host(study.cluster) and study.precision not in CPU_PRECISIONS:
        return [
            f"precision: must be fp32 or bf16 on a CPU host, got precision={study.precision}, "
            f"cluster={study.cluster.name}. Pass --precision bf16."
        ]
    try:
        select_peak_tflops(study.gpu, study.precision)
    except ConfigError as error:
        return list(error.problems)
    return []


def _find_sequence_problems(study: Study) -> list[str]:
    longest = study.model.max_position_embeddings
    if study.seq_length < 1:
        return [f"seq-length: must be at least 1, got {study.seq_length}. Pass tokens, as in --seq-length 4096."]
    if study.model.position_embedding_type == "learned_absolute" and study.seq_length > longest:
        return [
            f"seq-length: must be at most the learned positions of {study.model.name}, got "
            f"seq_length={study.seq_length}, max_position_embeddings={longest}. Pass --seq-length {longest}."
        ]
    return []
