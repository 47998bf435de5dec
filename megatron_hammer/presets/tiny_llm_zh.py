"""The tiny-llm-zh family, 16M to 1.5B and a mixture of experts.

Source: wdndev/tiny-llm-zh, README.md 3.3, script/ptm_demo.sh, script/sft_demo.sh and train/configuration_tinyllm.py.
"""

from typing import Any

from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.presets.preset import Preset, Recipe, SftRecipe

_SFT = SftRecipe(
    # 32 conversations x 8 GPUs; --adam_beta1 is given twice, as below.
    source="tiny-llm-zh script/sft_demo.sh",
    global_batch_size=256,
    lr=3e-4,
    min_lr=0.0,
    lr_decay_style="cosine",
    lr_warmup_fraction=0.05,
    num_epochs=5,
    weight_decay=0.01,
)


def _tiny_llm_zh(
    size: str,
    num_parameters: int,
    *,
    num_attention_heads: int,
    seq_length: int,
    source: str = "tiny-llm-zh README.md 3.3",
    **shape: Any,
) -> Preset:
    """One row of the family's table: multi-head attention, qkv bias, ChatGLM3's vocabulary, untied."""
    tokens_per_step = 256 * seq_length
    return Preset(
        num_parameters=num_parameters,
        model=ModelShape(
            name=f"tiny-llm-zh-{size}",
            source=source,
            num_attention_heads=num_attention_heads,
            num_query_groups=num_attention_heads,
            vocab_size=64_798,
            max_position_embeddings=seq_length,
            norm_epsilon=1e-6,
            has_qkv_bias=True,
            **shape,
        ),
        recipe=Recipe(
            # 32 sequences x 8 GPUs. The script gives --adam_beta1 twice; the second is taken as the beta2 it must
            # have meant. It trains in fp16; here bf16.
            source="tiny-llm-zh script/ptm_demo.sh; 42B tokens of public text, once",
            seq_length=seq_length,
            global_batch_size=256,
            micro_batch_size=32,
            lr=3e-4,
            min_lr=0.0,
            lr_warmup_steps=42_000_000_000 * 5 // 100 // tokens_per_step,  # --warmup_ratio 0.05
            train_tokens=42_000_000_000,
            weight_decay=0.01,
        ),
        sft=_SFT,
    )


TINY_LLM_ZH_PRESETS = (
    _tiny_llm_zh(
        "16m", 16_730_280, num_layers=6, hidden_size=120, ffn_hidden_size=384, num_attention_heads=6, seq_length=512
    ),
    _tiny_llm_zh(
        "42m", 43_304_544, num_layers=6, hidden_size=288, ffn_hidden_size=768, num_attention_heads=6, seq_length=512
    ),
    _tiny_llm_zh(
        "92m",
        92_064_256,
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=1408,
        num_attention_heads=8,
        seq_length=1024,
        source="wdndev/tiny_llm_sft_92m config.json (the README's table says ffn 1024; its weights have 1408)",
    ),
    _tiny_llm_zh(
        "210m",
        212_838_144,
        num_layers=16,
        hidden_size=768,
        ffn_hidden_size=2048,
        num_attention_heads=12,
        seq_length=1024,
    ),
    _tiny_llm_zh(
        "440m",
        441_111_552,
        num_layers=24,
        hidden_size=1024,
        ffn_hidden_size=2816,
        num_attention_heads=16,
        seq_length=1024,
    ),
    _tiny_llm_zh(
        "1b5",
        1_479_911_424,
        num_layers=24,
        hidden_size=2048,
        ffn_hidden_size=5504,
        num_attention_heads=16,
        seq_length=1024,
    ),
    _tiny_llm_zh(
        "moe",
        161_307_136,
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=1408,
        num_attention_heads=8,
        seq_length=1024,
        # The branch tiny_llm_moe announces shared experts and load balancing but holds no configuration, so the
        # numbers are ours: the 92m body with Qwen1.5-MoE's pattern (fine-grained experts, a gated shared expert as
        # wide as the routed experts that a token meets, coefficient 0.001).
        source="ours: tiny-llm-zh-92m with the layers of Qwen/Qwen1.5-MoE-A2.7B in proportion",
        moe=MoeShape(
            num_experts=8,
            router_topk=2,
            ffn_hidden_size=704,
            shared_expert_intermediate_size=1408,
            has_shared_expert_gate=True,
            aux_loss_coeff=0.001,
        ),
    ),
)
