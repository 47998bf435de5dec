"""What activation offload moves to the host: the inputs of the modules of --offload-modules, of one layer.

Layers as wholes (--cpu-offloading-num-layers) are subtracted in `estimate.py`, the optimizer in `state.py`.
Source: OffloadModule and fine_grained_activation_offloading of megatron.core.transformer.transformer_config.
"""

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.activations import count_copies
from megatron_hammer.model.memory.options import Batch, MemoryOptions, OffloadModule
from megatron_hammer.model.memory.widths import Widths, cut_widths
from megatron_hammer.model.shape import ModelShape


def count_offloaded(model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions) -> int:
    """Bytes of one layer and micro-batch that wait on the host for the backward pass.

    Nothing is counted that recomputation does not keep anyway.
    """
    if not options.offload_modules or options.recompute == "full":
        return 0
    inputs = _list_inputs(model, layout, options, cut_widths(model, layout, batch))
    return round(options.offload_ratio * sum(inputs.get(module, 0.0) for module in options.offload_modules))


def _list_inputs(
    model: ModelShape, layout: ParallelLayout, options: MemoryOptions, widths: Widths
) -> dict[OffloadModule, float]:
    """Bytes of the tensors that the backward pass of a module needs as its input."""
    element, linear, h = options.element_bytes, options.linear_input_bytes, model.hidden_size
    norm_input = float(widths.sequence_tokens * element * h)
    inputs: dict[OffloadModule, float] = {
        "attn_norm": norm_input,
        "mlp_norm": norm_input,
        "qkv_linear": 0.0 if options.is_recomputed("layernorm") else widths.sequence_tokens * linear * h,
        "core_attn": widths.tokens * element * float(widths.queries + widths.key_values + widths.values),
        "attn_proj": widths.tokens * linear * float(widths.outputs),
    }
    if model.moe is None or options.is_recomputed("moe"):
        return inputs
    copies = count_copies(model, layout, options, widths)
    ffn = model.moe.ffn_hidden_size / layout.expert_tp
    fc1_input, act_input = copies * linear * h, copies * element * ffn * (2 if model.is_gated else 1)
    act_output = 0.0 if options.is_recomputed("moe_act") else copies * linear * ffn
    experts: dict[OffloadModule, float] = {
        "expert_fc1": fc1_input,
        "moe_act": act_input,
        "fused_group_mlp": fc1_input + act_input + act_output,
    }
    return inputs | experts
