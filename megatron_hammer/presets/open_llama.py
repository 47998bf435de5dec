"""Open-Llama 7B.

Source: s-JoL/Open-Llama at its 100,000-token vocabulary: README_en.md, configs/train_config.py.
"""

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe

OPEN_LLAMA_7B = Preset(
    num_parameters=6_885_879_808,
    model=ModelShape(
        name="open-llama-7b",
        # 409,600,000 embedding (shared with the head) + 8,192 LayerNorm on it + 32 x 202,383,360 + 4,096 final norm.
        source="Open-Llama README_en.md (the printed model summary) and pretrain_llama.py",
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
