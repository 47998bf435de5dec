"""Megatron's own model of a checkpoint, on one CPU rank, from the arguments that the checkpoint saved.

What training builds with those arguments, without parallelism, random numbers or vocabulary padding. `single_rank()`
must be open while a model is built and run. The mapping of this package plays no part here: the names are Megatron's.
"""

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.checkpoint_reader import use_fused_norm_names
from megatron_hammer.errors import CheckpointError
from megatron_hammer.platforms import megatron_compat

# The saved arguments that decide the logits of a token. Everything else (layout, precision, kernels, data) is chosen by
# this process. Arguments that change the model in other ways are refused by saved_model.py.
MODEL_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention"),
    *("num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings", "normalization"),
    *("layernorm_epsilon", "swiglu", "add_bias_linear", "add_qkv_bias", "position_embedding_type"),
    *("untie_embeddings_and_output_weights", "embedding_norm", "init_method_std", "bias_gelu_fusion"),
    *("bias_swiglu_fusion", "qk_layernorm", "rotary_base", "rotary_percent", "rotary_interleaved"),
    *("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "rope_type"),
    *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("moe_router_pre_softmax", "moe_shared_expert_gate", "moe_layer_freq", "moe_router_score_function"),
    *("moe_router_topk_scaling_factor", "moe_apply_probs_on_input"),
)
_UNPLANNED_FLAGS = (
    *("--mock-data", "--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--moe-token-dispatcher-type", "alltoall"),
)


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """A gloo group of this process alone, with megatron's parallel state and random states on it."""
    megatron_compat.install("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        # A file in a private folder, not a TCP port: nothing can collide with another process of the machine.
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        try:
            parallel_state.initialize_model_parallel()
            # DotProductAttention enters megatron's tracker of random states around its dropout, in evaluation too.
            model_parallel_cuda_manual_seed(1234)
            yield
        finally:
            # Both are global in the process: without this, a second call in the same process would fail.
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def read_model_arguments(saved: Any, **changes: Any) -> Namespace:
    """Megatron's namespace for the saved model on one rank; `changes` replace what was saved."""
    megatron_compat.install("cpu")
    from megatron_hammer.config.arguments import parse_arguments

    precision = changes.pop("precision", "fp32")
    # A parsed command line: megatron also reads many arguments that are no property of the saved model.
    flags = [*_UNPLANNED_FLAGS, "--precision", precision]
    namespace = parse_arguments(flags, platform="cpu", backend="torch").namespace
    values = {name: getattr(saved, name) for name in MODEL_ARGUMENTS if hasattr(saved, name)}
    for name, value in {**values, **changes}.items():
        setattr(namespace, name, value)
    # The flags above plan no run, so the length is not that of the checkpoint.
    namespace.seq_length = namespace.max_position_embeddings
    if not namespace.group_query_attention:
        namespace.num_query_groups = namespace.num_attention_heads
    return namespace


def build_model(namespace: Namespace) -> Any:
    """The whole model in evaluation mode; its weights have no values yet."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_hammer.config.megatron_checks import build_trial_config
    from megatron_hammer.model.provider import HammerModelBuilder, build_model_config

    _, megatron_config = build_trial_config(namespace)
    config = build_model_config(
        megatron_config,
        backend="torch",
        has_embedding_norm=namespace.embedding_norm,
        rope_scaling_factor=namespace.rope_scaling_factor,
    )
    # Every weight is overwritten by fill_weights, which refuses to leave one out.
    config.transformer.perform_initialization = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = HammerModelBuilder(config).build_model(groups, pre_process=True, post_process=True).eval()
    # Position embeddings are made in fp32; in training megatron's Float16Module converts the whole model.
    return model.to(config.transformer.params_dtype)


def name_parameters(model: Any) -> dict[str, Tensor]:
    """The model's parameters by the names that a checkpoint has for them."""
    # SequentialMLP names its experts local_experts; its sharded_state_dict stores them under experts.
    named = {
        name.replace(".experts.local_experts.", ".experts.experts."): parameter.data
        for name, parameter in model.named_parameters()
    }
    return use_fused_norm_names(named)


def fill_weights(model: Any, names: set[str], read: Callable[[str], Tensor], *, where: str) -> None:
    """Copy `read(name)` into every parameter of the model, one at a time.

    Raises CheckpointError with a sentence for every tensor that the model needs and `names` lacks, or the reverse, and
    for every tensor of another shape.
    """
    parameters = name_parameters(model)
    problems = [
        f"{name}: Megatron's model has it, got none in {where}. Its saved arguments are not its own."
        for name in sorted(parameters.keys() - names)
    ]
    problems += [
        f"{name}: Megatron's model must have it, as {where} does, got none. Its saved arguments are not its own."
        for name in sorted(names - parameters.keys())
    ]
    for name in sorted(parameters.keys() & names):
        value = read(name)
        if value.shape != parameters[name].shape:
            problems.append(
                f"{name}: Megatron's model has shape {tuple(parameters[name].shape)}, got {tuple(value.shape)} in "
                f"{where}. Its saved arguments are not its own."
            )
            continue
        parameters[name].copy_(value)  # converts from the stored dtype to that of the computation
    if problems:
        raise CheckpointError(*problems)


def compute_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [s, v] of tokens [s]."""
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(tokens[None], positions, None)[0]
