"""Every family, and which of them computes a given model."""

from megatron_hammer.checkpoint.hugging_face.families.gpt2 import GPT2
from megatron_hammer.checkpoint.hugging_face.families.granite import GRANITE
from megatron_hammer.checkpoint.hugging_face.families.helium import HELIUM
from megatron_hammer.checkpoint.hugging_face.families.llama import LLAMA
from megatron_hammer.checkpoint.hugging_face.families.mistral import MINISTRAL, MISTRAL
from megatron_hammer.checkpoint.hugging_face.families.mixtures.dots1 import DOTS1
from megatron_hammer.checkpoint.hugging_face.families.mixtures.glm4_moe import GLM4_MOE
from megatron_hammer.checkpoint.hugging_face.families.mixtures.hy_v3 import HY_V3
from megatron_hammer.checkpoint.hugging_face.families.mixtures.mixtral import MIXTRAL
from megatron_hammer.checkpoint.hugging_face.families.mixtures.qwen2_moe import QWEN2_MOE
from megatron_hammer.checkpoint.hugging_face.families.mixtures.qwen3_moe import QWEN3_MOE
from megatron_hammer.checkpoint.hugging_face.families.mixtures.solar_open import SOLAR_OPEN
from megatron_hammer.checkpoint.hugging_face.families.phi3 import PHI3
from megatron_hammer.checkpoint.hugging_face.families.qwen2 import QWEN2
from megatron_hammer.checkpoint.hugging_face.families.qwen3 import QWEN3
from megatron_hammer.checkpoint.hugging_face.families.seed_oss import SEED_OSS
from megatron_hammer.checkpoint.hugging_face.families.smollm3 import SMOLLM3
from megatron_hammer.checkpoint.hugging_face.families.tinyllm import TINYLLM
from megatron_hammer.checkpoint.hugging_face.family import Family, list_features, no_family
from megatron_hammer.model.shape import ModelShape

# In the order in which a class is looked for: the more special kind of model first, and those that add to Llama only
# what few models have, or that spell the same model in another way, last.
_ORDER = (
    *(GLM4_MOE, DOTS1, HY_V3, SOLAR_OPEN),
    *(GPT2, QWEN2_MOE, QWEN3_MOE, MIXTRAL, QWEN3, LLAMA, QWEN2, MISTRAL, MINISTRAL, TINYLLM),
    *(GRANITE, SMOLLM3, PHI3, SEED_OSS, HELIUM),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ORDER}


def select_family(model: ModelShape, *, preferred: str | None = None) -> Family:
    """The class of transformers that computes this model; raises ConversionError where there is none.

    preferred: the model_type that the model was read from; taken if that class still computes the model.
    """
    # Open-Llama, the only class with a norm after the embedding, was removed from transformers.
    if model.has_embedding_norm:
        raise no_family("embedding_norm=True", "transformers has no Open-Llama class any more")
    if preferred in FAMILIES and FAMILIES[preferred].computes(model):
        return FAMILIES[preferred]
    candidates = [family for family in FAMILIES.values() if family.is_candidate(model)]
    if list_features(model):
        for family in candidates:
            if family.computes(model):
                return family
    # Of a plain model the first is the right one; it, or the nearest class, says what it lacks.
    candidates[0].require(model)
    return candidates[0]
