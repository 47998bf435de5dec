"""Our model of one CPU rank, built in this process through the same arguments and provider as training.

For tests that look inside the model. `single_rank()` must be open while a model is built and run.
"""

import contextlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.verification.megatron_model import name_parameters as checkpoint_parameters
from megatron_hammer.checkpoint.verification.megatron_model import single_rank as single_rank
from megatron_hammer.checkpoint_files.checkpoint_reader import VOCABULARY_TENSORS
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.platforms import megatron_compat
from megatron_hammer.presets.preset import Preset, Recipe

TOY_RECIPE = Recipe(
    source="",
    seq_length=29,
    global_batch_size=2,
    micro_batch_size=2,
    lr=1e-3,
    min_lr=0.0,
    lr_warmup_steps=0,
    train_tokens=2 * 29,
    precision="fp32",
)


def read_arguments(model: ModelShape, flags: Sequence[str] = ()) -> Namespace:
    """Megatron's validated namespace for `--preset <model> <flags>`, as training makes it."""
    megatron_compat.install("cpu")
    from megatron.training.arguments import validate_args

    from megatron_hammer.config.arguments import parse_arguments
    from megatron_hammer.presets import catalogue as presets

    presets.PRESETS[model.name] = Preset(num_parameters=count_parameters(model), model=model, recipe=TOY_RECIPE)
    try:
        parsed = parse_arguments(["--preset", model.name, "--mock-data", *flags], platform="cpu", backend="torch")
    finally:
        del presets.PRESETS[model.name]
    with contextlib.redirect_stdout(None):
        validate_args(parsed.namespace)
    return parsed.namespace


def build_whole_model(namespace: Namespace) -> Any:
    """The whole model, in evaluation mode, with megatron's initial weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_hammer.model.provider import HammerModelBuilder, build_model_config

    config = build_model_config(
        gpt_config_from_args(namespace),
        backend="torch",
        has_embedding_norm=namespace.embedding_norm,
        residual_multiplier=namespace.residual_multiplier,
        rope_scaling_factor=namespace.rope_scaling_factor,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return HammerModelBuilder(config).build_model(groups, pre_process=True, post_process=True).eval()


def load_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy tensors with checkpoint names and no vocabulary padding into the model, every one of its parameters."""
    parameters = checkpoint_parameters(model)
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        value = weights[name]
        if name in VOCABULARY_TENSORS:
            value = torch.nn.functional.pad(value, (0, 0, 0, parameter.shape[0] - value.shape[0]))
        parameter.copy_(value)


def compute_logits(model: Any, tokens: Tensor, *, vocab_size: int) -> Tensor:
    """Logits [b, s, v] of tokens [b, s]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)[..., :vocab_size]
