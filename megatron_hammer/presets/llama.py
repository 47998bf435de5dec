"""Presets of other people's families, for `presets.py`: tiny-llm-zh, Open-Llama, Llama 2 and Llama 3.

Sources by short name:
  tiny-llm-zh      wdndev/tiny-llm-zh, README.md 3.3, script/ptm_demo.sh and train/configuration_tinyllm.py
  Open-Llama       s-JoL/Open-Llama at its 100,000-token vocabulary: README_en.md, configs/train_config.py
  Llama 2          arXiv 2307.09288, section 2 and meta-llama/Llama-2-*-hf config.json
  Llama 3          arXiv 2407.21783, table 3 and meta-llama/Meta-Llama-3-* config.json
"""

from megatron_hammer.model.shape import ModelPreset, MoeShape, Preset, Recipe

# --- tiny-llm-zh -----------------------------------------------------------------------------------------------------


def _tiny_llm_zh(
    size: str,
    num_parameters: int,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    seq_length: int,
    source: str = "tiny-llm-zh README.md 3.3",
    moe: MoeShape | None = None,
) -> Preset:
    """One row of the family's table: multi-head attention, qkv bias, ChatGLM3's vocabulary, untied."""
    tokens_per_step = 256 * seq_length
    return Preset(
        model=ModelPreset(
            name=f"tiny-llm-zh-{size}",
            source=source,
            num_parameters=num_parameters,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=num_attention_heads,
            num_query_groups=num_attention_heads,
            vocab_size=64_798,
            max_position_embeddings=seq_length,
            norm_epsilon=1e-6,
            has_qkv_bias=True,
            moe=moe,
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

# --- 7B and more -----------------------------------------------------------------------------------------------------

OPEN_LLAMA_7B = Preset(
    model=ModelPreset(
        name="open-llama-7b",
        # 409,600,000 embedding (shared with the head) + 8,192 LayerNorm on it + 32 x 202,383,360 + 4,096 final norm.
        source="Open-Llama README_en.md (the printed model summary) and pretrain_llama.py",
        num_parameters=6_885_879_808,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11_008,
        num_attention_heads=32,
        num_query_groups=32,
        vocab_size=100_000,
        max_position_embeddings=2048,
        has_tied_embeddings=True,
        has_embedding_norm=True,
        init_method_std=0.01,
    ),
    recipe=Recipe(
        # 2 sequences x 12 accumulations x 160 GPUs = "4M tokens"; 80,000 steps = "300 billion tokens".
        source="Open-Llama configs/train_config.py and README_en.md; sharded with DeepSpeed stage 1 only",
        seq_length=1024,
        global_batch_size=3840,
        micro_batch_size=2,
        lr=2e-4,
        min_lr=0.0,
        lr_warmup_steps=2000,
        train_tokens=80_000 * 3840 * 1024,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    ),
)


def _llama2(
    size: str,
    num_parameters: int,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    lr: float,
    tp: int,
    pp: int,
    layout_source: str,
) -> Preset:
    """Llama 2: 4M tokens a step, 2T tokens, cosine to a tenth, warm-up 2000, epsilon 1e-5 (section 2.2)."""
    return Preset(
        model=ModelPreset(
            name=f"llama2-{size}",
            source=f"meta-llama/Llama-2-{size}-hf config.json",
            num_parameters=num_parameters,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=num_attention_heads,
            num_query_groups=num_query_groups,
            vocab_size=32_000,
            max_position_embeddings=4096,
        ),
        recipe=Recipe(
            source=f"Llama 2, table 1 and section 2.2; {layout_source}",
            seq_length=4096,
            global_batch_size=1024,
            micro_batch_size=1,
            lr=lr,
            min_lr=lr / 10,
            lr_warmup_steps=2000,
            train_tokens=2_000_000_000_000,
            adam_eps=1e-5,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            has_sequence_parallel=tp > 1,
        ),
    )


def _llama3(
    size: str,
    num_parameters: int,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    lr: float,
    tp: int,
    pp: int,
    vp: int,
    layout_source: str,
) -> Preset:
    """Llama 3: 8 query groups, 15T tokens; the batch and warm-up of 8B and 70B are unpublished, NVIDIA's are taken."""
    return Preset(
        model=ModelPreset(
            name=f"llama3-{size}",
            source=f"meta-llama/Meta-Llama-3-{size.upper()} config.json",
            num_parameters=num_parameters,
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=num_attention_heads,
            num_query_groups=8,
            vocab_size=128_256,
            max_position_embeddings=8192,
            rotary_base=500_000,
        ),
        recipe=Recipe(
            source=f"lr: Llama 3, table 3; batch and warm-up: Megatron-Bridge's Llama 3 recipes; {layout_source}",
            seq_length=8192,
            global_batch_size=512,
            micro_batch_size=1,
            lr=lr,
            min_lr=lr / 10,
            lr_warmup_steps=2000,
            train_tokens=15_000_000_000_000,
            adam_eps=1e-5,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            has_sequence_parallel=tp > 1,
        ),
    )


_NVIDIA_LAYOUT = "layout: NeMo-Framework-Launcher"
LLAMA_PRESETS = (
    _llama2(
        "7b",
        6_738_415_616,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11_008,
        num_attention_heads=32,
        num_query_groups=32,
        lr=3e-4,
        tp=1,
        pp=1,
        layout_source=f"{_NVIDIA_LAYOUT} llama2_7b",
    ),
    _llama2(
        "13b",
        13_015_864_320,
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=13_824,
        num_attention_heads=40,
        num_query_groups=40,
        lr=3e-4,
        tp=2,
        pp=1,
        layout_source=f"{_NVIDIA_LAYOUT} llama2_13b",
    ),
    _llama2(
        "70b",
        68_976_648_192,
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28_672,
        num_attention_heads=64,
        num_query_groups=8,
        lr=1.5e-4,
        tp=8,
        pp=4,
        layout_source=f"{_NVIDIA_LAYOUT} llama2_70b (there TP4 PP4 VP20)",
    ),
    _llama3(
        "8b",
        8_030_261_248,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14_336,
        num_attention_heads=32,
        lr=3e-4,
        tp=2,
        pp=1,
        vp=1,
        layout_source="layout: ours, TP2 for Megatron-Bridge's CP2",
    ),
    _llama3(
        "70b",
        70_553_706_496,
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28_672,
        num_attention_heads=64,
        lr=1.5e-4,
        tp=8,
        pp=4,
        vp=5,
        layout_source="layout: ours, TP8 PP4 VP5 for Megatron-Bridge's TP4 CP2 PP4 VP5",
    ),
)
