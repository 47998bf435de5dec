"""Whether transformers' AutoTokenizer encodes as the file that is read here, and a sentence where it does not.

transformers may take only vocabulary and merges from a tokenizer.json, and the rest from the class that other files
name; it adds the tokens that those files list; and it converts a tokenizer.model by rules of its own. Tools here
encode by the file itself, so that what a user gets from AutoTokenizer may be another tokenizer.
"""

from typing import Any

import orjson

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.encoder import RUST_PANIC, Encoder, HuggingFaceEncoder
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import SAMPLE_TEXTS
from megatron_hammer.tokenizer.encoding.special_tokens import CONFIG_NAME, list_named_tokens, read_config
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

MODEL_CONFIG_NAME = "config.json"
SHOWN_CHARS, SHOWN_IDS = 40, 6
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
# The classes, by the names in tokenizer_config.json and the model types of config.json, whose rules are known without
# loading transformers, which takes seconds. Each is compared with transformers by a test.
QWEN_TYPES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
READ_AS_WRITTEN = {
    (name, model_type)
    for name in ("PreTrainedTokenizerFast", "TokenizersBackend")
    for model_type in (None, "llama", "mistral", "mixtral", "olmo2", "qwen3", "qwen3_moe", "gpt2")
}
READ_AS_QWEN = {
    (name, model_type)
    for name in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    for model_type in (None, "llama", *QWEN_TYPES)
}
_QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_RULES: dict[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _QWEN_REGEX}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
}
QWEN_MODEL = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}


def describe_other_loading(encoder: Encoder) -> str | None:
    """Return a sentence if AutoTokenizer makes another tokenizer of the folder than `encoder`; loads transformers.

    Special tokens, what is put around a text, and texts that have told tokenizers apart are compared.
    """
    folder = encoder.path if encoder.path.is_dir() else encoder.path.parent
    try:
        tokenizer = load_with_transformers(folder)
    except ConversionError:
        return None  # nobody gets another tokenizer of it
    named = sorted(str(token) for token in tokenizer.added_tokens_decoder.values())
    for text in (*SAMPLE_TEXTS, *named, *(f"a {token} b" for token in named)):
        theirs = _try_to_encode(tokenizer, text)
        if theirs is not None and theirs != (ours := _encode_as_called(encoder, text)):
            return (
                f"{folder}: transformers' AutoTokenizer is another tokenizer than {encoder.path.name}, by its class "
                f"{type(tokenizer).__name__} and the files beside it: {text[:SHOWN_CHARS]!r} is {_show(theirs)} for "
                f"it and {_show(ours)} by the file."
            )
    return None


def is_known_to_load_alike(encoder: HuggingFaceEncoder) -> bool:
    """Whether AutoTokenizer encodes as the file, by what is known of its classes; False: not known."""
    if encoder.path.is_dir():
        return True  # the definition is what transformers made of the folder
    config = read_config(encoder.path.with_name(CONFIG_NAME))
    model_type = read_config(encoder.path.with_name(MODEL_CONFIG_NAME)).get("model_type")
    if not config and model_type is None:
        return True  # a file by itself
    definition = orjson.loads(encoder.read_definition())
    added = {token["content"]: _list_flags(token) for token in definition.get("added_tokens") or []}
    listed = config.get("added_tokens_decoder") or {}
    if not list_named_tokens(encoder.path.parent) <= added.keys() or not isinstance(listed, dict):
        return False
    if any(not isinstance(one, dict) or _list_flags(one) != added[one.get("content")] for one in listed.values()):
        return False
    key = config.get("tokenizer_class"), model_type
    return key in READ_AS_WRITTEN or (key in READ_AS_QWEN and _has_rules_of_qwen(definition))


def _has_rules_of_qwen(definition: dict[str, Any]) -> bool:
    model = definition["model"]
    parts = {name: _drop_trimming(definition.get(name)) for name in QWEN_RULES}
    marks = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    is_plain = all((model.get(name) or default) == default for name, default in QWEN_MODEL.items())
    return model.get("type") == "BPE" and is_plain and not any(marks) and parts == QWEN_RULES


def _drop_trimming(part: Any) -> Any:
    """A copy without `trim_offsets`, which moves no token."""
    if isinstance(part, list):
        return [_drop_trimming(item) for item in part]
    if isinstance(part, dict):
        return {key: _drop_trimming(value) for key, value in part.items() if key != "trim_offsets"}
    return part


def _list_flags(token: dict[str, Any]) -> dict[str, Any]:
    # An absent `normalized` is the opposite of `special`, in both libraries.
    defaults = FLAGS | {"normalized": not token.get("special", False)}
    return {name: token.get(name, default) for name, default in defaults.items()}


def _try_to_encode(tokenizer: Any, text: str) -> list[int] | None:
    """None where transformers fails, by a class that does not fit to the file: its users get an error and no ids."""
    try:
        return list(tokenizer(text, verbose=False)["input_ids"])
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        return None


def _encode_as_called(encoder: Encoder, text: str) -> list[int]:
    """With what a tokenizer.json puts around every text; a SentencePiece model puts nothing there."""
    ids: list[int] = encoder.encode(text).tolist()  # first: it has a sentence for a defect inside the library
    if isinstance(encoder, HuggingFaceEncoder):
        return list(encoder.tokenizer.encode(text, add_special_tokens=True).ids)
    return ids


def _show(ids: list[int]) -> str:
    return f"{ids[:SHOWN_IDS]}"[:-1] + (", ...]" if len(ids) > SHOWN_IDS else "]")
