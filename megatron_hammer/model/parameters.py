"""Exact parameter counts: of a model, of one rank of any layout, and of that rank's optimizer shard.

Counted from a table of the tensors that megatron-core builds, each with how it is cut; no formula for a whole model.
Source of the cuts: megatron.core SelfAttention, MLASelfAttention, MLP, MoELayer, TopKRouter, SharedExpertMLP,
MultiTokenPredictionLayer, LanguageModelEmbedding and GPTModel of 0.19.2, with TransformerEngine's layers; tests hold
the totals against transformers' models and published figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_hammer.model.layout import ParallelLayout, divisors, find_grid_problems, or_list, raise_problems
from megatron_hammer.model.pipeline_split import select_stage
from megatron_hammer.model.shape import ModelShape

# tensor: cut over tensor-parallel ranks. replicated: whole on each of them (norms, router, biases of row-parallel
# linears). expert_*: one such tensor for every expert, experts dealt out over expert-parallel ranks.
Cut = Literal["tensor", "replicated", "expert_tensor", "expert_replicated"]


class TensorSize(NamedTuple):
    """One parameter by mcore's name: its unsharded number of elements (of one expert, for expert_*) and its cut."""

    name: str
    numel: int
    cut: Cut


@dataclass(frozen=True, kw_only=True, slots=True)
class RankParameters:
    """Parameters of one rank. Dense and expert ones are reduced and sharded over different groups of ranks."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def padded_vocab_size(vocab_size: int, *, divisible_by: int = 128, tensor_model_parallel_size: int = 1) -> int:
    """Rows of embedding and head: the next multiple of divisible_by * tp (--make-vocab-size-divisible-by)."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def count_parameters(model: ModelShape, vocab_size: int | None = None) -> int:
    """All parameters of the unsharded model, with its layers for further tokens; tied embeddings count once.

    vocab_size: the tokenizer's by default. A published number of parameters often leaves the layers for further tokens
    out: DeepSeek-V3's 671B is replace(model, num_mtp_layers=0).
    """
    rows = model.vocab_size if vocab_size is None else vocab_size
    total = sum(tensor.numel for tensor in embedding_tensors(model, rows) + head_tensors(model, rows))
    for kind, num_layers in _list_all_kinds(model):
        total += num_layers * _count_layer(kind, kind.moe.num_experts if kind.moe else 0)
    return total


def count_active_parameters(model: ModelShape, vocab_size: int | None = None) -> int:
    """The parameters that one token is computed with: count_parameters with only the routed experts of a token."""
    idle = 0
    for kind, num_layers in _list_all_kinds(model):
        if kind.moe is not None:
            idle_experts = kind.moe.num_experts - kind.moe.router_topk
            idle += num_layers * (_count_layer(kind, idle_experts) - _count_layer(kind, 0))
    return count_parameters(model, vocab_size) - idle


def count_matmul_parameters(model: ModelShape, vocab_size: int | None = None) -> int:
    """The weights that a token is multiplied with, as Megatron-LM counts them for its throughput.

    Attention and MLP matrices and the head (which does its work whether or not it is tied, and once more for each
    further token that is predicted). Not the input embedding, which is a look-up, nor norms, biases, router and shared
    expert gate, which are left out there as well; but the norms of latent attention and of the layers for further
    tokens, which are not.
    """
    rows = model.vocab_size if vocab_size is None else vocab_size
    layers = 0
    for kind, num_layers in _list_all_kinds(model):
        topk = kind.moe.router_topk if kind.moe else 0
        layers += num_layers * sum(
            tensor.numel * (topk if tensor.cut.startswith("expert") else 1)
            for tensor in layer_tensors(kind)
            if _is_matrix(tensor)
        )
    layers += sum(tensor.numel for tensor in mtp_tensors(model))
    if (latent := model.latent_attention) is not None:
        layers += (model.num_layers + model.num_mtp_layers) * ((latent.q_lora_rank or 0) + latent.kv_lora_rank)
    return layers + (1 + model.num_mtp_layers) * model.hidden_size * rows


def count_rank_parameters(
    model: ModelShape, layout: ParallelLayout, pp_rank: int, *, vocab_divisible_by: int = 128
) -> RankParameters:
    """What one rank of a pipeline stage holds, exact; the same for each of its tensor, expert and data ranks.

    Vocabulary rows are padded (padded_vocab_size). Tied embeddings are held twice when pp > 1: the last stage keeps a
    copy of the first one's, and another one where it has layers for further tokens. Raises ConfigError, all problems at
    once, for a model that the layout cannot cut.
    """
    raise_problems(find_shard_problems(model, layout))
    is_last = pp_rank == layout.pipeline_model_parallel_size - 1
    layers = [layer for chunk in select_stage(model.num_layers, layout, pp_rank) for layer in chunk.list_layers()]
    kinds = model.split_kinds(layers) + (list_mtp_kinds(model) if is_last else [])
    return count_stage_parameters(
        model, layout, kinds, has_embedding=pp_rank == 0, has_head=is_last, vocab_divisible_by=vocab_divisible_by
    )


