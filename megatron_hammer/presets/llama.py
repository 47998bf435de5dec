"""Llama 2 and Llama 3.

Sources: arXiv 2307.09288, section 2, and meta-llama/Llama-2-*-hf config.json; arXiv 2407.21783, table 3, and
meta-llama/Meta-Llama-3-* config.json.
"""

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe


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
        num_parameters=num_parameters,
        model=ModelShape(
            name=f"llama2-{size}",
            source=f"meta-llama/Llama-2-{size}-hf config.json",
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
        num_parameters=num_parameters,
        model=ModelShape(
            name=f"llama3-{size}",
            source=f"meta-llama/Meta-Llama-3-{size.upper()} config.json",
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
