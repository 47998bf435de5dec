"""From a command line to Megatron's namespace and PretrainConfigContainer: the one file that touches both.

`parse_arguments` reads flags over a preset, derives what follows from platform and backend, and reads the run's plan
off the result. It starts nothing and needs no GPU. `finalize_arguments` lets Megatron validate and set its globals. In
between, preflight looks for problems. Everything else in the package takes the plan.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_hammer.config.data_flags import read_data_plan
from megatron_hammer.config.environment import read_process_place
from megatron_hammer.config.flags import Flags
from megatron_hammer.config.fused_kernels import select_fused_kernels
from megatron_hammer.config.initial_model import InitialModel, initial_model_arguments, select_initial_tokenizer
from megatron_hammer.config.own_flags import add_own_flags, read_option
from megatron_hammer.config.preset_arguments import preset_arguments
from megatron_hammer.config.read_plan import (
    count_least_world_size,
    count_ranks_of_model,
    read_data_flags,
    read_plan,
    read_settings,
    read_sft,
)
from megatron_hammer.config.run_plan import RunPlan, RunSettings
from megatron_hammer.config.sft import count_sft_steps, sft_arguments
from megatron_hammer.config.training_state import TrainingState
from megatron_hammer.config.values import find_missing_problems, find_value_problems
from megatron_hammer.data.order.order import EPOCHWISE
from megatron_hammer.data.order.run_order import plan_run_order
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.presets.preset import LLAMA_2_SFT

DEFAULT_SPLIT = "98,2,0"  # Megatron's own "969,30,1" makes a test set that nobody asked for
DEFAULT_SAVE_INTERVAL_STEPS = 1000
DEFAULT_EVAL_ITERS = 10
MEGATRONS_TIMEOUT_MIN = 10
LONGEST_TIMEOUT_MIN = 24 * 60
# Rank 0 builds the index of samples while the other ranks wait in a collective. megatron-core 0.19.2 took 0.5 us per
# sample of one document on a busy core, and 2 to 3 us per sample of four, which is most often the time to shuffle the
# documents. Twice that, because the index is also written, perhaps to a slow file system.
INDEX_S_PER_SAMPLE = 6e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedArguments:
    """A command line, read once. namespace: Megatron's arguments, for the files that build Megatron's configuration.

    plan: None where an essential is missing or a value makes no sense; preflight then says which.
    """

    namespace: argparse.Namespace
    settings: RunSettings
    plan: RunPlan | None

    def require_plan(self) -> RunPlan:
        """The plan of a command line in which preflight found no problem."""
        if self.plan is None:
            raise ConfigError(*find_missing_problems(self.settings.flags), *find_value_problems(self.settings.flags))
        return self.plan


def parse_arguments(
    argv: Sequence[str],
    *,
    platform: str,
    backend: str,
    is_plan: bool = False,
    initial_model: InitialModel | None = None,
) -> ParsedArguments:
    """Parse `argv` over the preset it names and derive the rest for `platform` and `backend`.

    is_plan: no process group will form, so this process stands for all ranks of the run. initial_model: what --load-hf
    names; its model takes the place of the preset's.

    Raises ConfigError for an unknown flag, a value of the wrong type, an unknown preset or a senseless environment.
    """
    from megatron.training.arguments import add_megatron_arguments

    read_process_place()  # megatron's parser reads the same variables, and fails where one is not a number

    parser = CommandParser(allow_abbrev=False)
    parser.register("type", float, float)  # preflight names a NaN together with all other problems
    add_own_flags(add_megatron_arguments(parser))
    for action in parser._actions:  # megatron 0.19.2 writes a bare % in one help text, at which argparse fails
        if action.help and "%)" in action.help:
            action.help = action.help.replace("%)", "%%)")
    preset_name = read_option(argv, "--preset")
    preset = None if preset_name is None else select_preset(preset_name)
    defaults = _package_defaults()
    if preset is not None:
        defaults |= preset_arguments(preset)
    if initial_model is not None:
        defaults |= initial_model_arguments(initial_model, has_preset=preset is not None)
    if "--sft" in argv:
        defaults |= sft_arguments(LLAMA_2_SFT if preset is None else preset.sft)
    # A preset is ours, so an argument that Megatron lacks is our bug and not a problem of the command line.
    missing = sorted(set(defaults) - {action.dest for action in parser._actions})
    if missing:
        raise ValueError(f"preset sets arguments that Megatron does not have: {missing}")
    parser.set_defaults(**defaults)
    namespace = parser.parse_args(list(argv))
    # argparse does not tell a typed value from a default; preflight reports only typed flags as idle.
    typed = _typed_destinations(parser, argv)
    # Before the derivations below: the timeout and the evaluation interval depend on the length of the run.
    _drop_what_is_replaced(namespace, typed)
    _read_environment(namespace, is_plan=is_plan or namespace.dry_run)
    if initial_model is not None and namespace.tokenizer_model is None and namespace.tokenizer_type is None:
        sources, _ = read_data_plan(read_data_flags(namespace))
        namespace.tokenizer_model = select_initial_tokenizer(initial_model, sources)
    _derive(namespace, platform=platform, backend=backend, typed=typed)
    flags = Flags(values=MappingProxyType(dict(vars(namespace))), typed=typed)
    settings = read_settings(namespace, flags, preset=preset, initial_model=initial_model)
    return ParsedArguments(namespace=namespace, settings=settings, plan=read_plan(namespace, settings))


def _package_defaults() -> dict[str, Any]:
    """Where our defaults differ from Megatron's, whatever the preset."""
    return {
        "log_interval": 1,
        "eval_interval": None,
        "eval_iters": DEFAULT_EVAL_ITERS,
        "use_distributed_optimizer": True,
        # Checkpoints that resume at any TP, PP and DP.
        "ckpt_format": "torch_dist",
        "dist_ckpt_optim_fully_reshardable": True,
        # Megatron's own worker, which needs no package; see platforms/checkpoint_saving.py.
        "async_strategy": "mcore",
        # SIGTERM (and Ctrl-C, see training/pretrain.py) save a checkpoint and stop.
        "exit_signal_handler": True,
        # Both backends make the causal mask themselves; a dataloader's [s, s] mask would only be copied about.
        "create_attention_mask_in_dataloader": False,
        "log_validation_ppl_to_tensorboard": True,
        "lr_decay_style": "cosine",
    }


