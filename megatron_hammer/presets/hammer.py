"""HammerLLM 1.4B and its miniatures.

Source: Academic-Hammer/HammerLLM, the published config.json, REPRODUCE.md and pretrain/train.sh. The miniatures are
ours: small enough for a laptop, with every parallel size of the parallel tour still possible.
"""

from dataclasses import replace

from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.presets.preset import Preset, Recipe, SftRecipe

HAMMER_1B4 = Preset(
    num_parameters=1_402_288_128,
    model=ModelShape(
        name="hammer-1b4",
        source="HammerLLM config.json",
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

HAMMER_1B4_DEMO = Preset(
    num_parameters=HAMMER_1B4.num_parameters,
    model=replace(HAMMER_1B4.model, name="hammer-1b4-demo", source="HammerLLM config.json: hammer-1b4 itself"),
    recipe=Recipe(
        # examples/demo_data.sh makes 2 to 3 million tokens. The run is 2.4e16 FLOPs: two minutes at 200 TFLOP/s.
        source="ours: a demonstration of hammer-1b4 on text of one machine; betas, decay and clip are hammer-1b4's",
        seq_length=2048,
        global_batch_size=32,  # up to 32 GPUs, and enough steps to see the loss fall
        micro_batch_size=1,  # beside 18 bytes per parameter, a GPU of 40 GB has no room for more
        lr=3e-4,
        min_lr=3e-5,
        lr_warmup_steps=5,
        train_tokens=48 * 32 * 2048,
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

_TINY_SFT = SftRecipe(
    source="ours: a quarter of hammer-tiny's learning rate; warm-up and epochs of tiny-llm-zh",
    global_batch_size=8,
    lr=2.5e-4,
    min_lr=0.0,
    lr_decay_style="cosine",
    lr_warmup_fraction=0.05,
    num_epochs=5,
    weight_decay=0.1,
)

HAMMER_TINY = Preset(
    num_parameters=4_851_968,
    model=ModelShape(
        name="hammer-tiny",
        source="ours: hammer-1b4 with hidden/8; 8 heads a query group, ffn 2.75 x hidden, vocab 16 x hidden or more",
        num_layers=4,  # the least that TP2 x PP2 x VP2 can share out
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=16,
        num_query_groups=2,  # the least that TP2 can share out
        vocab_size=4096,
        max_position_embeddings=256,
    ),
    recipe=_TINY_RECIPE,
    sft=_TINY_SFT,
)

HAMMER_TINY_MOE = Preset(
    num_parameters=9_182_464,
    model=replace(
        HAMMER_TINY.model,
        name="hammer-tiny-moe",
        source="ours: hammer-tiny with Qwen2-MoE layers; the active experts are as wide as hammer-tiny's MLP",
        moe=MoeShape(
            num_experts=4,
            router_topk=2,
            ffn_hidden_size=352,
            shared_expert_intermediate_size=704,
            has_shared_expert_gate=True,
        ),
    ),
    recipe=_TINY_RECIPE,
    sft=_TINY_SFT,
)
