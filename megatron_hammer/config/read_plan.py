"""From Megatron's arguments to `RunSettings` and `RunPlan`: the only file that knows what each part is called there.

The arguments are those of a command line, or those that a checkpoint was saved with; each part is read by a function of
its own, because another version of Megatron may lack the arguments of one part and have those of the others. What
Megatron derives when a flag is left out is derived here by the same rule. Pure; no torch, no megatron.
"""

import dataclasses
import math
import os
from typing import Any, Literal

from megatron_hammer.config.data_flags import DataFlags, read_data_plan
from megatron_hammer.config.environment import read_process_place
from megatron_hammer.config.flags import Flags
from megatron_hammer.config.initial_model import InitialModel
from megatron_hammer.config.model_arguments import read_model
from megatron_hammer.config.run_plan import (
    BadLossPolicy,
    Batch,
    Checkpoints,
    Data,
    Evaluation,
    Machine,
    Output,
    RunPlan,
    RunSettings,
    Schedule,
    Sft,
)
from megatron_hammer.config.values import BATCH_ESSENTIALS, find_value_problems, list_missing
from megatron_hammer.data.order.order import MEGATRON
from megatron_hammer.data.sources import SPLIT_FLAGS
from megatron_hammer.model.accounting import MemoryOptions, ParallelLayout
from megatron_hammer.model.memory.options import WORKSPACE_BYTES, Precision, Recompute, Sharding
from megatron_hammer.presets.preset import Preset


