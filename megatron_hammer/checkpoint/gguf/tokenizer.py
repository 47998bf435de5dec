"""The tokenizer of a Hugging Face folder as the vocabulary of a GGUF file.

A SentencePiece BPE model (tokenizer.model) becomes llama.cpp's model "llama", which merges by score as sentencepiece
does. A byte-level BPE tokenizer.json becomes "gpt2"; llama.cpp knows splitting rules only by name, so the rule in the
file must be one of those. What llama.cpp cannot do is refused here. Texts that it encodes in another way are found and
named by `tokenizer_check.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_hammer.errors import ConversionError
from megatron_hammer.files.read import is_present
from megatron_hammer.tokenizer.encoding.encoder import Encoder, HuggingFaceEncoder, load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    Piece,
    PieceType,
    SentencePieceModel,
    read_sentencepiece_model,
)
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers
from megatron_hammer.tokenizer.export.check_loading import CONVERSATIONS, render_conversation

_GPT2_RULE = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE_PIECES_RULE = "llama-bpe"
_SINGLE_DIGITS, _BYTES, _BYTES_AND_GPT2 = "Digits", "ByteLevel", "ByteLevel with GPT-2's expression"
# How a byte-level BPE cuts text before it merges, one step after the other -> llama.cpp's name of it. Source:
# llama.cpp, llama-vocab.cpp.
SPLITTING_STEPS: dict[tuple[str | None, ...], str] = {
    (_GPT2_RULE,): "gpt-2",
    (_LLAMA3_RULE,): _WHOLE_PIECES_RULE,
    (_LLAMA3_RULE.replace(r"\p{N}{1,3}", r"\p{N}"),): "qwen2",
    (_SINGLE_DIGITS, _GPT2_RULE): "smollm",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufVocabulary:
    """What tokenizer.ggml.* says, one entry for every row of the embedding, and the tokenizer that it stands for.

    scores: of a "llama" model; merges: of a "gpt2" model, best first. adds_space_prefix: None for "gpt2".
    reads_control_tokens: whether one spelt out in a text becomes its id. eos_ids: everything that ends a text, the id
    that the tokenizer itself puts there first. chat_templates: by name; the one that is used unasked is "default".
    For the comparison with llama.cpp, of transformers: ids_of_no_text: those of "", called as users do. added_tokens:
    their texts by id. conversations: the text and the ids of each of CONVERSATIONS; None where the template refuses it.
    """

    encoder: Encoder
    model: str
    splitting_rule: str
    tokens: tuple[str, ...]
    types: tuple[PieceType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unknown_id: int | None
    padding_id: int | None
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool | None
    reads_control_tokens: bool
    chat_templates: Mapping[str, str]
    ids_of_no_text: tuple[int, ...]
    added_tokens: Mapping[int, str]
    conversations: tuple[tuple[str, list[int]] | None, ...]

    @property
    def eos_id(self) -> int | None:
        return self.eos_ids[0] if self.eos_ids else None


def read_vocabulary(
    folder: Path, *, vocab_size: int, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> GgufVocabulary:
    """The vocabulary for `vocab_size` rows; config, generation: config.json and generation_config.json of the model.

    generate() of transformers stops at the ends of generation_config.json, or of config.json where it names none.
    Raises ConversionError if there is no tokenizer that llama.cpp can be told of, or if it has more ids than the model.
    """
    # tokenizer.model comes first if there are both: it has the scores, which a tokenizer.json made from it has not.
    is_sentencepiece = is_present(folder / "tokenizer.model")
    if not is_sentencepiece and not is_present(folder / "tokenizer.json"):
        raise ConversionError(
            f"{folder}: must hold tokenizer.model or tokenizer.json, got neither. Pass --tokenizer-model, "
            "or export the model with its tokenizer."
        )
    path = folder / ("tokenizer.model" if is_sentencepiece else "tokenizer.json")
    # Without tokenizer.json, the files beside tokenizer.model may add tokens; the folder is the tokenizer then.
    encoder = load_encoder(path if is_present(folder / "tokenizer.json") else folder)
    # bos, eos and the chat template are read as users get them from transformers, with the defaults of its class.
    tokenizer = load_with_transformers(folder)
    entries, facts = _read_sentencepiece(path) if is_sentencepiece else _read_byte_level(path)
    added = _list_added_tokens(tokenizer)
    entries = _complete(entries, added, vocab_size=vocab_size, where=path)
    adds_bos, adds_eos = _find_added_ends(tokenizer)
    _require_own_ids("bos_token_id", config.get("bos_token_id"), vocab_size)
    for source in (generation or {}, config):
        _require_own_ids("eos_token_id", source.get("eos_token_id"), vocab_size)
    return GgufVocabulary(
        encoder=encoder,
        tokens=tuple(entry.text for entry in entries),
        types=tuple(entry.type for entry in entries),
        scores=tuple(entry.score for entry in entries) if is_sentencepiece else None,
        bos_id=_first_id(tokenizer.bos_token_id, config.get("bos_token_id"), encoder.bos_id),
        eos_ids=_list_ends(generation or {}, config, tokenizer.eos_token_id, encoder.eod_id),
        unknown_id=_first_id(tokenizer.unk_token_id),
        padding_id=_first_id(tokenizer.pad_token_id),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        # sentencepiece never reads a control symbol in a text; a tokenizer.json does, unless split_special_tokens.
        reads_control_tokens=isinstance(encoder, HuggingFaceEncoder) and not encoder.splits_special_tokens,
        chat_templates=_name_templates(tokenizer.chat_template),
        ids_of_no_text=tuple(tokenizer("")["input_ids"]),
        added_tokens={token_id: token.text for token_id, token in added.items()},
        conversations=tuple(_render(tokenizer, conversation) for conversation in CONVERSATIONS),
        **facts,
    )


def _require_own_ids(name: str, value: Any, vocab_size: int) -> None:
    """Raise ConversionError for what is no id of the model; -1 and null say that there is none."""
    ids = value if isinstance(value, list) else [value]
    strange = [token_id for token_id in ids if token_id is not None and type(token_id) is not int]
    if strange := strange or [token_id for token_id in ids if token_id is not None and token_id >= vocab_size]:
        raise ConversionError(
            f"{name}: must be ids of the model's {vocab_size:,} tokens, got {', '.join(map(repr, strange[:5]))}. "
            "Correct generation_config.json and config.json."
        )


def _first_id(*candidates: Any) -> int | None:
    """The first that is an id; of a list of ids (Llama 3 ends a text in several ways) its first."""
    flat = (value[0] if isinstance(value, list) and value else value for value in candidates)
    return next((value for value in flat if isinstance(value, int) and value >= 0), None)


def _list_ends(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer_eos: int | None, eod: int | None
) -> tuple[int, ...]:
    """Every id that ends a text; the tokenizer's own comes first where it is one of them."""
    for value in (generation.get("eos_token_id"), config.get("eos_token_id"), tokenizer_eos, eod):
        ends = [end for end in (value if isinstance(value, list) else [value]) if isinstance(end, int) and end >= 0]
        if ends:
            return tuple(dict.fromkeys(sorted(ends, key=lambda end: end != tokenizer_eos)))  # sorted keeps the order
    return ()


