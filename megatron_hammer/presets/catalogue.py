"""Every shipped model and recipe: each number with its source. No torch, no megatron.

A `ModelPreset` says what is built; a `Recipe` how it is trained; a `Preset` joins the two under one name. `config/`
turns them into Megatron's arguments, `model/accounting.py` counts them, `model/provider.py` builds them; a test holds
the counts together. Left out on purpose: data, tokenizers and paths (they belong to a run), context parallelism
(it needs TransformerEngine; add it on the command line).

Sources by short name:
  HammerLLM        Academic-Hammer/HammerLLM, published config.json, REPRODUCE.md and pretrain/train.sh
  TinyLlama        arXiv 2401.02385 and jzhang38/TinyLlama, pretrain/tinyllama.py
  GPT-2            openai-community/gpt2 config.json; trained as in karpathy/nanoGPT, config/train_gpt2.py
"""

import difflib

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.shape import ModelPreset, MoeShape, Preset, Recipe
from megatron_hammer.presets.llama import LLAMA_PRESETS, OPEN_LLAMA_7B, TINY_LLM_ZH_PRESETS

__all__ = ["PRESETS", "ModelPreset", "MoeShape", "Preset", "Recipe", "select_preset"]


# --- HammerLLM and its miniatures ------------------------------------------------------------------------------------

HAMMER_1B4 = Preset(
    model=ModelPreset(
        name="hammer-1b4",
        source="HammerLLM config.json",
        num_parameters=1_402_288_128,
        num_layers=22,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
        num_query_groups=4,
        vocab_size=105_789,
        max_position_embeddings=2048,
    ),
    recipe=Recipe(
        # 8 sequences x 16 accumulations x 8 GPUs; --max_steps 1000000. Two differences, on purpose: the published
        # script leaves betas and weight decay at its trainer's defaults (0.9/0.999, 0), here they are TinyLlama's;
        # its cosine runs to zero and is cut off at min_lr, Megatron's reaches min_lr at the last step.
        source="HammerLLM REPRODUCE.md and pretrain/train.sh; betas and weight decay from TinyLlama",
        seq_length=2048,
        global_batch_size=1024,
        micro_batch_size=8,
        lr=5e-4,
        min_lr=5e-5,
        lr_warmup_steps=2000,
        train_tokens=1_000_000 * 1024 * 2048,
    ),
)

_TINY_RECIPE = Recipe(
    # lr 1e-3, 2e-3 and 4e-3 were tried for 120 steps of English text: final loss 5.33, 5.46, 5.46 (from 8.40), at
    # 0.77 s a step on one core of a shared machine.
    source="ours: sized for two CPU cores; lr : min_lr, betas, decay and clip are hammer-1b4's",
    seq_length=256,
    global_batch_size=8,
    micro_batch_size=2,
    lr=1e-3,
    min_lr=1e-4,
    lr_warmup_steps=20,
    train_tokens=200 * 8 * 256,
    precision="fp32",  # CPU cores have no fast bf16
)

HAMMER_TINY = Preset(
    model=ModelPreset(
        name="hammer-tiny",
        source="ours: hammer-1b4 with hidden/8; 8 heads a query group, ffn 2.75 x hidden, vocab 16 x hidden or more",
        num_parameters=4_851_968,
        num_layers=4,  # the least that TP2 x PP2 x VP2 can share out
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=16,
        num_query_groups=2,  # the least that TP2 can share out
        vocab_size=4096,
        max_position_embeddings=256,
    ),
    recipe=_TINY_RECIPE,
)

HAMMER_TINY_MOE = Preset(
    model=ModelPreset(
        name="hammer-tiny-moe",
        source="ours: hammer-tiny with Qwen2-MoE layers; the active experts are as wide as hammer-tiny's MLP",
        num_parameters=9_182_464,
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=16,
        num_query_groups=2,
        vocab_size=4096,
        max_position_embeddings=256,
        moe=MoeShape(
            num_experts=4,
            router_topk=2,
            ffn_hidden_size=352,
            shared_expert_intermediate_size=704,
            has_shared_expert_gate=True,
        ),
    ),
    recipe=_TINY_RECIPE,
)

# --- TinyLlama -------------------------------------------------------------------------------------------------------

TINYLLAMA_1B1 = Preset(
    model=ModelPreset(
        name="tinyllama-1b1",
        source="TinyLlama/TinyLlama-1.1B config.json",
        num_parameters=1_100_048_384,
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
)

# --- GPT-2: proves that nothing here is Llama-only -------------------------------------------------------------------

GPT2_124M = Preset(
    model=ModelPreset(
        name="gpt2-124m",
        source="GPT-2 config.json",
        num_parameters=124_439_808,
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_query_groups=12,
        vocab_size=50_257,
        max_position_embeddings=1024,
        normalization="LayerNorm",
        activation="gelu",
        position_embedding_type="learned_absolute",
        has_linear_bias=True,
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

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        HAMMER_1B4,
        HAMMER_TINY,
        HAMMER_TINY_MOE,
        TINYLLAMA_1B1,
        *TINY_LLM_ZH_PRESETS,
        OPEN_LLAMA_7B,
        *LLAMA_PRESETS,
        GPT2_124M,
    )
}


def select_preset(name: str) -> Preset:
    """The shipped preset of that name; raises ConfigError naming the nearest ones and all."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigError(
        f"preset: must be a shipped one, got preset={name!r}. {hint}Use one of: {', '.join(sorted(PRESETS))}."
    )