def _typed_destinations(parser: argparse.ArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    names = {argument.split("=", 1)[0] for argument in argv if argument.startswith("--")}
    return frozenset(action.dest for name, action in parser._option_string_actions.items() if name in names)


def _drop_what_is_replaced(namespace: argparse.Namespace, typed: frozenset[str]) -> None:
    """--train-samples replaces the preset's step count and turns its warm-up into samples; a fraction replaces both."""
    # A typed length of the run or of its warm-up replaces that of the fine-tuning recipe.
    if typed & {"train_iters", "train_samples"} and "sft_epochs" not in typed:
        namespace.sft_epochs = None
    if typed & {"lr_warmup_iters", "lr_warmup_samples"} and "lr_warmup_fraction" not in typed:
        namespace.lr_warmup_fraction = None
    if "lr_warmup_fraction" in typed and "lr_warmup_iters" not in typed:
        namespace.lr_warmup_iters = 0
    if "train_samples" not in typed:
        return
    namespace.train_iters = namespace.train_iters if "train_iters" in typed else None
    if "lr_warmup_iters" not in typed:
        if "lr_warmup_samples" not in typed:
            namespace.lr_warmup_samples = namespace.lr_warmup_iters * (namespace.global_batch_size or 0)
        namespace.lr_warmup_iters = 0


def _read_environment(namespace: argparse.Namespace, *, is_plan: bool) -> None:
    """What torchrun and SLURM launchers tell a process about itself; a plan has the ranks that it needs at least."""
    namespace.rank, namespace.world_size, namespace.local_rank, _ = read_process_place()
    if namespace.requested_world_size is not None:
        namespace.world_size = namespace.requested_world_size
    elif is_plan and "WORLD_SIZE" not in os.environ:
        namespace.world_size = count_least_world_size(namespace)


def _derive(namespace: argparse.Namespace, *, platform: str, backend: str, typed: frozenset[str]) -> None:
    """Fill in what follows from other values; a typed flag is never overruled."""

    def default(name: str, value: Any) -> None:
        if name not in typed:
            setattr(namespace, name, value)

    namespace.platform, namespace.backend = platform, backend
    namespace.is_sft = namespace.sft
    namespace._is_global_batch_size_explicitly_specified = "global_batch_size" in typed
    namespace.bf16 = namespace.bf16 or (namespace.precision == "bf16" and not namespace.fp16)
    namespace.fp16 = namespace.fp16 or namespace.precision == "fp16"
    # Megatron's default of --num-query-groups is 1, which it ignores without --group-query-attention.
    if not namespace.group_query_attention:
        namespace.num_query_groups = namespace.num_attention_heads
    default("distributed_backend", "gloo" if platform == "cpu" else "nccl")
    default("num_workers", 0 if platform == "cpu" else 2)
    default("transformer_impl", "transformer_engine" if backend == "te" else "local")
    default("no_persist_layer_norm", backend != "te")
    default("masked_softmax_fusion", False)
    vars(namespace).update(select_fused_kernels(vars(namespace), typed, platform=platform, backend=backend))
    if platform == "cpu":
        default("disable_jit_fuser", True)
    if namespace.use_megatron_fsdp:
        default("ckpt_format", "fsdp_dtensor")  # the one format that megatron has for it
    if namespace.use_torch_fsdp2:
        default("use_distributed_optimizer", False)  # FSDP itself shards the optimizer's state
    is_data_parallel = namespace.world_size > count_ranks_of_model(namespace)
    default("overlap_grad_reduce", platform == "cuda" and is_data_parallel)
    default("overlap_param_gather", platform == "cuda" and is_data_parallel and namespace.use_distributed_optimizer)
    if namespace.tensor_model_parallel_size > 1 and namespace.num_experts:
        default("sequence_parallel", True)  # mcore's MoE requires it with tensor parallelism
    _derive_data(namespace, default)
    if namespace.sft:
        _derive_sft(namespace)
    _derive_validation(namespace, default)
    _derive_schedule(namespace, default)
    _derive_timeout(namespace, default)
    _derive_vocabulary(namespace)


def _derive_data(namespace: argparse.Namespace, default: Any) -> None:
    if namespace.tokenizer_type is None:
        model = namespace.tokenizer_model
        if model is None:
            namespace.tokenizer_type = "NullTokenizer"
        # A .model file is SentencePiece's own format; every other name is read as a Hugging Face tokenizer.
        elif str(model).endswith(".model"):
            namespace.tokenizer_type = "SentencePieceTokenizer"
        else:
            namespace.tokenizer_type = "HuggingFaceTokenizer"
    if namespace.data_path is not None or namespace.data_args_path is not None:
        default("split", DEFAULT_SPLIT)
    # The mask depends on where the documents of a sample end, so only the data loader can make it.
    if namespace.reset_attention_mask:
        default("create_attention_mask_in_dataloader", True)


def _derive_sft(namespace: argparse.Namespace) -> None:
    """The loss per learned token, and the steps of the recipe's epochs."""
    # Megatron sums the losses over all ranks and micro-batches and divides by the number of tokens.
    namespace.calculate_per_token_loss = True
    sft, (sources, problems) = read_sft(namespace), read_data_plan(read_data_flags(namespace))
    has_length = namespace.train_iters is not None or namespace.train_samples is not None
    if sft is not None and not has_length and not problems:
        namespace.train_iters = count_sft_steps(
            sft,
            sources,
            seq_length=namespace.seq_length or 0,
            global_batch_size=namespace.global_batch_size or 0,
            context_parallel_size=namespace.context_parallel_size,
        )


def _derive_validation(namespace: argparse.Namespace, default: Any) -> None:
    """Megatron has several validation sets only with whole passes, and whole passes only one sample at a time.

    A whole pass over a single set fails on ranks that read no data (it takes the length of None); as a list of one set
    it does not.
    """
    if namespace.multiple_validation_sets:
        default("full_validation", True)
    if not namespace.full_validation:
        return
    namespace.multiple_validation_sets = True
    # An interleaved schedule needs as many micro-batches as stages: each sample is then seen that often, equally.
    is_interleaved = namespace.num_virtual_stages_per_pipeline_rank or namespace.num_layers_per_virtual_pipeline_stage
    num_microbatches = namespace.pipeline_model_parallel_size if is_interleaved else 1
    default("eval_micro_batch_size", 1)
    default(
        "eval_global_batch_size",
        max(1, namespace.world_size // max(1, count_ranks_of_model(namespace))) * num_microbatches,
    )


def _derive_schedule(namespace: argparse.Namespace, default: Any) -> None:
    steps = namespace.train_iters
    # Four evaluations in a short run; a long one is evaluated every 1,000 steps.
    default("eval_interval", namespace.eval_interval or max(1, min(1000, (steps or 1000) // 4)))
    if namespace.save is not None:
        has_local_checkpoints = namespace.non_persistent_ckpt_type == "local"  # which nvidia-resiliency-ext writes
        default("async_save", namespace.ckpt_format == "torch_dist" and not has_local_checkpoints)
        default("use_persistent_ckpt_worker", namespace.async_save)  # without, Megatron switches the other off
        default("load", namespace.save)  # the same command continues an interrupted run
        default("save_interval", namespace.save_interval or DEFAULT_SAVE_INTERVAL_STEPS)
        if namespace.metrics_path is None:
            namespace.metrics_path = os.path.join(namespace.save, "metrics.jsonl")


def _derive_timeout(namespace: argparse.Namespace, default: Any) -> None:
    """How long a rank waits for the others: at least as long as rank 0 builds the index of the run's samples."""
    steps, batch = namespace.train_iters or 0, namespace.global_batch_size or 0
    steps = steps or (namespace.train_samples or 0) // max(1, batch)
    num_samples = steps * batch
    if not namespace.full_validation:
        eval_batch = namespace.eval_global_batch_size or batch
        num_samples += (steps // max(1, namespace.eval_interval) + 1) * (namespace.eval_iters or 0) * eval_batch
    needed_min = math.ceil(num_samples * INDEX_S_PER_SAMPLE / 60)
    default("distributed_timeout_minutes", min(max(MEGATRONS_TIMEOUT_MIN, needed_min), LONGEST_TIMEOUT_MIN))


def _derive_vocabulary(namespace: argparse.Namespace) -> None:
    """The padded size follows from the model's vocabulary, not from the tokenizer's; preflight compares the two."""
    from megatron_hammer.model.accounting import padded_vocab_size

    sizes = (namespace.vocab_size, namespace.make_vocab_size_divisible_by, namespace.tensor_model_parallel_size)
    if namespace.padded_vocab_size is None and namespace.vocab_size is not None and min(sizes) > 0:
        namespace.padded_vocab_size = padded_vocab_size(
            namespace.vocab_size,
            divisible_by=namespace.make_vocab_size_divisible_by,
            tensor_model_parallel_size=namespace.tensor_model_parallel_size,
        )


def finalize_arguments(arguments: ParsedArguments) -> TrainingState:
    """Let Megatron validate its namespace (it fills in and changes values) and set its globals.

    Returns the view of what its training loop will change in them.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    # Megatron's loop would average the losses of an evaluation over micro-batches, not over learned tokens. `is_sft`
    # keeps what was asked for, in checkpoints too.
    arguments.namespace.sft = False
    # First: the globals are made from the values that validation fills in.
    validate_args(arguments.namespace)
    set_global_variables(arguments.namespace)
    return TrainingState(arguments.namespace)


def build_config_container(arguments: ParsedArguments, build_model_config: Callable[..., Any]) -> Any:
    """Megatron's PretrainConfigContainer for finalized arguments.

    build_model_config: from megatron's GPTModelConfig to ours (model.provider.build_model_config, which loads torch).
    """
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    namespace, plan = arguments.namespace, arguments.require_plan()
    model_config = build_model_config(
        gpt_config_from_args(namespace),
        backend=namespace.backend,
        has_embedding_norm=namespace.embedding_norm,
        residual_multiplier=namespace.residual_multiplier,
        num_tokens=namespace.vocab_size,
        rope_scaling_factor=namespace.rope_scaling_factor,
        is_packed=plan.rows is not None and plan.rows.is_packed,
    )
    return pretrain_cfg_container_from_args(namespace, model_config)


def build_dataset_config(arguments: ParsedArguments, plan: RunPlan) -> Any:
    """mcore's configuration of data sets for finalized arguments; its tokenizer is Megatron's global."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_hammer.data.conversations.dataset import ConversationDatasetConfig
    from megatron_hammer.data.order.epochwise_dataset import EpochwiseGPTDatasetConfig

    namespace = arguments.namespace
    blend, blend_per_split = get_blend_and_blend_per_split(namespace)
    same = {
        "random_seed": namespace.seed,
        "sequence_length": namespace.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "multiple_validation_sets": namespace.multiple_validation_sets,
        "full_validation": namespace.full_validation,
        "split": namespace.split,
        "num_dataset_builder_threads": namespace.num_dataset_builder_threads,
        "path_to_cache": namespace.data_cache_path,
        "mmap_bin_files": namespace.mmap_bin_files,
        "tokenizer": get_tokenizer(),
        "mid_level_dataset_surplus": namespace.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": namespace.allow_ambiguous_pad_tokens,
    }
    if plan.rows is not None:
        rows = plan.rows
        return ConversationDatasetConfig(
            **same, is_packed=rows.is_packed, is_truncated=rows.is_truncated, granularity=rows.granularity
        )
    config_class = functools.partial(GPTDatasetConfig)
    if plan.data.order == EPOCHWISE:
        order = plan_run_order(plan.order)
        joint_samples = {} if order is None else order.joint_samples_of_sources
        config_class = functools.partial(EpochwiseGPTDatasetConfig, joint_samples=joint_samples)
    return config_class(
        **same,
        reset_position_ids=namespace.reset_position_ids,
        reset_attention_mask=namespace.reset_attention_mask,
        eod_mask_loss=namespace.eod_mask_loss,
        create_attention_mask=namespace.create_attention_mask_in_dataloader,
        object_storage_cache_path=namespace.object_storage_cache_path,
        fast_cache_load=namespace.dataloader_fast_cache_load,
        defer_npy_index_mmap=namespace.dataloader_defer_npy_index_mmap,
        data_parallel_size=namespace.data_parallel_size,
        context_parallel_size=namespace.context_parallel_size,
    )
