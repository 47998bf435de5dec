"""Whether a checkpoint is one that this run can continue: its model, its schedule and its optimizer."""

from typing import Any

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.model_arguments import YARN_ARGUMENTS, build_model_arguments
from megatron_hammer.config.run_plan import Batch, RunPlan, RunSettings, Schedule
from megatron_hammer.config.saved_run import SavedRun
from megatron_hammer.model.shape import ModelShape

# What the groups of parameters hold themselves, beside the scheduler: the run's in any case.
RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")


def find_resume_problems(settings: RunSettings, plan: RunPlan | None, saved: SavedRun) -> list[str]:
    """Everything against continuing `saved`."""
    problems = [] if settings.model is None else _find_other_model(settings, settings.model, saved)
    if saved.directory.name == "release" or plan is None:
        return problems  # of a released model Megatron loads the weights alone, without optimizer and schedule
    if other := find_other_training(plan, saved):
        return problems + other
    experts = _find_expert_problems(plan, saved)
    return problems + (find_other_groups(plan, saved) or find_schedule_changes(plan, saved)) + experts


def find_other_training(plan: RunPlan, saved: SavedRun) -> list[str]:
    """Fine-tuning that would continue pretraining, or the reverse, with its step, optimizer and schedule."""
    is_new = plan.checkpoints.is_finetuned or plan.schedule.skips_training
    was_sft, is_sft = saved.order is not None and saved.order.rows is not None, plan.rows is not None
    if is_new or saved.order is None or was_sft == is_sft or plan.data.accepts_order_change:
        return []
    before, now = ("--sft", "none") if was_sft else ("pretraining", "--sft")
    return [
        f"load: a checkpoint must be of the same training to be continued, got {now} for one of {before} in "
        f"{saved.directory}. Pass --pretrained-checkpoint {saved.directory.parent} with another --save and without "
        "--load, which begins with its weights alone."
    ]


def find_schedule_changes(plan: RunPlan, saved: SavedRun) -> list[str]:
    """One problem with everything that differs, or with a schedule that begins again, unless a flag settles it.

    Megatron asserts it once the checkpoint is loaded on all ranks. A longer run always has another schedule, since the
    weight decay's is as long as the run.
    """
    checkpoints = plan.checkpoints
    is_new = checkpoints.is_finetuned or plan.schedule.skips_training
    if is_new or plan.schedule.lr is None or checkpoints.has_own_schedule:
        return []
    if not checkpoints.loads_optimizer:
        return [] if checkpoints.has_saved_schedule else [_describe_new_beginning(saved)]
    if saved.schedule is None or saved.batch is None:  # saved by another version of Megatron
        return []
    before = describe_schedule(saved.schedule, saved.batch)
    now = describe_schedule(plan.schedule, plan.batch)
    changes = [name for name in (RATES if checkpoints.has_saved_schedule else now) if now[name] != before[name]]
    if not changes:
        return []
    keeps_rates = not set(RATES).intersection(changes)
    remedy = "--use-checkpoint-opt-param-scheduler to keep the old one" if keeps_rates else "the old values"
    return [
        "override-opt-param-scheduler: the schedule must be that of the checkpoint, got "
        f"{', '.join(f'{name}={now[name]} (was {before[name]})' for name in changes)} in {saved.directory}. "
        f"Pass --override-opt-param-scheduler to continue with the new one, or {remedy}."
    ]


def find_other_groups(plan: RunPlan, saved: SavedRun) -> list[str]:
    """A decoupled rate divides the parameters into more groups, which no flag of the schedule can match.

    Source: megatron.core.optimizer.get_standard_config_overrides.
    """
    checkpoints = plan.checkpoints
    is_new = checkpoints.is_finetuned or plan.schedule.skips_training
    if is_new or not checkpoints.loads_optimizer or saved.schedule is None:
        return []
    was, rate = saved.schedule.decoupled_lr, plan.schedule.decoupled_lr
    if (was is None) == (rate is None):
        return []
    remedy = "Leave it out" if was is None else f"Pass --decoupled-lr {was}"
    return [
        "decoupled-lr: an optimizer must have the groups of parameters of the checkpoint, which are others with a "
        f"decoupled rate than without, got decoupled_lr={rate} (was {was}) in {saved.directory}. {remedy}, or begin "
        "the optimizer and the schedule again with --no-load-optim --override-opt-param-scheduler."
    ]