def _read_same[T](kind: type[T], args: Any, **others: Any) -> T:
    """A part whose fields are arguments of the same names, except `others`."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in others]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names}, **others)


def read_settings(args: Any, flags: Flags, *, preset: Preset | None, initial_model: InitialModel | None) -> RunSettings:
    """The settings of a command line whose arguments are `args`."""
    has_model = not list_missing(flags) and not find_value_problems(flags)
    return _read_same(
        RunSettings,
        args,
        flags=flags,
        preset=preset,
        initial_model=initial_model,
        machine=_read_machine(args),
        output=_read_same(Output, args, is_dry_run=args.dry_run, has_json=args.json, is_verbose=args.verbose),
        precision=_read_precision(args),
        checkpoints=_read_checkpoints(args),
        schedule=read_schedule(args),
        bad_loss=_read_bad_loss_policy(args),
        evaluation=read_evaluation(args),
        data=read_data(args),
        sft=read_sft(args),
        recompute=_read_recompute(args),
        vocab_divisible_by=args.make_vocab_size_divisible_by,
        model=read_model(args) if has_model else None,
        layout=read_layout(args) if has_model else None,
        layers_per_chunk=read_layers_per_chunk(args),
    )


def read_plan(args: Any, settings: RunSettings) -> RunPlan | None:
    """The plan with these settings; None without a whole model and a batch."""
    if settings.model is None or settings.layout is None or list_missing(settings.flags, BATCH_ESSENTIALS):
        return None
    return _read_same(
        RunPlan,
        settings,
        batch=read_batch(args),
        memory=_read_memory_options(args, settings.layout, has_gpu=settings.machine.has_gpu),
        has_attention_mask=args.create_attention_mask_in_dataloader,
    )


# --- the machine ----------------------------------------------------------------------------------------------------


def _read_machine(args: Any) -> Machine:
    return _read_same(
        Machine,
        args,
        # Megatron's namespace has rank, local_rank and world_size, but not this number.
        local_world_size=read_process_place().local_world_size,
        # Under torchrun, a dry run without --world-size plans for the processes that torchrun started here.
        is_planned=args.dry_run and (args.requested_world_size is not None or "WORLD_SIZE" not in os.environ),
    )


def _read_precision(args: Any) -> Literal["bf16", "fp16", "fp32"]:
    # The flags and not --precision, which is ours: other trainers' checkpoints have only these flags.
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


# --- ranks ----------------------------------------------------------------------------------------------------------


def count_ranks_of_model(args: Any) -> int:
    """Ranks that hold one copy of the model between them: tp x pp x cp."""
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def count_least_world_size(args: Any) -> int:
    """The smallest world that the parallel sizes fit in: tp x pp x cp, widened until the experts tile a stage."""
    tp = args.tensor_model_parallel_size
    ranks_per_stage = tp * args.context_parallel_size
    expert_block = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp)
    if min(ranks_per_stage, expert_block, args.pipeline_model_parallel_size) < 1:
        return 1  # preflight reports the size that is not positive
    return math.lcm(ranks_per_stage, expert_block) * args.pipeline_model_parallel_size


def read_layers_per_chunk(args: Any) -> int | None:
    """--num-layers-per-virtual-pipeline-stage, where it decides the number of chunks; else None."""
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return None
    return args.num_layers_per_virtual_pipeline_stage


def _read_virtual_size(args: Any) -> int:
    """Model chunks of a stage, from either of Megatron's two flags; 1 without interleaving.

    --num-layers-per-virtual-pipeline-stage must divide the layers of a stage, which preflight checks.
    """
    layers_per_chunk = read_layers_per_chunk(args)
    if layers_per_chunk is None:
        return args.num_virtual_stages_per_pipeline_rank or 1
    # Megatron counts the embedding and the loss as a layer each where these two flags are set.
    slots = args.num_layers
    slots += int(args.account_for_embedding_in_pipeline_split) + int(args.account_for_loss_in_pipeline_split)
    return slots // args.pipeline_model_parallel_size // layers_per_chunk


def _count_data_parallel(args: Any) -> int:
    """As many copies of the model as fit in the world, at least one."""
    return max(1, args.world_size // count_ranks_of_model(args))


def read_layout(args: Any) -> ParallelLayout:
    """The parallel sizes, also where they do not fit the world; preflight says so."""
    return _read_same(
        ParallelLayout,
        args,
        virtual_pipeline_model_parallel_size=_read_virtual_size(args),
        data_parallel_size=_count_data_parallel(args),
        has_sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        has_distributed_optimizer=args.use_distributed_optimizer,
        num_layers_first_stage=args.decoder_first_pipeline_num_layers,
        num_layers_last_stage=args.decoder_last_pipeline_num_layers,
        accounts_for_embedding=args.account_for_embedding_in_pipeline_split,
        accounts_for_loss=args.account_for_loss_in_pipeline_split,
        chunk_layers=None,  # published runs only: --pipeline-model-parallel-layout is refused
    )


def read_batch(args: Any) -> Batch:
    """Where no global batch is given, Megatron takes one micro-batch on each data-parallel rank."""
    global_batch_size = args.global_batch_size or args.micro_batch_size * _count_data_parallel(args)
    eval_micro_batch_size = getattr(args, "eval_micro_batch_size", None)
    return Batch(
        micro_batch_size=args.micro_batch_size,
        global_batch_size=global_batch_size,
        eval_micro_batch_size=eval_micro_batch_size or args.micro_batch_size,
        eval_global_batch_size=args.eval_global_batch_size or global_batch_size,
        has_own_evaluation=args.eval_global_batch_size is not None or eval_micro_batch_size is not None,
        is_scheduled=getattr(args, "step_batch_size_schedule", None) is not None,
        may_decrease=getattr(args, "decrease_batch_size_if_needed", False),
        microbatch_group_size=getattr(args, "microbatch_group_size_per_vp_stage", None),
    )


# --- schedule and evaluation ----------------------------------------------------------------------------------------


def read_schedule(args: Any) -> Schedule:
    return _read_same(Schedule, args, skips_training=args.skip_train)


def read_evaluation(args: Any) -> Evaluation:
    """When and on how much a run is evaluated; 0 steps where Megatron has counted whole passes."""
    num_steps: Any = args.eval_iters
    return Evaluation(
        num_steps=0 if isinstance(num_steps, list) else num_steps,  # while it trains, Megatron counts whole passes here
        interval_steps=args.eval_interval,
        first_step=args.start_eval_at_iter,
        is_whole=args.full_validation,
        has_several_sets=getattr(args, "multiple_validation_sets", False),
        set_names=tuple(getattr(args, "validation_set_names", None) or ()),
        scored_every_steps=getattr(args, "evaluate_every", None),
        suite_path=getattr(args, "evaluate_suite", None),
    )


# --- data and checkpoints -------------------------------------------------------------------------------------------


def read_data_flags(args: Any) -> DataFlags:
    # An attribute and its split have different names, so _read_same cannot copy them.
    own = {name: getattr(args, attribute) for name, attribute in SPLIT_FLAGS.items()}
    return _read_same(DataFlags, args, data_paths_of=own, skips_training=args.skip_train)


def read_data(args: Any) -> Data:
    """Data sets, tokenizer and order. Flags that contradict each other are in its `problems`; nothing is raised."""
    flags = read_data_flags(args)
    sources, problems = read_data_plan(flags)
    needs_ends = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
    return _read_same(
        Data,
        args,
        flags=tuple(flags.list_given()),
        sources=sources,
        problems=tuple(problems),
        cache_dir=args.data_cache_path,
        flags_of_document_ends=tuple(name for name in needs_ends if getattr(args, name)),
        surplus=args.mid_level_dataset_surplus,
        dataloader_type=args.dataloader_type or "single",  # Megatron's default
        has_phases=bool(getattr(args, "phase_transition_iterations", None)),
        order=getattr(args, "data_order", MEGATRON),
        order_samples=getattr(args, "data_order_samples", None),
        accepts_order_change=getattr(args, "accept_data_order_change", False),
        accepts_many_epochs=getattr(args, "accept_many_epochs", False),
    )


def read_sft(args: Any) -> Sft | None:
    """None in pretraining."""
    if not getattr(args, "is_sft", False):
        return None
    return Sft(is_packed=not args.sft_unpacked, is_truncated=args.sft_truncate, num_epochs=args.sft_epochs)


def _read_checkpoints(args: Any) -> Checkpoints:
    return _read_same(
        Checkpoints,
        args,
        step=args.ckpt_step,
        pretrained=args.pretrained_checkpoint,
        is_finetuned=args.finetune,
        loads_optimizer=not args.no_load_optim,
        iteration_override=args.override_ckpt_iteration,
        has_own_schedule=args.override_opt_param_scheduler,
        has_saved_schedule=args.use_checkpoint_opt_param_scheduler,
        format=args.ckpt_format,
        is_verified=args.verify_checkpoint,
        keep_iterations=tuple(args.keep_iterations or ()),
        agreed=None,
    )


def _read_bad_loss_policy(args: Any) -> BadLossPolicy:
    has_dynamic_scale = args.fp16 and not args.loss_scale
    return BadLossPolicy(
        action=args.on_bad_loss,
        spike_factor=args.loss_spike_factor,
        num_rolled_back=args.rolled_back_steps,
        is_judged=args.check_for_nan_in_loss_and_grad
        and not has_dynamic_scale
        and args.rerun_mode != "report_determinism_stats",
    )


# --- memory ---------------------------------------------------------------------------------------------------------


def _read_recompute(args: Any) -> Recompute:
    if args.recompute_granularity == "full":
        return "full"
    return "selective" if args.recompute_granularity or args.recompute_activations else "none"


def _read_product_precision(args: Any) -> Precision:
    """The number format of the matrix products; fp16 takes as much memory as bf16."""
    if args.fp4:
        return "nvfp4"
    if args.fp8:
        block_scaled: dict[str, Precision] = {"blockwise": "fp8_blockwise", "mxfp8": "mxfp8"}
        return block_scaled.get(args.fp8_recipe, "fp8")
    return "bf16" if args.bf16 or args.fp16 else "fp32"


def _read_memory_options(args: Any, layout: ParallelLayout, *, has_gpu: bool) -> MemoryOptions:
    """The flags of a run that change its memory; Megatron's spelling of each is in `MemoryOptions`."""
    is_16_bit = args.bf16 or args.fp16
    has_fp32_gradients = not is_16_bit or args.accumulate_allreduce_grads_in_fp32
    # Megatron accumulates the gradients of bf16 weights in fp32, unless the optimizer takes other ones.
    has_fp32_gradients |= args.bf16 and _count_element_bytes(args.main_grads_dtype) == 4
    instances = args.num_distributed_optimizer_instances
    # model/torch_modules.py: in fp32 on a GPU, and where a mask is added to the scores
    is_packed = args.is_sft and not args.sft_unpacked
    has_own_mask = args.window_size or args.create_attention_mask_in_dataloader or is_packed
    has_mask = args.backend == "torch" and bool(has_own_mask)
    has_expanded_heads = has_gpu and args.backend == "torch" and (has_mask or not is_16_bit)
    comm_types = args.cp_comm_type if isinstance(args.cp_comm_type, list) else [args.cp_comm_type]
    moments_bytes, matrix_moments_bytes = _count_moments(args)
    return MemoryOptions(
        moments_bytes=moments_bytes,
        matrix_moments_bytes=matrix_moments_bytes,
        master_bytes=_count_master_bytes(args),
        optimizer_offload_ratio=args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0,
        num_offloaded_layers=args.cpu_offloading_num_layers,
        offload_modules=tuple(args.offload_modules or ()) if args.fine_grained_activation_offloading else (),
        offload_ratio=args.activation_offload_fraction,
        precision=_read_product_precision(args),
        has_expanded_heads=has_expanded_heads,
        has_quantized_parameters=bool((args.fp8 and args.fp8_param_gather) or (args.fp4 and args.fp4_param_gather)),
        recompute=_read_recompute(args),
        recompute_modules=tuple(args.recompute_modules or ("core_attn",)),
        recompute_method=args.recompute_method or "uniform",
        recompute_num_layers=args.recompute_num_layers,
        has_hidden_dropout=args.hidden_dropout > 0,
        has_attention_dropout=args.attention_dropout > 0,
        has_flash_attention=getattr(args.attention_backend, "name", "auto") not in ("unfused", "local"),
        cross_entropy=args.cross_entropy,
        is_context_parallel_all_to_all=comm_types == ["a2a"],
        sharding=_select_sharding(args, layout),
        shard_size=layout.dense_shard_size // instances if layout.has_distributed_optimizer and instances > 1 else None,
        gradient_bytes=4 if has_fp32_gradients and not args.grad_reduce_in_bf16 else 2,
        has_fused_activation=args.bias_swiglu_fusion,
        has_linear_offset=not args.bias_swiglu_fusion,
        has_fused_norms=args.backend == "te",
        has_separate_values=_has_separate_values(args, has_expanded_heads=has_expanded_heads),
        has_fused_weight_gradients=args.gradient_accumulation_fusion and args.backend == "te",
        workspace_bytes=(WORKSPACE_BYTES if has_gpu else 0) + _count_window_mask_bytes(args),
        vocab_divisible_by=args.make_vocab_size_divisible_by,
    )