def count_stage_parameters(
    model: ModelShape,
    layout: ParallelLayout,
    kinds: Sequence[tuple[ModelShape, int]],
    *,
    has_embedding: bool,
    has_head: bool,
    vocab_divisible_by: int = 128,
) -> RankParameters:
    """What one rank of a stage with these layers holds, as count_rank_parameters; the layout is known to fit.

    kinds: as ModelShape.split_kinds has them, with the layers for further tokens where the stage has the head.
    """
    rows = padded_vocab_size(
        model.vocab_size,
        divisible_by=vocab_divisible_by,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
    )
    counts = [_count_rank_tensors(kind, layout, layer_tensors(kind), num) for kind, num in kinds]
    dense, expert = (sum(count[part] for count in counts) for part in (0, 1))
    ends = embedding_tensors(model, rows) if has_embedding else []
    if has_head:
        ends += head_tensors(model, rows, is_apart=not has_embedding)
    return RankParameters(dense=dense + _count_rank_tensors(model, layout, ends, 1)[0], expert=expert)


def count_optimizer_shard(
    model: ModelShape, layout: ParallelLayout, pp_rank: int, *, vocab_divisible_by: int = 128
) -> RankParameters:
    """Parameters whose fp32 copy and Adam moments one rank keeps: its own, or with the distributed optimizer its share.

    The share is the ceiling of rank parameters / ranks that hold the same ones (dp * cp for dense parameters, the
    expert data-parallel size for experts). Megatron's real share is a little larger: each parameter starts at a
    multiple of 64 elements and each bucket ends at one of lcm(ranks, 128) (lcm(ranks, 128, 65536) with
    --ddp-pad-buckets-for-high-nccl-busbw), megatron.core.optimizer.param_layout. Ranks at the end may hold only that.
    """
    local = count_rank_parameters(model, layout, pp_rank, vocab_divisible_by=vocab_divisible_by)
    if not layout.has_distributed_optimizer:
        return local
    return RankParameters(
        dense=-(-local.dense // layout.dense_shard_size),
        expert=-(-local.expert // layout.expert_data_parallel_size),
    )


def layer_tensors(model: ModelShape) -> list[TensorSize]:
    """The parameters of one transformer layer of a model whose layers are all alike: see ModelShape.split_kinds."""
    h = model.hidden_size
    tensors = [
        *_norm_tensors("input_layernorm", h, model.normalization),
        *(_attention_tensors(model) if model.latent_attention is None else _latent_attention_tensors(model)),
        *_norm_tensors("pre_mlp_layernorm", h, model.normalization),
    ]
    if model.has_attention_sinks:
        tensors.append(TensorSize("self_attention.core_attention.softmax_offset", model.num_attention_heads, "tensor"))
    if model.has_linear_bias:
        # A row-parallel linear adds its bias after the sum over ranks, so each rank keeps the whole of it.
        tensors.append(TensorSize("self_attention.linear_proj.bias", h, "replicated"))
    if model.moe is None:
        return tensors + _mlp_tensors("mlp", model, model.ffn_hidden_size, "tensor", "replicated")
    return tensors + _moe_tensors(model)


def list_mtp_kinds(model: ModelShape) -> list[tuple[ModelShape, int]]:
    """The transformer layers among those for further tokens, as split_kinds has them: each is like the last layer."""
    return [(model.select_kind(model.num_layers - 1), model.num_mtp_layers)] if model.num_mtp_layers else []


def mtp_tensors(model: ModelShape) -> list[TensorSize]:
    """What the layers for further tokens have beside a transformer layer each: two norms, a projection and a norm."""
    h = model.hidden_size
    one = [
        *_norm_tensors("mtp.enorm", h, model.normalization),
        *_norm_tensors("mtp.hnorm", h, model.normalization),
        TensorSize("mtp.eh_proj.weight", 2 * h * h, "tensor"),
        *_norm_tensors("mtp.final_layernorm", h, model.normalization),
    ]
    return one * model.num_mtp_layers


def embedding_tensors(model: ModelShape, vocab_rows: int) -> list[TensorSize]:
    """The parameters before the first layer; on the first pipeline stage."""
    h = model.hidden_size
    tensors = [TensorSize("embedding.word_embeddings.weight", vocab_rows * h, "tensor")]
    if model.position_embedding_type == "learned_absolute":
        tensors.append(
            TensorSize("embedding.position_embeddings.weight", model.max_position_embeddings * h, "replicated")
        )
    if model.has_embedding_norm:
        tensors += _norm_tensors("embedding.norm", h, "LayerNorm")
    return tensors


def head_tensors(model: ModelShape, vocab_rows: int, *, is_apart: bool = False) -> list[TensorSize]:
    """The parameters behind the last layer, on the last pipeline stage.

    is_apart: it is not the first stage too. Then a tied head is a copy of the embedding, and the layers for further
    tokens, which look up tokens as well, have a copy of their own.
    """
    tensors = _norm_tensors("decoder.final_layernorm", model.hidden_size, model.normalization) + mtp_tensors(model)
    if is_apart or not model.has_tied_embeddings:
        tensors.append(TensorSize("output_layer.weight", vocab_rows * model.hidden_size, "tensor"))
    if is_apart and model.num_mtp_layers:
        tensors += embedding_tensors(model, vocab_rows)
    return tensors


def find_shard_problems(model: ModelShape, layout: ParallelLayout) -> tuple[str, ...]:
    """Every reason why this model cannot be cut over this layout's tensor and expert ranks; empty if it can."""
    problems = list(find_grid_problems(layout))
    if problems:
        return tuple(problems)
    tp, groups = layout.tensor_model_parallel_size, model.num_query_groups
    cuts = {"num_attention_heads": model.num_attention_heads}
    if model.moe is None or model.moe.dense_layers:
        cuts["ffn_hidden_size"] = model.ffn_hidden_size
    if model.moe is not None and model.moe.shared_expert_intermediate_size:
        cuts["shared_expert_intermediate_size"] = model.moe.shared_expert_intermediate_size
    for name, size in cuts.items():
        if size % tp:
            problems.append(_divide_problem("tensor-model-parallel-size", "tp", tp, name, size))
    if groups % tp and tp % groups:  # mcore lets tp > groups share a key and value head between ranks
        problems.append(
            f"tensor-model-parallel-size: must divide num_query_groups or be a multiple of it, got tp={tp}, "
            f"num_query_groups={groups}. Use {or_list(divisors(groups))}."
        )
    has_own_width = model.kv_channels is not None or model.latent_attention is not None
    if not has_own_width and model.hidden_size % model.num_attention_heads:
        problems.append(
            f"num_attention_heads: must divide hidden_size, got num_attention_heads={model.num_attention_heads}, "
            f"hidden_size={model.hidden_size}. Change one of the two."
        )
    return tuple(problems + _find_expert_problems(model, layout))


def _find_expert_problems(model: ModelShape, layout: ParallelLayout) -> list[str]:
    ep, etp, tp = layout.expert_model_parallel_size, layout.expert_tp, layout.tensor_model_parallel_size
    if model.moe is None:
        if ep == 1:
            return []
        return [f"expert-model-parallel-size: needs a model with experts, got ep={ep}, model={model.name}. Pass 1."]
    problems = []
    if model.moe.num_experts % ep:
        problems.append(_divide_problem("expert-model-parallel-size", "ep", ep, "num_experts", model.moe.num_experts))
    if model.moe.ffn_hidden_size % etp:
        size = model.moe.ffn_hidden_size
        problems.append(_divide_problem("expert-tensor-parallel-size", "etp", etp, "moe_ffn_hidden_size", size))
    if model.has_linear_bias and etp > 1:
        problems.append(f"expert-tensor-parallel-size: must be 1 for experts with a bias, got etp={etp}. Pass 1.")
    if tp > 1 and not layout.has_sequence_parallel:
        problems.append(
            f"sequence-parallel: must be on for experts with tensor parallelism, got tp={tp}. Pass --sequence-parallel."
        )
    return problems


def _divide_problem(flag: str, short: str, size: int, name: str, number: int) -> str:
    fitting = [divisor for divisor in divisors(number) if divisor <= max(64, size)]
    return f"{flag}: must divide {name}, got {short}={size}, {name}={number}. Use {or_list(fitting)}."


def _norm_tensors(name: str, size: int, normalization: str) -> list[TensorSize]:
    tensors = [TensorSize(f"{name}.weight", size, "replicated")]
    if normalization == "LayerNorm":
        tensors.append(TensorSize(f"{name}.bias", size, "replicated"))
    return tensors


def _is_matrix(tensor: TensorSize) -> bool:
    return "linear_" in tensor.name and tensor.name.endswith(".weight")


def _attention_tensors(model: ModelShape) -> list[TensorSize]:
    h, head_dim = model.hidden_size, model.head_dim
    query, key_value = model.num_attention_heads * head_dim, model.num_query_groups * head_dim
    tensors = [
        TensorSize("self_attention.linear_qkv.weight", h * (query + 2 * key_value), "tensor"),
        TensorSize("self_attention.linear_proj.weight", query * h, "tensor"),
    ]
    if model.has_qk_norm:  # one norm for every head, so each tensor-parallel rank keeps the whole of it
        tensors += _norm_tensors("self_attention.q_layernorm", head_dim, model.normalization)
        tensors += _norm_tensors("self_attention.k_layernorm", head_dim, model.normalization)
    if model.has_linear_bias or model.has_qkv_bias:
        tensors.append(TensorSize("self_attention.linear_qkv.bias", query + 2 * key_value, "tensor"))
    return tensors


def _latent_attention_tensors(model: ModelShape) -> list[TensorSize]:
    """TransformerEngine's linears that compress are not cut; megatron.core's own, which only tests use, are."""
    latent, h, heads = model.latent_attention, model.hidden_size, model.num_attention_heads
    assert latent is not None
    kv_rank, q_rank = latent.kv_lora_rank, latent.q_lora_rank
    up_rows = heads * (latent.qk_head_dim + latent.v_head_dim)
    tensors = [
        TensorSize(
            "self_attention.linear_kv_down_proj.weight", h * (kv_rank + latent.qk_pos_emb_head_dim), "replicated"
        ),
        TensorSize("self_attention.linear_kv_up_proj.weight", kv_rank * up_rows, "tensor"),
        TensorSize("self_attention.linear_proj.weight", heads * latent.v_head_dim * h, "tensor"),
    ]
    query_rows = heads * latent.query_dim
    if q_rank is None:
        tensors.append(TensorSize("self_attention.linear_q_proj.weight", h * query_rows, "tensor"))
    else:
        tensors.append(TensorSize("self_attention.linear_q_down_proj.weight", h * q_rank, "replicated"))
        tensors.append(TensorSize("self_attention.linear_q_up_proj.weight", q_rank * query_rows, "tensor"))
    if model.has_qk_norm:
        tensors += _norm_tensors("self_attention.kv_layernorm", kv_rank, model.normalization)
        if q_rank is not None:
            tensors += _norm_tensors("self_attention.q_layernorm", q_rank, model.normalization)
    return tensors


def _mlp_tensors(name: str, model: ModelShape, ffn: int, column: Cut, whole: Cut) -> list[TensorSize]:
    h = model.hidden_size
    fc1_rows = 2 * ffn if model.is_gated else ffn  # gate and up in one matrix
    tensors = [
        TensorSize(f"{name}.linear_fc1.weight", h * fc1_rows, column),
        TensorSize(f"{name}.linear_fc2.weight", ffn * h, column),
    ]
    if model.has_linear_bias:
        tensors += [
            TensorSize(f"{name}.linear_fc1.bias", fc1_rows, column),
            TensorSize(f"{name}.linear_fc2.bias", h, whole),
        ]
    return tensors


def _moe_tensors(model: ModelShape) -> list[TensorSize]:
    moe, h = model.moe, model.hidden_size
    assert moe is not None
    tensors = [TensorSize("mlp.router.weight", moe.num_experts * h, "replicated")]
    if model.has_linear_bias:
        tensors.append(TensorSize("mlp.router.bias", moe.num_experts, "replicated"))
    if moe.shared_expert_intermediate_size:
        ffn = moe.shared_expert_intermediate_size
        tensors += _mlp_tensors("mlp.shared_experts", model, ffn, "tensor", "replicated")
        if moe.has_shared_expert_gate:
            tensors.append(TensorSize("mlp.shared_experts.gate_weight", h, "replicated"))
    return tensors + _mlp_tensors("mlp.experts", model, moe.ffn_hidden_size, "expert_tensor", "expert_replicated")


def _list_all_kinds(model: ModelShape) -> list[tuple[ModelShape, int]]:
    return model.split_kinds() + list_mtp_kinds(model)


def _count_layer(model: ModelShape, num_experts: int) -> int:
    return sum(
        tensor.numel * (num_experts if tensor.cut.startswith("expert") else 1) for tensor in layer_tensors(model)
    )


def _count_rank_tensors(
    model: ModelShape, layout: ParallelLayout, tensors: list[TensorSize], copies: int
) -> tuple[int, int]:
    """(dense, expert) elements of these tensors on one rank, `copies` times over."""
    num_local_experts = model.moe.num_experts // layout.expert_model_parallel_size if model.moe else 0
    dense = expert = 0
    for tensor in tensors:
        if tensor.cut == "tensor":
            dense += tensor.numel // layout.tensor_model_parallel_size
        elif tensor.cut == "replicated":
            dense += tensor.numel
        else:
            shards = layout.expert_tp if tensor.cut == "expert_tensor" else 1
            expert += num_local_experts * tensor.numel // shards
    return copies * dense, copies * expert
