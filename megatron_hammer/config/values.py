"""Values that are wrong by themselves: missing, not positive, or out of their range."""

import math
from collections.abc import Iterable

from megatron_hammer.config.expert_flags import find_expert_problems
from megatron_hammer.config.flags import Flags, flag_of
from megatron_hammer.config.model_arguments import ESSENTIALS

# What a batch needs, beside the essentials of a model.
BATCH_ESSENTIALS = ("seq_length", "micro_batch_size")
# Attributes that, where set, must be whole numbers of at least 1. argparse has made them integers already.
COUNTS = (
    "world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage", "microbatch_group_size_per_vp_stage", "num_layers", "hidden_size",
    "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
    "make_vocab_size_divisible_by", "max_position_embeddings", "seq_length", "micro_batch_size", "global_batch_size",
    "eval_micro_batch_size", "eval_global_batch_size", "train_iters", "train_samples", "num_experts",
    "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "recompute_num_layers",
    "log_interval", "eval_interval", "save_interval", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters",
    "lr_wsd_decay_samples", "exit_interval", "exit_duration_in_mins",
    "distributed_timeout_minutes", "keep_last", "keep_every",
    "rotary_base", "num_distributed_optimizer_instances", "rolled_back_steps", "fingerprint_interval",
    "evaluate_every",
)  # fmt: skip
# What a size may be at most; samples of a run are counted in 64 bits, and every layer is listed.
LARGEST_COUNT = 2**31 - 1
LARGEST = {
    "num_layers": 100_000,
    "train_samples": 2**63 - 1,
    "lr_decay_samples": 2**63 - 1,
    "lr_wsd_decay_samples": 2**63 - 1,
}
# Attribute: (least, below) with least included and below not.
RANGES: dict[str, tuple[float, float]] = {
    "lr": (0, math.inf),
    "min_lr": (0, math.inf),
    "lr_warmup_iters": (0, math.inf),
    "lr_warmup_samples": (0, math.inf),
    "lr_warmup_fraction": (0, 1),
    "lr_warmup_init": (0, math.inf),
    "weight_decay": (0, math.inf),
    "start_weight_decay": (0, math.inf),
    "end_weight_decay": (0, math.inf),
    "seed": (1, 2**31),  # megatron refuses 0 once all ranks are up; numpy takes 32 bits, and ranks add to it
    "clip_grad": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_eps": (0, math.inf),
    "hidden_dropout": (0, 1),
    "attention_dropout": (0, 1),
    "eval_iters": (0, math.inf),
    "num_workers": (0, math.inf),
    "layernorm_epsilon": (0, math.inf),
    "init_method_std": (0, math.inf),
    "moe_router_bias_update_rate": (0, math.inf),
    "loss_spike_factor": (1, math.inf),
    "gpu_memory_gib": (0, math.inf),
    "peak_tflops": (0, math.inf),
}
# The other numbers are at least 0, but for those to which Megatron gives a meaning below it, and those of which other
# checks of preflight know more.
MAY_BE_NEGATIVE = {
    "inference_batch_times_seqlen_threshold",
    "moe_paged_stash_buffer_size_factor_cpu",
    "moe_paged_stash_buffer_size_factor_cuda",
    "moe_router_force_biased",
    "mscale",
    "mscale_all_dim",
    "mup_base_head_dim",
    "null_tokenizer_pad_id",
    "residual_multiplier",
    "rl_default_top_k",
}
REMEDIES = {
    "num_layers": "Pass --preset hammer-1b4, or --num-layers",
    "vocab_size": "Pass --vocab-size with the size of your tokenizer",
    "max_position_embeddings": "Pass --max-position-embeddings, at least --seq-length",
    "lr": "Pass --lr, for example 3e-4",
}


def list_missing(flags: Flags, names: Iterable[str] = ESSENTIALS) -> list[str]:
    """Names without a value; without the essentials there is no model to look at."""
    return [name for name in names if flags[name] is None]


def find_missing_problems(flags: Flags) -> list[str]:
    """What a run cannot do without and neither the preset nor the command line gave."""
    is_trained = not flags["skip_train"]
    missing = list_missing(flags, (*ESSENTIALS, *BATCH_ESSENTIALS, *(["lr"] if is_trained else [])))
    problems = [
        f"{flag_of(name)}: must be given, got {name}=None. "
        f"{REMEDIES.get(name, f'Pass --{flag_of(name)}, or a --preset that sets it')}."
        for name in missing
    ]
    has_data = any(flags[name] is not None for name in ("data_path", "data_args_path", "train_data_path"))
    # The length follows from the data then, and what is wrong with those is said elsewhere.
    has_length = bool(flags["sft"]) and flags["sft_epochs"] is not None and has_data
    if is_trained and flags["train_iters"] is None and flags["train_samples"] is None and not has_length:
        problems.append(
            "train-iters: a run needs a length, got train_iters=None, train_samples=None. "
            "Pass --train-iters or --train-samples."
        )
    return problems


def find_value_problems(flags: Flags) -> list[str]:
    """Numbers outside their range, infinite or NaN; then those of experts."""
    problems = []
    for name in COUNTS:
        value = flags[name]
        # --num-experts 0 means a dense model, which Megatron accepts.
        if value is not None and value < 1 and not (name == "num_experts" and value == 0):
            problems.append(f"{flag_of(name)}: must be at least 1, got {name}={value}. Pass a positive number.")
        largest = LARGEST.get(name, LARGEST_COUNT)
        if value is not None and value > largest:
            problems.append(f"{flag_of(name)}: must be at most {largest}, got {name}={value}. Pass a smaller number.")
    for name, (least, below) in RANGES.items():
        value = flags[name]
        # NaN fails every comparison, so it is reported here too.
        if value is not None and not least <= value < below:
            bounds = f"finite and at least {least:g}" if below == math.inf else f"at least {least:g} and below {below}"
            problems.append(f"{flag_of(name)}: must be {bounds}, got {name}={value}. Pass a number in that range.")
    problems += _find_negative_problems(flags)
    # Its checks divide by these numbers.
    return problems or find_expert_problems(flags)


def _find_negative_problems(flags: Flags) -> list[str]:
    """Typed numbers below 0 or not finite, of flags that have no range of their own above."""
    ranged = {*COUNTS, *RANGES, *MAY_BE_NEGATIVE}
    problems = []
    for name in sorted(flags.typed - ranged):
        value = flags.values.get(name)
        if not all(map(_is_in_range, value if isinstance(value, list) else [value])):
            problems.append(
                f"{flag_of(name)}: must be finite and at least 0, got {name}={value}. Pass a number in that range."
            )
    return problems


def _is_in_range(value: object) -> bool:
    """Values that are not numbers pass: another check names them."""
    return not isinstance(value, int | float) or 0 <= value < math.inf