def _count_moments(args: Any) -> tuple[int, int]:
    """Bytes per element of the optimizer's moments, and of those of matrices.

    Lion has one moment; Muon has one of matrices, and trains the rest with Adam or Lion. Adam's two have types of their
    own with --use-precision-aware-optimizer.
    """
    is_muon, is_lion = args.optimizer in ("muon", "dist_muon"), args.optimizer == "lion"
    if args.use_precision_aware_optimizer and args.optimizer == "adam":
        size = sum(_count_element_bytes(dtype) for dtype in (args.exp_avg_dtype, args.exp_avg_sq_dtype))
        return size, size
    has_scalar_lion = "muon" in args.optimizer and args.muon_scalar_optimizer == "lion"
    return (
        4 if is_lion or has_scalar_lion or args.optimizer == "sgd" else 8,
        4 if is_lion or is_muon or args.optimizer == "sgd" else 8,
    )


def _count_element_bytes(dtype: Any) -> int:
    """Of a number format as a flag spells it, or as a torch.dtype."""
    text = str(dtype)
    return 1 if "8" in text else 2 if "16" in text else 4


def _count_master_bytes(args: Any) -> int:
    """Bytes per element of the optimizer's own weights of a 16-bit model.

    The precision-aware optimizer keeps the 16 bits that bf16 weights lost (store_param_remainders), or 16-bit weights.
    With per-tensor current, block or MX scaling, and with an optimizer on the host, Megatron keeps fp32 weights itself.
    Source: megatron.core.optimizer.optimizer_config, use_precision_aware_optimizer_no_fp8_or_ds_fp8.
    """
    if not args.use_precision_aware_optimizer or args.optimizer_cpu_offload:
        return 4
    if _count_element_bytes(args.main_params_dtype) != 4:
        return _count_element_bytes(args.main_params_dtype)
    is_kept_by_megatron = args.fp8_recipe not in (None, "delayed")
    return 2 if args.bf16 and not is_kept_by_megatron else 4


