"""SmolLM3 3B: a Llama with tied embeddings that leaves the rope out of every fourth layer.

Sources: HuggingFaceTB/SmolLM3-3B config.json; the total_parameters of its safetensors index; huggingface/blog
smollm3.md and huggingface/smollm, text/pretraining/smollm3, for the recipe.
"""

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe

SMOLLM3_3B = Preset(
    num_parameters=3_075_098_624,
    model=ModelShape(
        name="smollm3-3b",
        source="HuggingFaceTB/SmolLM3-3B config.json",
        num_layers=36,
        hidden_size=2048,
        ffn_hidden_size=11_008,
        num_attention_heads=16,
        num_query_groups=4,
        vocab_size=128_256,
        max_position_embeddings=65_536,
        norm_epsilon=1e-6,
        # Of the finished model. Its first stage, at 4,096 tokens, had 50,000: pass --rotary-base 50000 to repeat it.
        rotary_base=5_000_000,
        layers_without_rope=tuple(range(3, 36, 4)),
        has_tied_embeddings=True,
    ),
    recipe=Recipe(
        source="SmolLM3's blog; its decay is linear, over the last tenth, and here a cosine as in every preset",
        seq_length=4096,
        global_batch_size=576,  # x 4096 = 2,359,296 tokens
        micro_batch_size=1,
        lr=2e-4,
        min_lr=0.0,
        lr_warmup_steps=2000,
        train_tokens=11_200_000_000_000,
        tensor_model_parallel_size=2,
        has_sequence_parallel=True,
    ),
)
