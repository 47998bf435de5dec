"""A preset as Megatron's arguments: {attribute of Megatron's namespace: value}. Pure; no torch, no megatron."""

from typing import Any

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.presets.preset import Preset, Recipe


def preset_arguments(preset: Preset) -> dict[str, Any]:
    """Everything that `--preset` sets; flags on the command line replace it."""
    return {**build_model_arguments(preset.model), **recipe_arguments(preset.recipe)}


def recipe_arguments(recipe: Recipe) -> dict[str, Any]:
    """Batch, schedule, regularisation, precision and layout."""
    vp = recipe.virtual_pipeline_model_parallel_size
    return {
        "seq_length": recipe.seq_length,
        "micro_batch_size": recipe.micro_batch_size,
        "global_batch_size": recipe.global_batch_size,
        "train_iters": recipe.train_steps,
        "lr": recipe.lr,
        "min_lr": recipe.min_lr,
        # Not a field of Recipe: every shipped recipe decays by a cosine.
        "lr_decay_style": "cosine",
        "lr_warmup_iters": recipe.lr_warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_eps": recipe.adam_eps,
        "clip_grad": recipe.clip_grad,
        "hidden_dropout": recipe.hidden_dropout,
        "attention_dropout": recipe.attention_dropout,
        "precision": recipe.precision,
        "tensor_model_parallel_size": recipe.tensor_model_parallel_size,
        "pipeline_model_parallel_size": recipe.pipeline_model_parallel_size,
        # megatron.training.arguments.validate_args also turns 1 into None: one chunk per stage is no interleaving.
        "num_virtual_stages_per_pipeline_rank": vp if vp > 1 else None,
        "account_for_embedding_in_pipeline_split": recipe.has_ends_in_pipeline_split,
        "account_for_loss_in_pipeline_split": recipe.has_ends_in_pipeline_split,
        "expert_model_parallel_size": recipe.expert_model_parallel_size,
        "expert_tensor_parallel_size": recipe.expert_tensor_parallel_size,
        "sequence_parallel": recipe.has_sequence_parallel,
    }
