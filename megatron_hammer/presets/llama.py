"""Llama 2 and Llama 3.

Sources: arXiv 2307.09288, section 2, and meta-llama/Llama-2-*-hf config.json; arXiv 2407.21783, table 3, and
meta-llama/Meta-Llama-3-* config.json.
"""

from typing import Any

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe


def _llama(
    name: str,
    num_parameters: int,
    *,
    source: str,
    recipe_source: str,
    seq_length: int,
    global_batch_size: int,
    train_tokens: int,
    lr: float,
    tp: int,
    pp: int,
    vp: int = 1,
    min_lr: float | None = None,
    lr_warmup_steps: int = 2000,
    has_ends_in_pipeline_split: bool = False,
    **shape: Any,
) -> Preset:
    """All share a cosine, to a tenth unless min_lr says otherwise, and epsilon 1e-5. shape: fields of ModelShape."""
    return Preset(
        num_parameters=num_parameters,
        model=ModelShape(name=name, source=source, **shape),
        recipe=Recipe(
            source=recipe_source,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=1,
            lr=lr,
            min_lr=lr / 10 if min_lr is None else min_lr,
            lr_warmup_steps=lr_warmup_steps,
            train_tokens=train_tokens,
            adam_eps=1e-5,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            has_ends_in_pipeline_split=has_ends_in_pipeline_split,
            # It divides the activations that TP leaves whole, at the same communication volume (arXiv 2205.05198).
            has_sequence_parallel=tp > 1,
        ),
    )


def _llama2(size: str, num_parameters: int, *, layout_source: str, **row: Any) -> Preset:
    """Llama 2: 4M tokens per step, 2T tokens (section 2.2)."""
    return _llama(
        f"llama2-{size}",
        num_parameters,
        source=f"meta-llama/Llama-2-{size}-hf config.json",
        recipe_source=f"Llama 2, table 1 and section 2.2; {layout_source}",
        seq_length=4096,
        global_batch_size=1024,  # x 4096 = 4.2M tokens
        train_tokens=2_000_000_000_000,
        vocab_size=32_000,
        max_position_embeddings=4096,
        **row,
    )


def _llama3(
    size: str,
    num_parameters: int,
    *,
    layout_source: str,
    version: str = "3",
    batch_source: str = "Megatron-Bridge's Llama 3 recipes",
    global_batch_size: int = 512,  # x 8192 = 4.2M tokens
    train_tokens: int = 15_000_000_000_000,
    **row: Any,
) -> Preset:
    """Llama 3: 8 query groups, 15T tokens; the batch and warm-up of 8B and 70B are unpublished, NVIDIA's are taken."""
    return _llama(
        f"llama3-{size}",
        num_parameters,
        source=f"meta-llama/Meta-Llama-{version}-{size.upper()} config.json",
        recipe_source=f"lr: Llama 3, table 3; batch and warm-up: {batch_source}; {layout_source}",
        seq_length=8192,
        global_batch_size=global_batch_size,
        train_tokens=train_tokens,
        num_query_groups=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
        rotary_base=500_000,
        **row,
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
        num_query_groups=32,  # as many as heads: Llama 2 has grouped queries at 34B and 70B only
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
    _llama3(
        "405b",
        405_853_388_800,
        version="3.1",
        num_layers=126,
        hidden_size=16_384,
        ffn_hidden_size=53_248,
        num_attention_heads=128,
        lr=8e-5,
        # 16.8M tokens: the batch after the first 2.87T tokens, which took 4M and 8M. The cosine ends with the tokens.
        global_batch_size=2048,
        train_tokens=15_600_000_000_000,
        batch_source="Llama 3, section 3.4.1",
        min_lr=8e-7,
        lr_warmup_steps=8000,
        has_ends_in_pipeline_split=True,
        tp=8,
        pp=16,
        vp=4,
        layout_source="layout: Llama 3, section 3.3.2 and table 4; VP4 is ours",
    ),
)
