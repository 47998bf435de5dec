"""The parameters of one rank, counted, against the same rank of a model that megatron-core builds for it.

Megatron's fake process group: a single process plays any rank of any world, no other process exists.
"""

import dataclasses
import functools

import pytest
import torch

from megatron_hammer.model.accounting import ParallelLayout, count_rank_parameters, padded_vocab_size, split_layers
from megatron_hammer.model.shape import LatentAttention, ModelShape, MoeShape

# Larger than toy_model.LLAMA: 8 tensor-parallel ranks divide its heads and 6 chunks its layers. No two dimensions are
# alike.
LLAMA = ModelShape(
    name="toy-llama",
    source="",
    num_layers=12,
    hidden_size=96,
    ffn_hidden_size=136,
    num_attention_heads=16,
    num_query_groups=4,
    vocab_size=501,
    max_position_embeddings=40,
)
TOYS = {
    "llama": LLAMA,
    "qkv bias": dataclasses.replace(LLAMA, has_qkv_bias=True, num_query_groups=16),
    "qk norm and wide heads": dataclasses.replace(LLAMA, has_qk_norm=True, kv_channels=10),
    "tied": dataclasses.replace(LLAMA, has_tied_embeddings=True),
    "gpt": dataclasses.replace(
        LLAMA,
        num_query_groups=16,
        normalization="LayerNorm",
        activation="gelu_tanh",
        position_embedding_type="learned_absolute",
        has_linear_bias=True,
        has_tied_embeddings=True,
    ),
    "moe": dataclasses.replace(LLAMA, moe=MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=56)),
    "moe shared": dataclasses.replace(
        LLAMA,
        moe=MoeShape(
            num_experts=8,
            router_topk=2,
            ffn_hidden_size=56,
            shared_expert_intermediate_size=104,
            has_shared_expert_gate=True,
        ),
    ),
    "moe after dense layers": dataclasses.replace(
        LLAMA, moe=MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=56, dense_layers=(0, 1, 2, 8))
    ),
}
LATENT = LatentAttention(q_lora_rank=20, kv_lora_rank=28, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=14)
TOYS |= {
    "latent": dataclasses.replace(LLAMA, num_query_groups=16, latent_attention=LATENT, has_qk_norm=True),
    "latent queries whole": dataclasses.replace(
        LLAMA, num_query_groups=16, latent_attention=dataclasses.replace(LATENT, q_lora_rank=None)
    ),
    "sinks and biases": dataclasses.replace(LLAMA, has_attention_sinks=True, has_linear_bias=True, has_qkv_bias=True),
    "further tokens": dataclasses.replace(LLAMA, num_mtp_layers=2),
    "moe further token": dataclasses.replace(
        LLAMA,
        num_mtp_layers=1,
        moe=MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=56, dense_layers=(0, 1)),
    ),
}
DENSE_LAYOUTS = {
    "one": ParallelLayout(),
    "tp2": ParallelLayout(tensor_model_parallel_size=2),
    "tp8 above the groups": ParallelLayout(tensor_model_parallel_size=8),
    "pp3": ParallelLayout(pipeline_model_parallel_size=3),
    "tp2 pp2 vp3": ParallelLayout(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3
    ),
    "uneven": ParallelLayout(pipeline_model_parallel_size=3, num_layers_first_stage=2, num_layers_last_stage=3),
}
MOE_LAYOUTS = {
    "one": ParallelLayout(),
    "ep4": ParallelLayout(data_parallel_size=4, expert_model_parallel_size=4),
    "tp2 ep2 pp2": ParallelLayout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        data_parallel_size=2,
        expert_model_parallel_size=2,
        has_sequence_parallel=True,
    ),
    "tp2 etp1 ep4": ParallelLayout(
        tensor_model_parallel_size=2,
        data_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        has_sequence_parallel=True,
    ),
}
CASES = [
    (model, layout)
    for model in ("llama", "qkv bias", "qk norm and wide heads", "tied", "gpt")
    for layout in DENSE_LAYOUTS
]
CASES += [
    (model, layout)
    for model in ("latent", "latent queries whole", "sinks and biases", "further tokens")
    for layout in ("one", "tp2", "uneven")
]
MOE_CASES = [(model, layout) for model in ("moe", "moe shared", "moe after dense layers") for layout in MOE_LAYOUTS]
MOE_CASES += [("moe further token", layout) for layout in ("one", "tp2 ep2 pp2")]


