"""TinyLlama 1.1B.

Source: arXiv 2401.02385 and jzhang38/TinyLlama, pretrain/tinyllama.py and sft/script.sh.
"""

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe, SftRecipe

TINYLLAMA_1B1 = Preset(
    num_parameters=1_100_048_384,
    model=ModelShape(
        name="tinyllama-1b1",
        source="TinyLlama/TinyLlama-1.1B config.json",
        num_layers=22,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
        num_query_groups=4,
        vocab_size=32_000,
        max_position_embeddings=2048,
    ),
    recipe=Recipe(
        source="TinyLlama: 2M tokens a step, 2 x 715,256 steps (3T tokens)",
        seq_length=2048,
        global_batch_size=1024,
        micro_batch_size=8,
        lr=4e-4,
        min_lr=4e-5,
        lr_warmup_steps=2000,
        train_tokens=2 * 715_256 * 1024 * 2048,
    ),
    sft=SftRecipe(
        # 4 conversations x 4 GPUs. Its --warmup_ratio 0.05 has no effect beside --lr_scheduler_type constant.
        source="TinyLlama sft/script.sh, of the chat models V0.1 and V0.2",
        global_batch_size=16,
        lr=1e-5,
        min_lr=0.0,
        lr_decay_style="constant",
        lr_warmup_fraction=None,
        num_epochs=5,
        weight_decay=0.0,
        adam_beta2=0.999,
    ),
)