def _describe_new_beginning(saved: SavedRun) -> str:
    return (
        "no-load-optim: a run must continue its schedule of the learning rate, got one that begins again with its "
        f"warm-up while steps and samples continue from {saved.directory}. Pass --finetune to begin at step 0, or "
        "--override-opt-param-scheduler to begin only the schedule again."
    )


def describe_schedule(schedule: Schedule, batch: Batch) -> dict[str, Any]:
    """The rates, and what else OptimizerParamScheduler compares, lengths in samples, by the flags that set it.

    Source: megatron.training.training.get_optimizer_param_scheduler, OptimizerParamScheduler.load_state_dict.
    """
    # Megatron's scheduler counts samples also for a run in steps, so another global batch is another schedule.
    unit_samples = 1 if schedule.unit == "samples" else batch.global_batch_size
    length, decay, warmup = (
        (units or 0) * unit_samples for units in (schedule.length, schedule.lr_decay, schedule.lr_warmup)
    )
    # validate_args sets both ends to --weight-decay for the constant style.
    is_constant = schedule.weight_decay_incr_style == "constant"
    return {
        **{name: getattr(schedule, name) for name in RATES},
        "lr_warmup_samples": warmup if schedule.lr_warmup_fraction is None else schedule.lr_warmup_fraction * decay,
        "lr_decay_samples": decay,
        "lr_decay_style": schedule.lr_decay_style,
        "start_weight_decay": schedule.weight_decay if is_constant else schedule.start_weight_decay,
        "end_weight_decay": schedule.weight_decay if is_constant else schedule.end_weight_decay,
        "samples": length,
        "weight_decay_incr_style": schedule.weight_decay_incr_style,
    }


def _find_expert_problems(plan: RunPlan, saved: SavedRun) -> list[str]:
    """With EP the experts' parameters have an optimizer of their own, without it they share one.

    Source: megatron.core.optimizer.ChainedOptimizer.load_state_dict ('Expected 2 entries').
    """
    ep, saved_ep = plan.layout.expert_model_parallel_size, saved.expert_model_parallel_size
    loads_optimizer = plan.checkpoints.loads_optimizer and not plan.checkpoints.is_finetuned and saved.has_optimizer
    if not loads_optimizer or plan.model.moe is None or (saved_ep > 1) == (ep > 1):
        return []
    return [
        "expert-model-parallel-size: an optimizer saved without expert parallelism resumes only without it, and "
        f"one saved with it only with it, got ep={ep}, in {saved.directory} ep={saved_ep}. "
        f"Use --expert-model-parallel-size {saved_ep}, convert the checkpoint with "
        f"hammer checkpoint edit reshard --expert-model-parallel-size {ep}, or pass --finetune, "
        "or --no-load-optim with --override-opt-param-scheduler."
    ]


# --- the model ------------------------------------------------------------------------------------------------------


