"""GPT-2 124M, which proves that nothing here is limited to Llama.

Source: openai-community/gpt2 config.json; trained as in karpathy/nanoGPT, config/train_gpt2.py.
"""

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe

GPT2_124M = Preset(
    num_parameters=124_439_808,
    model=ModelShape(
        name="gpt2-124m",
        source="GPT-2 config.json",
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_query_groups=12,
        vocab_size=50_257,  # 256 bytes, 50,000 merges, 1 end of text
        max_position_embeddings=1024,
        normalization="LayerNorm",
        activation="gelu_tanh",
        position_embedding_type="learned_absolute",
        has_linear_bias=True,
        has_qkv_bias=True,
        has_tied_embeddings=True,
    ),
    recipe=Recipe(
        # 12 sequences x 5 accumulations x 8 GPUs; 600,000 steps = "300B".
        source="karpathy/nanoGPT config/train_gpt2.py and train.py",
        seq_length=1024,
        global_batch_size=480,
        micro_batch_size=12,
        lr=6e-4,
        min_lr=6e-5,
        lr_warmup_steps=2000,
        train_tokens=600_000 * 480 * 1024,
    ),
)
