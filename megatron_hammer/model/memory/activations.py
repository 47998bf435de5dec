"""What one transformer layer keeps for its backward pass, module by module, and what that pass needs in addition.

After Korthikanti et al. 2022 (arXiv 2205.05198, sections 4 and 5), adapted to what megatron-core and TransformerEngine
keep today: SwiGLU, grouped queries, flash attention (q, k, v, the output and one number per row instead of the s^2
terms), quantized inputs of linears, and each module of --recompute-modules.
"""

from typing import NamedTuple

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.latents import count_latents, count_quantized_inputs
from megatron_hammer.model.memory.options import Batch, MemoryOptions
from megatron_hammer.model.memory.widths import Widths, cut_widths
from megatron_hammer.model.shape import ModelShape


class LayerActivations(NamedTuple):
    """Bytes of one layer and micro-batch on one rank.

    kept: on the GPU from the forward to the backward pass. remade: what recomputation makes again, or what comes back
    from the host, while the layer's own backward pass runs. transient: gradients and gathered tensors that exist beside
    these at the worst moment of it. offloaded: what waits on the host.
    """

    kept: int
    remade: int
    transient: int
    offloaded: int = 0


def estimate_layer_activations(
    model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions
) -> LayerActivations:
    """What one layer keeps under its recompute mode, what is made again of it, and what its backward pass adds.

    Without dropout and recomputation, 16-bit, SwiGLU, per token it keeps 8h of norms' inputs and outputs,
    (4q + 4kv) / tp of attention, with q and kv the widths of the queries and of the keys, and 6 ffn / tp of the MLP.
    For GPT with dropout it is the paper's 34h (its equation 6), 10h + 24h / tp without sequence parallelism, and 4
    bytes more per head and token.
    """
    widths = cut_widths(model, layout, batch)
    attention, dropped = _count_attention(model, layout, batch, options, widths)
    mlp, mlp_dropped = _count_mlp(model, layout, options, widths)
    whole = round(attention + mlp)
    kept = round(whole - dropped - mlp_dropped)
    if options.recompute == "full":  # its input
        kept = count_hidden_bytes(model, layout, batch, options)
    elif options.is_recomputed("every_other_matmul"):
        kept = _count_every_other_matmul(model, layout, options, widths)
    return LayerActivations(kept, whole - kept, _count_transient(model, layout, batch, options, widths))


def count_hidden_bytes(model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions) -> int:
    """One hidden state of a micro-batch: cut along the sequence only with sequence parallelism."""
    tokens = batch.count_tokens(layout.context_parallel_size)
    if layout.has_sequence_parallel:
        tokens //= layout.tensor_model_parallel_size
    return tokens * options.element_bytes * model.hidden_size


def count_gathered_bytes(model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions) -> int:
    """One hidden state of all tokens: what sequence parallelism gathers for a column-parallel linear, else 0."""
    if not layout.has_sequence_parallel or layout.tensor_model_parallel_size == 1:
        return 0
    return batch.count_tokens(layout.context_parallel_size) * options.element_bytes * model.hidden_size


def _count_attention(
    model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions, widths: Widths
) -> tuple[float, float]:
    """(kept without recomputation, of that given up by --recompute-modules) of norm, linears and core attention."""
    element, linear, h = options.element_bytes, options.linear_input_bytes, model.hidden_size
    norm_output = widths.sequence_tokens * linear * h  # which linear_qkv saves as its input
    kept: float = widths.sequence_tokens * element * h
    if options.has_hidden_dropout:
        kept += widths.sequence_tokens * h  # a mask is one byte
    if model.latent_attention is None:
        projected, dropped = _count_projected(model, options, widths), 0.0
    else:
        norm_output *= count_quantized_inputs(options, 2)
        projected, dropped = count_latents(model, options, widths)
    kept += norm_output + projected + widths.tokens * linear * widths.outputs  # the input of linear_proj
    core = _count_core_attention(batch, layout, options, widths)
    dropped += core if options.is_recomputed("core_attn") else 0
    if options.is_recomputed("layernorm"):
        dropped += norm_output
    return kept + core, dropped