def _count_window_mask_bytes(args: Any) -> int:
    """The torch backend keeps one mask [s, s] for all layers with a sliding window, in the dtype of the scores.

    What such a layer saves is not counted, on either backend: its activations are as large as those of full attention.
    """
    length = args.seq_length or 0
    if args.backend != "torch" or not args.window_size or args.window_size[0] >= length - 1:
        return 0
    return int(length**2 * (2 if args.bf16 or args.fp16 else 4))


def _has_separate_values(args: Any, *, has_expanded_heads: bool) -> bool:
    """Whether attention keeps values of their own, and not a view of linear_qkv's output.

    TransformerEngine's attention copies a view; PyTorch's takes it as it is, unless each head has a copy.
    """
    is_grouped = args.group_query_attention and args.num_query_groups != args.num_attention_heads
    return args.backend == "te" or args.fused_single_qkv_rope or (has_expanded_heads and is_grouped)


def _select_sharding(args: Any, layout: ParallelLayout) -> Sharding:
    """FSDP shards everything unless Megatron's is told to shard less; shards of gradients alone count as none."""
    if args.use_torch_fsdp2:
        return "fsdp"
    if args.use_megatron_fsdp:
        strategies: dict[str, Sharding] = {"optim_grads_params": "fsdp", "no_shard": "none"}
        # Sharded gradients ("optim_grads") have no entry: their memory is estimated as the optimizer's shard alone.
        return strategies.get(args.data_parallel_sharding_strategy, "distributed_optimizer")
    return "distributed_optimizer" if layout.has_distributed_optimizer else "none"
