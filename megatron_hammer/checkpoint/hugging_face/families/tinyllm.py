"""tiny-llm-zh: Llama with biases on q, k and v, under Llama's names. Read only: an export of it is a Qwen2.

Source: wdndev/tiny-llm-zh, train/configuration_tinyllm.py and train/modeling_tinyllm.py.
"""

from megatron_hammer.checkpoint.hugging_face.config_rows import unwritten
from megatron_hammer.checkpoint.hugging_face.families.llama import list_llama_tensors, llama_config
from megatron_hammer.checkpoint.hugging_face.family import Family

TINYLLM = Family(
    model_type="tinyllm",
    hf_classes=("TinyllmForCausalLM",),
    has_own_code=True,
    config=(
        *llama_config(may_lack_groups=True),
        unwritten(lambda fields: fields.require_no_window(default=None)),
    ),
    constants={"has_qkv_bias": True},
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: False,
)