def _name_templates(chat_template: Any) -> dict[str, str]:
    """transformers has a text, or a dictionary where a tokenizer has several templates."""
    if isinstance(chat_template, str):
        return {"default": chat_template}
    return dict(chat_template or {})


def _render(tokenizer: Any, conversation: list[dict[str, str]]) -> tuple[str, list[int]] | None:
    try:
        text = render_conversation(tokenizer, conversation)
    except ConversionError:
        return None
    return text, list(tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"])


def _find_added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer as users call it puts a token before a text, and one after it."""
    # Measured on a text, not read from settings: add_bos_token and the post-processor may both decide it.
    plain, called = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    is_before = bool(called) and called[:1] != plain[:1] and called[0] == tokenizer.bos_token_id
    is_after = bool(called) and called[-1:] != plain[-1:] and called[-1] == tokenizer.eos_token_id
    if len(called) != len(plain) + is_before + is_after:
        raise ConversionError(
            f"tokenizer: at most bos and eos may be added to a text, got {called} for {plain}. "
            "llama.cpp has no setting for others; change the tokenizer's template."
        )
    return is_before, is_after


def _read_sentencepiece(path: Path) -> tuple[list[Piece], dict[str, Any]]:
    """Entries by id. llama.cpp looks for user-defined symbols before it escapes spaces, so theirs are plain."""
    model = read_sentencepiece_model(path)
    if reasons := list_unsupported(model):
        raise ConversionError(
            *(
                f"{path}: llama.cpp must encode as this tokenizer does, got {reason}. "
                "Serve the model with transformers or vLLM."
                for reason in reasons
            )
        )
    entries = [
        Piece(piece.surface, piece.score, piece.type) if piece.type is PieceType.USER_DEFINED else piece
        for piece in model.pieces
    ]
    facts = {"model": "llama", "splitting_rule": "default", "merges": None, "adds_space_prefix": model.has_dummy_prefix}
    return entries, facts


def list_unsupported(model: SentencePieceModel) -> list[str]:
    """What of a SentencePiece model llama.cpp's "llama" tokenizer does not do, with the reason; empty if nothing."""
    types = {piece.type for piece in model.pieces}
    reasons = [
        (model.model_type != "bpe", f"model_type={model.model_type}: it merges by score, as BPE does"),
        (not model.has_byte_fallback, "byte_fallback=false: it writes unknown characters as bytes"),
        (bool(model.precompiled_charsmap), "a normaliser that rewrites characters: it has none"),
        (model.removes_extra_whitespaces, "remove_extra_whitespaces=true: it keeps every space"),
        (model.treats_whitespace_as_suffix, "treat_whitespace_as_suffix=true: a space leads its word"),
        (not model.escapes_whitespaces, "escape_whitespaces=false: it escapes every space"),
        (PieceType.UNUSED in types, "unused pieces: it does not split them again"),
    ]
    # All of them, so that a user sees at once whether a change of the tokenizer could help.
    return [reason for is_wrong, reason in reasons if is_wrong]


def _read_byte_level(path: Path) -> tuple[list[Piece], dict[str, Any]]:
    content = json.loads(path.read_bytes())
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConversionError(
            f"{path}: tokenizer must be byte-level BPE, got type={model.get('type')}, "
            f"byte_fallback={bool(model.get('byte_fallback'))}. Put the SentencePiece tokenizer.model beside it."
        )
    marks = {name: model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")}
    if any(marks.values()):
        raise ConversionError(
            f"{path}: the merges of llama.cpp know no marks of words and no chance, got {marks}. "
            "Serve the model with transformers or vLLM."
        )
    _require_normalizer(content.get("normalizer"), path)
    # Ids may have gaps; entries without a text get a name in _complete.
    entries = [Piece("", 0.0, PieceType.UNUSED)] * (max(model["vocab"].values(), default=-1) + 1)
    for text, token_id in model["vocab"].items():
        entries[token_id] = Piece(text, 0.0, PieceType.NORMAL)
    # tokenizers writes pairs; files of older versions have one text with a space between the two.
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    rule = _name_splitting_rule(content.get("pre_tokenizer") or {}, path)
    _require_whole_pieces(content, rule, path)
    return entries, {"model": "gpt2", "splitting_rule": rule, "merges": tuple(merges), "adds_space_prefix": None}


def _require_whole_pieces(content: Mapping[str, Any], rule: str, path: Path) -> None:
    """llama.cpp takes a word that is a piece without merging (ignore_merges) by the rule of Llama 3, and by no other.

    Where the file says otherwise, the two agree as long as merging gives every piece, which is tried for each.
    """
    model = content["model"]
    ignores = bool(model.get("ignore_merges"))
    if ignores == (rule == _WHOLE_PIECES_RULE):
        return
    merging = tokenizers.Tokenizer.from_str(json.dumps({**content, "model": {**model, "ignore_merges": False}})).model
    added = {token["content"] for token in content.get("added_tokens") or []}  # found in a text before it is split
    for text, token_id in model["vocab"].items():
        if text not in added and [token.id for token in merging.tokenize(text)] != [token_id]:
            raise ConversionError(
                f"{path}: words must be taken or merged as llama.cpp does by its rule {rule}, got "
                f"ignore_merges={ignores} and the piece {text!r}, which merging does not give. "
                "Serve the model with transformers or vLLM."
            )


def _require_normalizer(normalizer: Mapping[str, Any] | None, path: Path) -> None:
    """llama.cpp changes no character before it splits; NFC is let through, and its effect shown by the comparison."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if strange := [step.get("type") for step in steps if step.get("type") != "NFC"]:
        raise ConversionError(
            f"{path}: text must be left as it is or composed (NFC) before it is split, got {', '.join(strange)}. "
            "Serve the model with transformers or vLLM."
        )


def _name_splitting_rule(pre_tokenizer: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for how text is cut before merging; every step of the file must be part of that rule."""
    steps: Sequence[Mapping[str, Any]] = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    found = tuple(_describe_step(step) for step in steps)
    # Unless use_regex is false, ByteLevel itself splits by GPT-2's expression, which is then not written in the file.
    if found[-1:] == (_BYTES_AND_GPT2,):
        found = (*found[:-1], _GPT2_RULE, _BYTES)
    rule = SPLITTING_STEPS.get(found[:-1]) if found[-1:] == (_BYTES,) else None
    if rule is None:
        raise ConversionError(
            f"{path}: text must be split by the rule of {', '.join(SPLITTING_STEPS.values())}, "
            f"got {json.dumps(pre_tokenizer, ensure_ascii=False)[:300]}. Use llama.cpp's own converter."
        )
    return rule


def _describe_step(step: Mapping[str, Any]) -> str | None:
    """A step of a pre-tokenizer in the words of SPLITTING_STEPS; None for every other one."""
    match step:
        # The patterns of the table match every character, so keeping the matches or the cuts between them is one thing.
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return pattern
        case {"type": "Digits", "individual_digits": True}:
            return _SINGLE_DIGITS
        # The model gpt2 of a GGUF file has no space prefix (adds_space_prefix is None for it).
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return _BYTES_AND_GPT2 if step.get("use_regex", True) else _BYTES
    return None


def _list_added_tokens(tokenizer: Any) -> dict[int, Piece]:
    """The tokens that transformers finds in a text before it encodes the rest, from whichever file they come."""
    return {
        token_id: Piece(token.content, 0.0, PieceType.CONTROL if token.special else PieceType.USER_DEFINED)
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }


def _complete(entries: list[Piece], added: Mapping[int, Piece], *, vocab_size: int, where: Path) -> list[Piece]:
    """One entry a row: the tokenizer's own, tokens added to it, and names for rows that no token has.

    Of a SentencePiece model's own symbols the model says the type. A piece that a file beside it renames, or makes a
    token that is found before the rest is encoded, is what that file says, as every added token of a tokenizer.json.
    """
    num_ids = max([len(entries), *(token_id + 1 for token_id in added)])
    if num_ids > vocab_size:
        raise ConversionError(
            f"{where}: tokenizer must not have more ids than the model, got {num_ids} ids, vocab_size={vocab_size}. "
            "Pass the tokenizer that the model was trained with."
        )
    # list_unsupported requires byte fallback, so every accepted SentencePiece model has byte pieces; BPE has none.
    is_sentencepiece = any(entry.type is PieceType.BYTE for entry in entries)
    completed = list(entries) + [Piece("", 0.0, PieceType.UNUSED)] * (vocab_size - len(entries))
    for token_id, token in added.items():
        known = completed[token_id]
        if not is_sentencepiece or known.type in (PieceType.NORMAL, PieceType.UNUSED) or known.text != token.text:
            completed[token_id] = token
    return [
        # Every row of the embedding needs a token with a text of its own.
        entry if entry.text else Piece(f"[PAD{token_id}]", 0.0, PieceType.UNUSED)
        for token_id, entry in enumerate(completed)
    ]
