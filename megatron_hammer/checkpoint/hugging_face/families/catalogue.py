"""Every family, and which of them computes a given model."""

from megatron_hammer.checkpoint.hugging_face.families.gpt2 import GPT2
from megatron_hammer.checkpoint.hugging_face.families.llama import LLAMA
from megatron_hammer.checkpoint.hugging_face.families.mistral import MISTRAL
from megatron_hammer.checkpoint.hugging_face.families.mixtral import MIXTRAL
from megatron_hammer.checkpoint.hugging_face.families.qwen2 import QWEN2
from megatron_hammer.checkpoint.hugging_face.families.qwen2_moe import QWEN2_MOE
from megatron_hammer.checkpoint.hugging_face.families.qwen3 import QWEN3
from megatron_hammer.checkpoint.hugging_face.families.qwen3_moe import QWEN3_MOE
from megatron_hammer.checkpoint.hugging_face.families.tinyllm import TINYLLM
from megatron_hammer.checkpoint.hugging_face.family import Family, no_family
from megatron_hammer.model.shape import ModelShape

# In the order in which a class is looked for: the more special kind of model first.
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (GPT2, QWEN2_MOE, QWEN3_MOE, MIXTRAL, QWEN3, LLAMA, QWEN2, MISTRAL, TINYLLM)
}


def select_family(model: ModelShape) -> Family:
    """The class of transformers that computes this model; raises ConversionError where there is none."""
    # Open-Llama, the only class with a norm after the embedding, was removed from transformers.
    if model.has_embedding_norm:
        raise no_family("embedding_norm=True", "transformers has no Open-Llama class any more")
    family = next(family for family in FAMILIES.values() if family.is_candidate(model))
    family.require(model)
    return family
