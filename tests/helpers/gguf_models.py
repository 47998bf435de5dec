"""Small random models of every family that becomes GGUF, with all-different dimensions and a tokenizer."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import tokenizers
import torch
import transformers
from gguf import GGUFWriter
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, train_toy_tokenizer

VOCAB_SIZE = TOY_VOCAB_SIZE + 5  # rows that no token has
# Not those of toy_model.LLAMA: a block of Q8_0 has 32 numbers, so every row must have a multiple of 32.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 112,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {
    "n_routed_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.8, "original_max_position_embeddings": 40}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama 3.1": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
    ),
    "llama yarn": (transformers.LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "qwen2 yarn": (
        transformers.Qwen2Config,
        {"head_dim": 16, "rope_parameters": YARN_ROPE | {"attention_factor": 0.7}},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"head_dim": 16}),
    "qwen3": (transformers.Qwen3Config, {}),
    "phi3": (transformers.Phi3Config, {"head_dim": 16, "pad_token_id": None}),
    "phi3 partial": (transformers.Phi3Config, {"head_dim": 16, "partial_rotary_factor": 0.5, "pad_token_id": None}),
    "seed oss": (transformers.SeedOssConfig, {}),
    "smollm3": (
        transformers.SmolLM3Config,
        {"num_hidden_layers": 5, "pad_token_id": None, "tie_word_embeddings": False},
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 1.3,
        },
    ),
    "glm 4.5": (
        transformers.Glm4MoeConfig,
        {**EXPERTS, "use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 2},
    ),
    "solar open": (transformers.SolarOpenConfig, EXPERTS),
    "dots.llm1": (
        transformers.Dots1Config,
        {**EXPERTS, "num_key_value_heads": 6, "first_k_dense_replace": 1, "sliding_window": None},
    ),
    "helium": (transformers.HeliumConfig, {"head_dim": 16, "tie_word_embeddings": True}),
}


def write_gguf_source(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Write a Hugging Face folder; biases are not zero and norms not one, so that none can be lost unseen."""
    config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(SIZES | own | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # sigmoid scores lie between 0 and 1
                buffer.normal_(std=0.3)
    model.save_pretrained(folder)
    export_tokenizer(make_toy_model(), folder, max_length=None)
    return folder


@cache
def make_toy_model() -> Path:
    """The toy SentencePiece model, trained once a process."""
    return train_toy_tokenizer(Path(mkdtemp(prefix="gguf-toy-")))


class PlainTokenizer:
    """Stands for what transformers makes of a tokenizer that adds nothing to a text, where that takes long or fails."""

    bos_token_id = eos_token_id = unk_token_id = pad_token_id = chat_template = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [9] if text else []}

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        raise ValueError("there is no chat template")


def write_byte_level(folder: Path, rule: str, *, has_single_digits: bool = False, **changes: Any) -> None:
    """A byte-level BPE of a few merges that splits by `rule`, as Qwen2's does, or digits one by one before that."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(rule), "isolated")
    digits = [pre_tokenizers.Digits(individual_digits=True)] if has_single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*digits, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(TOY_TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    content = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


VOCABULARY = ("<unk>", "<s>", "</s>", "a", "春", "<|im_end|>")
VOCABULARY_TYPES = (2, 3, 3, 1, 1, 4)  # llama.cpp's numbers: unknown, control, normal, user-defined


def write_vocabulary(
    path: Path,
    *,
    tokens: tuple[str, ...] = VOCABULARY,
    types: tuple[int, ...] = VOCABULARY_TYPES,
    context: int = 128,
    **special: int | bool,
) -> Path:
    """Write a GGUF file without tensors. special: of tokenizer.ggml, such as eos_token_id."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    for name, value in ({"bos_token_id": 1, "eos_token_id": 2} | special).items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
