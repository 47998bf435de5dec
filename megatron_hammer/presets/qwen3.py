"""Qwen3: dense models and a mixture of experts, with a norm on every head's query and key.

Sources: Qwen/Qwen3-* config.json. The counts of the dense models are those of keras-hub's qwen3 presets, that of the
mixture is general.parameter_count of its GGUF files. The technical report (arXiv 2505.09388, section 3.2) gives the
length and the tokens of the first stage, but neither learning rates nor batches.
"""

from typing import Any

from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.presets.preset import Preset, Recipe


def _qwen3(
    size: str, num_parameters: int, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, **shape: Any
) -> Preset:
    """What all share. tp, pp, ep, etp: of Megatron-Bridge's recipe of this size. shape: more fields of ModelShape."""
    return Preset(
        num_parameters=num_parameters,
        model=ModelShape(
            name=f"qwen3-{size}",
            source=f"Qwen/Qwen3-{size.upper()} config.json",
            has_qk_norm=True,
            vocab_size=151_936,
            max_position_embeddings=40_960,
            norm_epsilon=1e-6,
            rotary_base=1_000_000,
            **shape,
        ),
        recipe=Recipe(
            source="tokens and length: Qwen3, stage 1; lr, warm-up and layout: Megatron-Bridge's Qwen3 recipes; "
            "batch: ours, as Llama's",
            seq_length=4096,
            global_batch_size=1024,  # x 4096 = 4.2M tokens
            micro_batch_size=1,
            lr=3e-4,
            min_lr=3e-5,
            lr_warmup_steps=500,
            train_tokens=30_000_000_000_000,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            # It divides the activations that TP leaves whole, at the same communication volume (arXiv 2205.05198).
            has_sequence_parallel=tp > 1,
        ),
    )


QWEN3_PRESETS = (
    _qwen3(
        "0.6b",
        596_049_920,
        num_layers=28,
        hidden_size=1024,
        ffn_hidden_size=3072,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        has_tied_embeddings=True,
    ),
    _qwen3(
        "1.7b",
        1_720_574_976,
        num_layers=28,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=16,
        num_query_groups=8,
        has_tied_embeddings=True,
    ),
    _qwen3(
        "4b",
        4_022_468_096,
        num_layers=36,
        hidden_size=2560,
        ffn_hidden_size=9728,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        has_tied_embeddings=True,
        tp=2,
    ),
    _qwen3(
        "8b",
        8_190_735_360,
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12_288,
        num_attention_heads=32,
        num_query_groups=8,
        tp=4,
    ),
    _qwen3(
        "30b-a3b",
        30_532_122_624,
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,  # of no layer: every one is a mixture
        num_attention_heads=32,
        num_query_groups=4,
        kv_channels=128,
        moe=MoeShape(
            num_experts=128, router_topk=8, ffn_hidden_size=768, is_topk_renormalized=True, aux_loss_coeff=0.001
        ),
        tp=4,
        pp=2,
        ep=4,
        etp=1,
    ),
)
