"""Estimated bytes of one GPU of every pipeline stage: what is exact is counted, what is not is a named allowance.

Weights, gradients and optimizer follow from `parameters.py`. Activations follow Korthikanti et al. 2022 (arXiv
2205.05198, sections 4 and 5), term by term and adapted: SwiGLU, grouped queries, no s^2 term (flash attention keeps
q, k, v, its output and one number a row instead), dropout masks only where there is dropout.
tests/unit/model/test_memory.py holds it against that paper's figures and peaks that Megatron-LM's own tests recorded.
Left out: receive buffers between stages and the temporary gradients of one layer (fragmentation stands for them).
"""

from dataclasses import dataclass
from typing import Literal

from megatron_hammer.model.layout import Layout
from megatron_hammer.model.parameters import count_optimizer_shard, count_rank_parameters, padded_vocab_size
from megatron_hammer.model.pipeline_split import split_layers
from megatron_hammer.preset_types import ModelPreset

Precision = Literal["bf16", "fp32"]
Recompute = Literal["none", "selective", "full"]

# Allowances, not measurements of this machine: CUDA context and kernels (about 0.5 GiB on A100 and H100), NCCL
# communicators and cuBLAS / TransformerEngine workspaces (about 1 GiB with three or four groups).
CUDA_CONTEXT_BYTES = 3 * 2**29
# Share of the tensors that come and go which the caching allocator holds on top of them.
FRAGMENTATION_RATIO = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Estimated peak of one rank of a pipeline stage. `total_bytes` is the sum of the other byte fields."""

    pp_rank: int
    num_layers: int
    num_in_flight: int  # forward passes of a model chunk that wait for their backward pass at the peak
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    context_bytes: int  # allowance
    fragmentation_bytes: int  # allowance

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.context_bytes
            + self.fragmentation_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """What the size of an activation depends on besides model and layout."""

    num_tokens: int  # of one micro-batch on one context-parallel rank
    bytes_per_element: int
    has_dropout: bool


def estimate_memory(
    model: ModelPreset,
    layout: Layout,
    *,
    micro_batch_size: int,
    seq_length: int,
    num_microbatches: int,
    precision: Precision = "bf16",
    recompute: Recompute = "none",
    hidden_dropout: float = 0.0,
    vocab_divisible_by: int = 128,
    context_bytes: int = CUDA_CONTEXT_BYTES,
    fragmentation_ratio: float = FRAGMENTATION_RATIO,
) -> tuple[StageMemory, ...]:
    """The peak of each pipeline stage in one training step. On CPU pass context_bytes=0, fragmentation_ratio=0.

    num_microbatches: a step's, on one data-parallel rank. recompute: --recompute-granularity ("full" one layer at a
    time). Raises ConfigError for a layout that cannot hold the model.
    """
    batch = _Batch(
        num_tokens=micro_batch_size * seq_length // layout.context_parallel_size,
        bytes_per_element=2 if precision == "bf16" else 4,
        has_dropout=hidden_dropout > 0,
    )
    stages = []
    for pp_rank, chunks in enumerate(split_layers(model.num_layers, layout)):
        weights, gradients, optimizer = _estimate_state(model, layout, pp_rank, precision, vocab_divisible_by)
        num_in_flight = count_in_flight(layout, pp_rank, num_microbatches)
        # The chunks of a stage hold equally many layers unless the embedding or the loss takes a place; then the
        # larger chunk stands for all of them.
        layers_alive = num_in_flight * max(chunk.num_layers for chunk in chunks)
        activations = _estimate_activations(model, layout, batch, layers_alive, recompute)
        activations += _estimate_end_activations(model, layout, batch, pp_rank, num_in_flight)
        logits = _estimate_logits(model, layout, batch, pp_rank, vocab_divisible_by)
        stages.append(
            StageMemory(
                pp_rank=pp_rank,
                num_layers=sum(chunk.num_layers for chunk in chunks),
                num_in_flight=num_in_flight,
                weights_bytes=weights,
                gradients_bytes=gradients,
                optimizer_bytes=optimizer,
                activations_bytes=activations,
                logits_bytes=logits,
                context_bytes=context_bytes,
                fragmentation_bytes=round(fragmentation_ratio * (activations + logits)),
            )
        )
    return tuple(stages)


def count_in_flight(layout: Layout, pp_rank: int, num_microbatches: int) -> int:
    """Forward passes of a model chunk whose activations are alive at once on this stage: warm-up plus the current one.

    Source: megatron.core.pipeline_parallel.schedules (get_pp_rank_microbatches; microbatch_group_size_per_vp_stage is
    pp by default); Narayanan et al. 2021, arXiv 2104.04473, section 2.2. A chunk is a stage unless interleaved.
    """
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if pp == 1:
        return 1
    stages_behind = pp - pp_rank - 1
    num_warmup = stages_behind if vp == 1 else 2 * stages_behind + (vp - 1) * pp
    return min(num_warmup + 1, num_microbatches * vp)


def count_layer_activation_bytes(
    model: ModelPreset, layout: Layout, *, num_tokens: int, bytes_per_element: int = 2, has_dropout: bool = False
) -> int:
    """Activations that one layer keeps for its backward pass, without recomputation, on one rank.

    Without dropout, 16-bit, SwiGLU, per token: 8h of norms' inputs and outputs, (4q + 4kv) / tp of attention, with q
    and kv the widths of the queries and of the keys, and 6 ffn / tp of the MLP. For GPT with dropout it is the paper's
    34h (its equation 6), 10h + 24h / tp without sequence parallelism, and 4 bytes a head and token more.
    """
    h, element = model.hidden_size, bytes_per_element
    tp = layout.tensor_model_parallel_size
    tokens_along_sequence = num_tokens // tp if layout.has_sequence_parallel else num_tokens
    # Input and output of both norms; the outputs are what the two column-parallel linears save. A mask is one byte.
    along_sequence = 4 * element * h + (2 * h if has_dropout else 0)
    queries = model.num_attention_heads * model.head_dim // tp
    key_values = max(1, model.num_query_groups // tp) * model.head_dim
    # q, k, v and the output (which the row-parallel linear saves as its input), and flash attention's log-sum-exp.
    attention = element * (2 * queries + 2 * key_values) + 4 * model.num_attention_heads // tp
    if model.has_qk_norm:  # q and k before their norms too
        attention += element * (queries + key_values)
    mlp = _count_mlp_activation_bytes(model, layout, num_tokens, tokens_along_sequence, element)
    return tokens_along_sequence * along_sequence + num_tokens * attention + mlp


def _count_mlp_activation_bytes(
    model: ModelPreset, layout: Layout, num_tokens: int, tokens_along_sequence: int, element: int
) -> int:
    tp = layout.tensor_model_parallel_size
    # Saved: the activation's input (gate and up for SwiGLU) and its output, which linear_fc2 takes.
    widths = 3 if model.activation == "swiglu" else 2
    if model.moe is None:
        return num_tokens * element * widths * model.ffn_hidden_size // tp
    moe = model.moe
    shared = num_tokens * element * widths * moe.shared_expert_intermediate_size // tp
    router = tokens_along_sequence * 4 * moe.num_experts  # fp32 scores
    # Balanced load: a rank works on as many copies of tokens as it sends out, times the ranks that share an expert.
    # Each copy is kept permuted on the way in and on the way out.
    copies = num_tokens * moe.router_topk * layout.expert_tp // tp
    routed = copies * element * (2 * model.hidden_size + widths * moe.ffn_hidden_size // layout.expert_tp)
    return shared + router + routed


def _estimate_state(
    model: ModelPreset, layout: Layout, pp_rank: int, precision: Precision, vocab_divisible_by: int
) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) bytes: 6 + 12/d a parameter in bf16, 8 + 8/d in fp32.

    bf16: 2 of weight, 4 of main_grad (reduced in fp32, Megatron's default for bf16), and 12 of the optimizer: the fp32
    master and Adam's two moments (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1; Megatron-LM
    theoretical_memory_usage.py). fp32 needs no master. d: the ranks of the distributed optimizer, else 1.
    """
    local = count_rank_parameters(model, layout, pp_rank, vocab_divisible_by=vocab_divisible_by).total
    shard = count_optimizer_shard(model, layout, pp_rank, vocab_divisible_by=vocab_divisible_by).total
    return (2 if precision == "bf16" else 4) * local, 4 * local, (12 if precision == "bf16" else 8) * shard


