"""Megatron's own model of a checkpoint, or one rank's part of it, from the arguments that the checkpoint saved.

What training builds with those arguments, without random numbers or vocabulary padding. Megatron's parallel state must
exist while a model is built and run: `single_rank()` makes one for this process alone. The mapping of this package
plays no part here: the names are Megatron's.
"""

import contextlib
import dataclasses
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.checkpoint_reader import use_fused_norm_names
from megatron_hammer.checkpoint_files.saved_arguments import complete_arguments
from megatron_hammer.config.megatron_checks import list_model_arguments
from megatron_hammer.config.model_arguments import YARN_ARGUMENTS
from megatron_hammer.config.preflight.platform import NEEDS_TE
from megatron_hammer.errors import CheckpointError
from megatron_hammer.platforms import megatron_compat

# What this process chooses, and not the checkpoint: layout, precision, kernels, recomputation, noise of the training.
# Every other argument that Megatron reads while it builds a model is the saved one.
_CHOSEN_HERE = """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split apply_rope_fusion
    attention_backend attention_dropout attention_softmax_in_fp32 batch_invariant_mode bias_dropout_fusion
    calculate_per_token_loss clone_scatter_output_in_embedding config_logger_dir cp_comm_type
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers disable_bf16_reduced_precision_matmul
    distribute_saved_activations enable_cuda_graph external_cuda_graph first_last_layers_bf16
    flash_attention_version flash_decode fp16_lm_cross_entropy fp32_residual_connection fused_residual_rmsnorm
    hidden_dropout high_priority_a2a_comm_stream init_model_with_meta_device kitchen_attention_backend
    log_max_attention_logit make_vocab_size_divisible_by masked_softmax_fusion min_offloaded_tensor_size
    mlp_chunks_for_prefill mlp_chunks_for_training moe_deepep_num_sms moe_enable_deepep
    moe_enable_routing_replay moe_grouped_gemm moe_input_jitter_eps moe_layer_recompute
    moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference moe_per_layer_logging
    moe_router_dtype moe_router_fusion moe_shared_expert_overlap moe_token_dispatcher_type
    nccl_all_reduce_for_prefill no_persist_layer_norm num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
    padded_vocab_size pipeline_model_parallel_layout seed symmetric_ar_type te_precision_config_file test_mode
    transformer_impl use_fused_weighted_squared_relu use_kitchen_attention use_mamba_mem_eff_path
    use_te_activation_func use_transformer_engine_op_fuser
"""
_CHOSEN_PREFIXES = (
    *("activation_offload", "cuda_graph_", "delay_offload", "delta_offload", "fine_grained_", "fp4", "fp8"),
    *("inference_", "moe_flex_", "moe_hybridep_", "moe_ncclep_", "moe_paged_stash", "moe_permute_"),
    *("moe_router_padding_", "moe_single_grouped_", "offload_", "qk_clip", "recompute_", "use_grouped_gemm_"),
)
# Megatron would import what these name, or read files.
_NAMES_CODE = ("spec", "yaml_cfg", "heterogeneous_layers_config_path")
# Read by build_model, or by Megatron only for some models.
_OTHER_ARGUMENTS = (
    *("vocab_size", "embedding_norm", "residual_multiplier", "rope_scaling_factor", "bias_swiglu_fusion"),
    *(name for name, _ in YARN_ARGUMENTS.values()),
)
_UNPLANNED_FLAGS = (
    *("--mock-data", "--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--moe-token-dispatcher-type", "alltoall"),
)