def _find_other_model(settings: RunSettings, model: ModelShape, saved: SavedRun) -> list[str]:
    """Differences that change the shape of a tensor or what is computed from it. The vocabulary is left to Megatron,
    which can pad it anew. With --finetune a typed flag may change the computation.
    """
    if saved.model is None:  # saved by another version of Megatron
        return []
    before, now = map(_describe_shape, (saved.model, model))
    computed_before, computed_now = map(_describe_computation, (saved.model, model))
    problems = [
        f"{flag}: must be as in the checkpoint, got {now[flag]}, in {saved.directory} {before[flag]}. "
        "Load another checkpoint, or change the model back."
        for flag in now
        if now[flag] != before[flag]
    ]
    return problems + [
        f"{flag_of(name)}: must be as in the checkpoint, or it computes something else from the same weights, "
        f"got {computed_now[name]}, in {saved.directory} {computed_before[name]}. "
        f"Pass --{flag_of(name)} as it was, or --finetune with it to begin a run that changes it."
        for name in computed_now
        # A name that only one of the two has follows from another difference, which is reported itself.
        if computed_now[name] != computed_before.get(name, computed_now[name])
        and not (settings.checkpoints.is_finetuned and name in settings.flags.typed)
    ]


def _describe_shape(model: ModelShape) -> dict[str, object]:
    """What decides the names and shapes of the parameters, by the flag that sets it."""
    moe = model.moe
    return {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "num-query-groups": model.num_query_groups,
        "kv-channels": model.head_dim,
        # With experts in every layer, the dense width is the size of no tensor.
        "ffn-hidden-size": model.ffn_hidden_size if moe is None or moe.dense_layers else None,
        "swiglu": model.activation == "swiglu",
        "normalization": model.normalization,
        "position-embedding-type": model.position_embedding_type,
        "disable-bias-linear": not model.has_linear_bias,
        "add-qkv-bias": model.has_qkv_bias,
        "untie-embeddings-and-output-weights": not model.has_tied_embeddings,
        "embedding-norm": model.has_embedding_norm,
        "qk-layernorm": model.has_qk_norm,
        "num-experts": moe and moe.num_experts,
        "moe-ffn-hidden-size": moe and moe.ffn_hidden_size,
        "moe-shared-expert-intermediate-size": moe and moe.shared_expert_intermediate_size,
        "moe-shared-expert-gate": moe and moe.has_shared_expert_gate,
        "moe-layer-freq": moe and [int(model.is_mixture(layer)) for layer in range(model.num_layers)],
        "moe-router-enable-expert-bias": moe and moe.has_expert_bias,
    }


def _describe_computation(model: ModelShape) -> dict[str, object]:
    """What changes no tensor but what is computed from them, by Megatron's attribute; where it has any effect."""
    values: dict[str, object] = {
        "layernorm_epsilon": model.norm_epsilon,
        # The flags of --use-mup decide the next three.
        "mup_embedding_mult": model.embedding_multiplier,
        "mup_attn_scale_power": model.attention_scale or model.head_dim**-0.5,
        "mup_output_mult": model.logits_multiplier,
        "residual_multiplier": model.residual_multiplier,
    }
    if model.position_embedding_type == "rope":
        values["rotary_base"] = model.rotary_base
        written = build_model_arguments(model)
        scaling = ("use_rope_scaling", "rope_scaling_factor", *(name for name, _ in YARN_ARGUMENTS.values()))
        values |= {name: written[name] for name in ("position_embedding_type", *scaling) if name in written}
        values["rotary_percent"] = model.rotary_percent
        values["no_rope_freq"] = written["no_rope_freq"]
    window = build_model_arguments(model)
    values["window_size"] = window["window_size"]
    if model.sliding_window is not None:
        values["window_attn_skip_freq"] = window["window_attn_skip_freq"]
    if model.activation != "swiglu":
        values["bias_gelu_fusion"] = model.activation == "gelu_tanh"
    if model.moe is not None:
        values["moe_router_topk"] = model.moe.router_topk
        if model.moe.score_function == "softmax":
            values["moe_router_pre_softmax"] = not model.moe.is_topk_renormalized
        values["moe_router_score_function"] = model.moe.score_function
        values["moe_router_topk_scaling_factor"] = model.moe.topk_scaling_factor
        values["moe_router_num_groups"] = model.moe.num_groups
        values["moe_router_group_topk"] = model.moe.group_topk
    return values