def _estimate_activations(
    model: ModelPreset, layout: Layout, batch: _Batch, layers_alive: int, recompute: Recompute
) -> int:
    """Activations of the transformer layers. "selective" (core attention) is "none" but for what flash never keeps."""
    layer = count_layer_activation_bytes(
        model,
        layout,
        num_tokens=batch.num_tokens,
        bytes_per_element=batch.bytes_per_element,
        has_dropout=batch.has_dropout,
    )
    if recompute == "none" or layers_alive == 0:
        return layers_alive * layer
    if recompute == "selective":  # the log-sum-exp goes, q, k, v and the output stay
        return layers_alive * (layer - _count_row_statistics_bytes(model, layout, batch))
    # Full: each layer keeps its input (section 5, 2sbh), and the one being recomputed is whole for a moment.
    return layers_alive * _count_hidden_bytes(model, layout, batch) + layer


def _estimate_end_activations(
    model: ModelPreset, layout: Layout, batch: _Batch, pp_rank: int, num_in_flight: int
) -> int:
    """Activations of the embedding (first stage, every micro-batch in flight) and of the final norm and head (last)."""
    hidden = _count_hidden_bytes(model, layout, batch)
    end = 0
    if pp_rank == 0:
        first_chunks = -(-num_in_flight // layout.virtual_pipeline_model_parallel_size)
        dropout_mask = hidden // batch.bytes_per_element if batch.has_dropout else 0
        norm_input = hidden if model.has_embedding_norm else 0
        token_ids = 8 * batch.num_tokens  # int64
        end += first_chunks * (dropout_mask + norm_input + token_ids)
    if pp_rank == layout.pipeline_model_parallel_size - 1:
        end += 2 * hidden  # input of the final norm and of the head
    return end


def _estimate_logits(model: ModelPreset, layout: Layout, batch: _Batch, pp_rank: int, vocab_divisible_by: int) -> int:
    """Logits of the last stage: one micro-batch, its rows cut over the context and its columns over the tensor ranks.

    megatron.core.tensor_parallel.cross_entropy casts the 16-bit logits to fp32 and works in place from then on (max,
    exp, softmax, gradient); forward the 16-bit logits and backward their 16-bit gradient live beside that copy:
    6 bytes a logit. In fp32 the cast is no copy: 4 bytes.
    """
    if pp_rank != layout.pipeline_model_parallel_size - 1:
        return 0
    tp = layout.tensor_model_parallel_size
    columns = padded_vocab_size(model.vocab_size, divisible_by=vocab_divisible_by, tensor_model_parallel_size=tp) // tp
    return batch.num_tokens * columns * (6 if batch.bytes_per_element == 2 else 4)


def _count_hidden_bytes(model: ModelPreset, layout: Layout, batch: _Batch) -> int:
    """One hidden state of a micro-batch: cut along the sequence only with sequence parallelism."""
    tokens = batch.num_tokens
    if layout.has_sequence_parallel:
        tokens //= layout.tensor_model_parallel_size
    return tokens * batch.bytes_per_element * model.hidden_size


def _count_row_statistics_bytes(model: ModelPreset, layout: Layout, batch: _Batch) -> int:
    return batch.num_tokens * (4 * model.num_attention_heads // layout.tensor_model_parallel_size)