def _count_projected(model: ModelShape, options: MemoryOptions, widths: Widths) -> float:
    """Queries, keys and values, and what is kept of them in addition."""
    element = options.element_bytes
    kept = widths.tokens * element * (widths.queries + widths.key_values + widths.values)
    if options.has_expanded_heads and widths.queries > widths.key_values:
        # The copies take the place of key and value, which nothing else needs.
        kept += widths.tokens * element * 2 * (widths.queries - widths.key_values)
    # q and k before their norms too; the average layer, as in _count_whole_qkv, where only some have them.
    normed = 1.0 if model.has_qk_norm else model.rope_share * model.has_qk_l2_norm
    total = kept + normed * widths.tokens * element * (widths.queries + widths.key_values)
    if not options.has_separate_values:
        total += widths.tokens * element * _count_whole_qkv(model, widths)
    return total


def _count_whole_qkv(model: ModelShape, widths: Widths) -> float:
    """Elements per token kept beside q, k and v where v, as a view, keeps the whole output of linear_qkv.

    Rotary embeddings make new queries and keys of it. Norms have theirs already, and keep the keys of that output;
    several groups of several queries are copied where they are made one dimension.
    """
    # The average layer: how many of a stage's layers have no rope is not looked at.
    turned = 0.0 if model.has_qk_norm else model.rope_share
    num_groups = widths.key_values // model.head_dim
    copied = widths.queries if 1 < num_groups < widths.heads else 0
    return turned * (widths.queries + widths.key_values) + (1 - turned) * copied


def _count_core_attention(batch: Batch, layout: ParallelLayout, options: MemoryOptions, widths: Widths) -> float:
    """What core attention keeps besides q, k, v and the tensor that linear_proj takes."""
    element = options.element_bytes
    if options.has_flash_attention:
        row_statistics = 4.0 * widths.heads * widths.tokens  # log-sum-exp, fp32
        # The output is linear_proj's input as well, unless that is quantized or exchanged between context ranks.
        has_own_output = options.linear_input_bytes < element or (
            options.is_context_parallel_all_to_all and layout.context_parallel_size > 1
        )
        return row_statistics + has_own_output * widths.tokens * element * widths.outputs
    pairs = widths.heads * widths.tokens * batch.seq_length
    # Probabilities; with dropout its mask and what it lets through: 5 a s^2 b (the paper's section 4.1).
    scores = pairs * (element + (1 + element if options.has_attention_dropout else 0))
    repeated_keys = widths.tokens * element * 2 * max(0, widths.queries - widths.key_values)
    return scores + repeated_keys


def _count_mlp(
    model: ModelShape, layout: ParallelLayout, options: MemoryOptions, widths: Widths
) -> tuple[float, float]:
    """(kept without recomputation, of that given up by --recompute-modules) of the norm and the MLP or the experts."""
    element, linear, h = options.element_bytes, options.linear_input_bytes, model.hidden_size
    norm_output = widths.sequence_tokens * linear * h
    kept: float = widths.sequence_tokens * element * h
    if options.has_hidden_dropout:
        kept += widths.sequence_tokens * h
    if model.moe is None:
        inner = norm_output + widths.tokens * _count_mlp_width(model, options, model.ffn_hidden_size) / _tp(layout)
        if options.is_recomputed("mlp"):
            return kept + inner, inner if options.has_fused_norms else inner - norm_output
        return kept + inner, norm_output if options.is_recomputed("layernorm") else 0
    # A norm in front of a mixture stands alone: the router takes its 16-bit output, and a shared expert quantizes it.
    norm_output = widths.sequence_tokens * options.element_bytes * h
    routed, activation_outputs = _count_experts(model, layout, options, widths)
    shared_size = model.moe.shared_expert_intermediate_size
    if shared_size and linear < element:
        norm_output += widths.sequence_tokens * linear * h
    shared = widths.tokens * _count_mlp_width(model, options, shared_size) / _tp(layout)
    inner = norm_output + routed + shared
    if options.is_recomputed("moe"):  # the norm lies outside
        return kept + inner, routed + shared
    dropped = activation_outputs if options.is_recomputed("moe_act") else 0
    dropped += shared if options.is_recomputed("shared_experts") else 0
    dropped += norm_output if options.is_recomputed("layernorm") else 0
    return kept + inner, dropped