@contextlib.contextmanager
def single_rank(platform: str = "cpu") -> Iterator[None]:
    """A process group of this process alone, with megatron's parallel state and random states on it."""
    megatron_compat.install(platform)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        # A file in a private folder, not a TCP port: nothing can collide with another process of the machine.
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        backend = "gloo" if platform == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, rank=0, world_size=1, store=store)
        try:
            parallel_state.initialize_model_parallel()
            # DotProductAttention enters megatron's tracker of random states around its dropout, in evaluation too.
            model_parallel_cuda_manual_seed(1234)
            yield
        finally:
            # Both are global in the process: without this, a second call in the same process would fail.
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def read_model_arguments(saved: Any, *, platform: str = "cpu", **changes: Any) -> Namespace:
    """Megatron's namespace for the saved model, on one rank unless `changes`, which replace what was saved, say more.

    Which of the saved arguments belong to the model is asked of Megatron, and not of the tables that the conversion
    uses, so a gap in those is found by the comparison. Raises CheckpointError for what cannot be built here.
    """
    megatron_compat.install(platform)
    from megatron_hammer.config.arguments import parse_arguments

    precision = changes.pop("precision", "fp32")
    # A parsed command line: megatron also reads many arguments that are no property of the saved model.
    flags = [*_UNPLANNED_FLAGS, "--precision", precision]
    namespace = parse_arguments(flags, platform=platform, backend="torch").namespace
    names = _list_model_arguments(namespace)
    # What an older Megatron did not save yet comes from the table; what it saved has the last word.
    completed = vars(complete_arguments(saved))
    values = {name: value for name, value in completed.items() if name in names} | _translate_saved(saved, names)
    _require_buildable(values)
    for name, value in {**values, **changes}.items():
        setattr(namespace, name, value)
    # The flags above plan no run, so the length is not that of the checkpoint.
    namespace.seq_length = namespace.max_position_embeddings
    if not namespace.group_query_attention:
        namespace.num_query_groups = namespace.num_attention_heads
    return namespace


def _list_model_arguments(namespace: Namespace) -> set[str]:
    """What Megatron reads while it makes the configuration of a model, without what this process chooses."""
    from megatron.core.model_parallel_config import ModelParallelConfig

    layout = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    return {
        name
        for name in {*list_model_arguments(namespace), *_OTHER_ARGUMENTS} - layout - set(_CHOSEN_HERE.split())
        if not name.startswith(_CHOSEN_PREFIXES)
    }


def _translate_saved(saved: Any, names: set[str]) -> dict[str, Any]:
    """The saved arguments of these names; an older name is that of the flag, which Megatron's configuration knows."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    stored = vars(saved)
    values = {name: stored[name] for name in names if stored.get(name) is not None}
    for field in dataclasses.fields(TransformerConfig):
        for flag in field.metadata.get("argparse_meta", {}).get("arg_names", ()):
            older = flag.lstrip("-").replace("-", "_")
            if field.name in names and field.name not in values and stored.get(older) is not None:
                # A flag that switches off what is on by default has the opposite sense of its field.
                values[field.name] = not stored[older] if field.default is True else stored[older]
    return values


def _require_buildable(values: dict[str, Any]) -> None:
    for name in _NAMES_CODE:
        if values.get(name):
            raise CheckpointError(
                f"{name}: Megatron would build the model from other code or files, got {name}={values[name]!r}. "
                "Pass --verify tensors."
            )
    # The torch backend would leave these out without a word; preflight refuses them for a run.
    for name, quiet in NEEDS_TE.items():
        if name in values and values[name] not in (*quiet, None):
            raise CheckpointError(
                f"{name}: the torch backend, which checks the conversion, does not compute it, got "
                f"{name}={values[name]!r}. Pass --verify tensors."
            )


def build_model(namespace: Namespace) -> Any:
    """This rank's part of the model in evaluation mode; its weights have no values yet."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_hammer.config.megatron_checks import build_trial_config
    from megatron_hammer.model.provider import HammerModelBuilder, build_model_config

    _, megatron_config = build_trial_config(namespace)
    config = build_model_config(
        megatron_config,
        backend="torch",
        has_embedding_norm=namespace.embedding_norm,
        residual_multiplier=namespace.residual_multiplier,
        rope_scaling_factor=namespace.rope_scaling_factor,
    )
    # Every weight is overwritten by fill_weights, which refuses to leave one out.
    config.transformer.perform_initialization = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = HammerModelBuilder(config).build_model(groups).eval()
    # Position embeddings are made in fp32; in training megatron's Float16Module converts the whole model.
    return model.to(config.transformer.params_dtype)


def name_parameters(model: Any) -> dict[str, Tensor]:
    """The model's parameters, and its buffers that are stored, by the names that a checkpoint has for them."""
    # SequentialMLP names its experts local_experts; its sharded_state_dict stores them under experts.
    named = {
        name.replace(".experts.local_experts.", ".experts.experts."): value.data
        # The router's state_dict brings its bias, which is a buffer, back to fp32.
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
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