@pytest.fixture
def play_rank(monkeypatch):
    """play_rank(layout, rank): Megatron's parallel state as that rank would see it."""
    # The one CUDA call while a model is built: the last stage fetches its copy of a tied embedding to the GPU.
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_args, **_kwargs: tensor)
    # Where the scores of attention sinks are made.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def play(layout: ParallelLayout, rank: int) -> None:
        torch.distributed.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
        vp = layout.virtual_pipeline_model_parallel_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )

    yield play
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build_config(model: ModelShape, layout: ParallelLayout):
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    vp, moe = layout.virtual_pipeline_model_parallel_size, model.moe
    activation = torch.nn.functional.silu if model.activation == "swiglu" else torch.nn.functional.gelu
    experts = {}
    if moe is not None:
        experts = {
            "num_moe_experts": moe.num_experts,
            "moe_router_topk": moe.router_topk,
            "moe_ffn_hidden_size": moe.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": moe.shared_expert_intermediate_size or None,
            "moe_shared_expert_gate": moe.has_shared_expert_gate,
            "moe_layer_freq": [int(model.is_mixture(layer)) for layer in range(model.num_layers)],
            "moe_token_dispatcher_type": "allgather",
        }
    build: type[TransformerConfig] = TransformerConfig
    attention = {"num_query_groups": model.num_query_groups, "kv_channels": model.head_dim}
    if model.latent_attention is not None:
        build, attention = MLATransformerConfig, dataclasses.asdict(model.latent_attention)
        attention |= {"multi_latent_attention": True, "rope_type": "rope"}
    return build(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        **attention,
        softmax_type="learnable" if model.has_attention_sinks else "vanilla",
        mtp_num_layers=model.num_mtp_layers or None,
        qk_layernorm=model.has_qk_norm,
        normalization=model.normalization,
        activation_func=activation,
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.has_linear_bias,
        add_qkv_bias=model.has_qkv_bias,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        num_layers_in_first_pipeline_stage=layout.num_layers_first_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_last_stage,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        **experts,
    )


def count_built(model: ModelShape, layout: ParallelLayout, pp_rank: int) -> tuple[int, int]:
    """(dense, expert) elements of the chunks that megatron-core builds for the rank being played."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.identity_op import IdentityOp

    config = build_config(model, layout)
    vp = layout.virtual_pipeline_model_parallel_size
    build = functools.partial(
        GPTModel,
        config=config,
        vocab_size=padded_vocab_size(
            model.vocab_size, divisible_by=8, tensor_model_parallel_size=layout.tensor_model_parallel_size
        ),
        max_sequence_length=model.max_position_embeddings,
        share_embeddings_and_output_weights=model.has_tied_embeddings,
        position_embedding_type=model.position_embedding_type,
    )
    dense = expert = 0
    for vp_stage in range(vp):
        is_first = pp_rank == 0 and vp_stage == 0
        is_last = pp_rank == layout.pipeline_model_parallel_size - 1 and vp_stage == vp - 1
        stage = vp_stage if vp > 1 else None
        spec = get_gpt_decoder_block_spec(config, False, normalization=model.normalization, vp_stage=stage)
        if model.latent_attention is not None:
            # megatron.core's own attention takes no other width of values. It has no parameters.
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = IdentityOp
        mtp = get_gpt_mtp_block_spec(config, spec, False, vp_stage=stage) if is_last else None
        chunk = build(
            transformer_layer_spec=spec, mtp_block_spec=mtp, pre_process=is_first, post_process=is_last, vp_stage=stage
        )
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                expert += parameter.numel()
            else:
                dense += parameter.numel()
    return dense, expert


def count_cut_compressions(model: ModelShape, layout: ParallelLayout, pp_rank: int) -> int:
    """Elements that megatron.core's own linears, built here, cut off this rank and TransformerEngine's do not."""
    latent, tp = model.latent_attention, layout.tensor_model_parallel_size
    if latent is None:
        return 0
    rows = (latent.q_lora_rank or 0) + latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    num_layers = sum(chunk.num_layers for chunk in split_layers(model.num_layers, layout)[pp_rank])
    return num_layers * model.hidden_size * rows * (tp - 1) // tp


@pytest.mark.parametrize("model_name, layout_name", CASES + MOE_CASES)
def test_every_stage_holds_what_is_counted(model_name, layout_name, play_rank):
    from megatron.core import parallel_state

    model = TOYS[model_name]
    layout = (MOE_LAYOUTS if model.moe else DENSE_LAYOUTS)[layout_name]
    pp = layout.pipeline_model_parallel_size
    for pp_rank in range(pp):
        rank = pp_rank * (layout.world_size // pp) + layout.world_size // pp - 1  # the stage's last rank
        play_rank(layout, rank)
        assert parallel_state.get_pipeline_model_parallel_rank() == layout.coordinates(rank).pp_rank == pp_rank
        counted = count_rank_parameters(model, layout, pp_rank, vocab_divisible_by=8)
        cut = count_cut_compressions(model, layout, pp_rank)
        assert (counted.dense - cut, counted.expert) == count_built(model, layout, pp_rank)
        if pp_rank < pp - 1:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def test_twin_a_forgotten_replica_is_noticed(play_rank):
    """The comparison must fail when norms are cut over tensor ranks, which they are not."""
    layout = DENSE_LAYOUTS["tp2"]
    play_rank(layout, 1)
    counted = count_rank_parameters(LLAMA, layout, 0, vocab_divisible_by=8).dense
    norms = (2 * LLAMA.num_layers + 1) * LLAMA.hidden_size
    assert counted - norms // 2 != count_built(LLAMA, layout, 0)[0]