def _count_mlp_width(model: ModelShape, options: MemoryOptions, ffn_hidden_size: int) -> float:
    """Bytes per token of the activation's input (gate and up for SwiGLU) and of its output, which linear_fc2 takes."""
    inputs = 1
    if model.is_gated:
        inputs = 2 if options.has_fused_activation else 3 + options.has_linear_offset
    return ffn_hidden_size * (inputs * options.element_bytes + options.linear_input_bytes)


def _count_experts(
    model: ModelShape, layout: ParallelLayout, options: MemoryOptions, widths: Widths
) -> tuple[float, float]:
    """(all, of that the activations' outputs) of router, permuted tokens and routed experts.

    A copy is kept where the experts take it in; permuting keeps indices only, and probabilities are multiplied into the
    activation, which for SwiGLU is one fused kernel and else keeps its plain output too.
    """
    moe, element, linear = model.moe, options.element_bytes, options.linear_input_bytes
    assert moe is not None
    copies = count_copies(model, layout, options, widths)
    ffn = moe.ffn_hidden_size / layout.expert_tp
    router = widths.sequence_tokens * 4 * moe.num_experts  # fp32 scores
    activation_outputs = copies * linear * ffn
    routed = copies * (linear * model.hidden_size + 2 * element * ffn) + activation_outputs
    return router + routed, activation_outputs


def count_copies(model: ModelShape, layout: ParallelLayout, options: MemoryOptions, widths: Widths) -> float:
    """Copies of tokens that the routed experts of a rank work on: as many as it sends out, where the load is balanced,
    times the ranks that share an expert.
    """
    assert model.moe is not None
    tokens = widths.tokens * options.expert_imbalance_ratio
    return tokens * model.moe.router_topk * layout.expert_tp / _tp(layout)


def _count_every_other_matmul(model: ModelShape, layout: ParallelLayout, options: MemoryOptions, widths: Widths) -> int:
    """Input of the layer, attention's output, and of q, k, v, out, gate, up and down the first, third, ... product.

    Source: pytorch/torchtitan distributed/activation_checkpoint.py, selective_ac_option "op".
    """
    along_sequence = 2 * model.hidden_size * widths.sequence_tokens
    cut = 2 * widths.queries + widths.key_values + model.ffn_hidden_size / _tp(layout)
    return round(options.element_bytes * (along_sequence + cut * widths.tokens))


def _count_transient(
    model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions, widths: Widths
) -> int:
    """Beside what is kept, when the backward pass of a layer needs most: behind the activation of its MLP.

    There the gradient of the activation's output takes the place of linear_fc2's input, and the gradient of its input
    is new; beside them the gradient of the residual and, with sequence parallelism, two gathered hidden states.
    Without fused weight gradients the largest of them is a tensor of its own.
    """
    element = options.element_bytes
    inputs = 2 if model.is_gated else 1
    if model.moe is None:
        total = widths.tokens * element * inputs * model.ffn_hidden_size / _tp(layout)
    else:
        # Either that gradient, or those of the dispatched copies of tokens: as the experts took them in, and on their
        # way back. The latter are larger where experts are narrower than the model.
        width = max(inputs * model.moe.ffn_hidden_size / layout.expert_tp, 2 * model.hidden_size)
        total = element * count_copies(model, layout, options, widths) * width
    total += count_hidden_bytes(model, layout, batch, options)
    total += 2 * count_gathered_bytes(model, layout, batch, options)
    if not options.has_fused_weight_gradients:
        total += element * inputs * model.hidden_size * model.ffn_hidden_size / _tp(layout)
    return round(total)


def _tp(layout: ParallelLayout) -> int:
    return layout.tensor_model_parallel_size
