"""Every shipped preset by its name. A family is one file beside this one, each number with its source.

`config/` turns a preset into Megatron's arguments, `model/accounting.py` counts it, `model/provider.py` builds it; a
test holds the counts together. Left out on purpose: data, tokenizers and paths (they belong to a run), and context
parallelism (it needs TransformerEngine; add it on the command line).
"""

import difflib

from megatron_hammer.errors import ConfigError
from megatron_hammer.presets.gpt2 import GPT2_124M
from megatron_hammer.presets.hammer import HAMMER_1B4, HAMMER_1B4_DEMO, HAMMER_TINY, HAMMER_TINY_MOE
from megatron_hammer.presets.llama import LLAMA_PRESETS
from megatron_hammer.presets.open_llama import OPEN_LLAMA_7B
from megatron_hammer.presets.preset import Preset
from megatron_hammer.presets.qwen3 import QWEN3_PRESETS
from megatron_hammer.presets.smollm3 import SMOLLM3_3B
from megatron_hammer.presets.tiny_llm_zh import TINY_LLM_ZH_PRESETS
from megatron_hammer.presets.tinyllama import TINYLLAMA_1B1

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        HAMMER_1B4,
        HAMMER_1B4_DEMO,
        HAMMER_TINY,
        HAMMER_TINY_MOE,
        TINYLLAMA_1B1,
        *TINY_LLM_ZH_PRESETS,
        OPEN_LLAMA_7B,
        *LLAMA_PRESETS,
        *QWEN3_PRESETS,
        SMOLLM3_3B,
        GPT2_124M,
    )
}


def select_preset(name: str) -> Preset:
    """The shipped preset of that name; raises ConfigError naming the nearest ones and all."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)  # shipped names are in lower case
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigError(
        f"preset: must be a shipped one, got preset={name!r}. {hint}Use one of: {', '.join(sorted(PRESETS))}."
    )
