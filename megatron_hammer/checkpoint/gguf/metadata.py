"""The key-value pairs of a GGUF file: what llama.cpp needs to know of a model and its tokenizer.

Source of the keys: gguf.constants.Keys; llama.cpp's src/llama-model.cpp and src/llama-vocab.cpp read them.
"""

from gguf import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType

from megatron_hammer.checkpoint.gguf.experts import describe_experts
from megatron_hammer.checkpoint.gguf.file_types import FILE_TYPES
from megatron_hammer.checkpoint.gguf.gguf_file import ExtraTensor
from megatron_hammer.checkpoint.gguf.tensors import ROPE_FACTORS, compute_rope_factors
from megatron_hammer.checkpoint.gguf.tokenizer import GgufVocabulary
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, RopeScaling, YarnScaling

MAX_ENDS = 3  # eos, eot and eom


def build_metadata(
    model: ModelShape, vocabulary: GgufVocabulary, *, arch: str, file_type: str, name: str
) -> GGUFWriter:
    """A writer with every key-value pair of the model and its tokenizer, and no file yet."""
    writer = GGUFWriter(None, arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[file_type].code)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.ffn_hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    # Without these two llama.cpp takes hidden_size / heads, which is not the head size of every model (Qwen3).
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_dimension_count(int(model.head_dim * model.rotary_percent))
    writer.add_rope_freq_base(float(model.rotary_base))
    if model.rotary_seq_len_interpolation_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(model.rotary_seq_len_interpolation_factor))
    if isinstance(model.rope_scaling, YarnScaling):
        _describe_yarn(writer, model.rope_scaling)
    if arch == MODEL_ARCH_NAMES[MODEL_ARCH.GRANITE]:
        writer.add_embedding_scale(model.embedding_multiplier)
        writer.add_attention_scale(model.attention_scale or model.head_dim**-0.5)
        writer.add_residual_scale(model.residual_multiplier)
        writer.add_logit_scale(1 / model.logits_multiplier)  # llama.cpp divides by it
    if model.moe is not None:
        describe_experts(writer, model.moe)
    _describe_tokenizer(writer, vocabulary)
    return writer


def _describe_yarn(writer: GGUFWriter, scaling: YarnScaling) -> None:
    """Raise ConversionError for what llama.cpp does not read: its archs llama, qwen2 and qwen3 have one ramp.

    Source: the constructor of llama_context, and rope_yarn of ggml.
    """
    built_in = YarnScaling(factor=scaling.factor, original_max_position_embeddings=1)
    for name, field in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"), ("truncate", "has_whole_bounds")):
        value, expected = getattr(scaling, field), getattr(built_in, field)
        if value != expected:
            raise ConversionError(
                f"config.json, {name}: must be {str(expected).lower()}, which llama.cpp has built in, got "
                f"{name}={value}. Keep the Hugging Face folder."
            )
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    # llama.cpp multiplies sines and cosines by the factor that follows from `factor` alone, times this.
    if scaling.attention_factor != built_in.attention_factor:
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / built_in.attention_factor)


def _describe_tokenizer(writer: GGUFWriter, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.splitting_rule)
    writer.add_token_list([token.encode("utf-8") for token in vocabulary.tokens])
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    ids = (
        (writer.add_bos_token_id, vocabulary.bos_id),
        (writer.add_eos_token_id, vocabulary.eos_id),
        (writer.add_unk_token_id, vocabulary.unknown_id),
        (writer.add_pad_token_id, vocabulary.padding_id),
    )
    for add, token_id in ids:
        if token_id is not None:
            add(token_id)
    # llama.cpp stops at each of the three. Source: llama_vocab::impl::load, special_eog_ids.
    for add, token_id in zip((writer.add_eot_token_id, writer.add_eom_token_id), vocabulary.eos_ids[1:], strict=False):
        add(token_id)
    # Written even if false, because what llama.cpp does without the key depends on the kind of tokenizer.
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.adds_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.adds_space_prefix)
    if vocabulary.chat_templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in vocabulary.chat_templates.items()])


# What llama.cpp takes where a file names none, by the kind of tokenizer; a file cannot say that there is none. Source:
# llama_vocab::impl::load.
DEFAULT_BOS_IDS, DEFAULT_EOS_IDS = {"llama": 1, "gpt2": 11}, {"llama": 2, "gpt2": 11}


def require_end(vocabulary: GgufVocabulary) -> None:
    """Raise ConversionError if nothing ends a text: llama.cpp would stop at an ordinary token."""
    if not vocabulary.eos_ids:
        default = DEFAULT_EOS_IDS[vocabulary.model]
        raise ConversionError(
            f"eos_token_id: must name a token that ends a text, got none, for which llama.cpp takes {default} "
            f"({vocabulary.tokens[default]}). Name it in generation_config.json, or as eos_token in "
            "tokenizer_config.json."
        )


def list_unwritten(vocabulary: GgufVocabulary) -> list[str]:
    """A sentence for each thing of the tokenizer that has no place in a GGUF file."""
    notes = []
    if vocabulary.bos_id is None:
        default = DEFAULT_BOS_IDS[vocabulary.model]
        notes.append(
            f"no token begins a text, which GGUF cannot say: a chat template that asks for bos_token gets {default} "
            f"({vocabulary.tokens[default]}) from llama.cpp"
        )
    rest = vocabulary.eos_ids[MAX_ENDS:]
    names = ", ".join(f"{token_id} ({vocabulary.tokens[token_id]})" for token_id in rest)
    if rest:
        notes.append(f"{len(rest)} of {len(vocabulary.eos_ids)} ends of a text left out, GGUF names three: {names}")
    return notes


def list_extra_tensors(model: ModelShape) -> list[ExtraTensor]:
    """What llama.cpp reads from the file and transformers computes: the stretch of the rotary frequencies."""
    if not isinstance(model.rope_scaling, RopeScaling):
        return []
    factors = compute_rope_factors(model.rope_scaling, rotary_base=float(model.rotary_base), head_dim=model.head_dim)
    return [ExtraTensor(name=ROPE_FACTORS, values=factors)]
