"""Compares what llama.cpp loads beside pieces and merges with what transformers loads from the same folder.

Equal tokens of texts do not show it: which tokens are put around a text unasked, that every added token is one token,
and the chat template. llama.cpp is asked itself; what transformers says is in the vocabulary.
"""

import re
from collections.abc import Iterator
from itertools import zip_longest

from megatron_hammer.checkpoint.gguf.llama_cpp import LlamaCpp
from megatron_hammer.checkpoint.gguf.metadata import MAX_ENDS
from megatron_hammer.checkpoint.gguf.tokenizer import GgufVocabulary
from megatron_hammer.checkpoint.gguf.tokenizer_check import CONTROL_FORM
from megatron_hammer.checkpoint.verification.verify_conversion import CheckRow
from megatron_hammer.tokenizer.encoding.sentencepiece_model import PieceType
from megatron_hammer.tokenizer.export.check_loading import CONVERSATIONS

SAMPLE_TEXT = "Hello, world!"
# Names by which llama.cpp may take a token for an end, whatever the file says. Source: llama_vocab::impl::load.
END_NAME = re.compile(r"end|eo[mst]\b|eo[mst]_|return|call|flush", re.IGNORECASE)
MAX_NAMED_ENDS = 12  # each is a step of the model
MAX_SHOWN = 3


def check_special_tokens(llama_cpp: LlamaCpp, vocabulary: GgufVocabulary) -> Iterator[CheckRow]:
    """Yield a row each for what is put around a text, what ends it, added tokens, and the chat template."""
    yield _check_ends(llama_cpp, vocabulary)
    yield _check_stops(llama_cpp, vocabulary)
    yield _check_added_tokens(llama_cpp, vocabulary)
    yield _check_template(llama_cpp, vocabulary)


def _check_ends(llama_cpp: LlamaCpp, vocabulary: GgufVocabulary) -> CheckRow:
    """The text itself is compared elsewhere, so here it is llama.cpp's own ids of it."""
    before = [vocabulary.bos_id] if vocabulary.adds_bos else []
    after = [vocabulary.eos_id] if vocabulary.adds_eos else []
    plain = llama_cpp.tokenize(SAMPLE_TEXT)
    expected = {"": list(vocabulary.ids_of_no_text), SAMPLE_TEXT: [*before, *plain, *after]}
    got = {text: llama_cpp.tokenize(text, adds_ends=True) for text in expected}
    if got != expected:
        return CheckRow("tokens around a text", f"{got} for {expected}", False)
    name = None if vocabulary.bos_id is None else vocabulary.tokens[vocabulary.bos_id]
    if name is not None and (said := llama_cpp.read_properties()["bos_token"]) != name:
        return CheckRow("tokens around a text", f"bos_token is {said!r} for {name!r}", False)
    added = " and ".join(name for name, ids in (("bos before", before), ("eos after", after)) if ids)
    return CheckRow("tokens around a text", f"{added or 'none'}, as in transformers", True)


def _check_stops(llama_cpp: LlamaCpp, vocabulary: GgufVocabulary) -> CheckRow:
    """Each end is made the next token, after which llama.cpp must stop; so is each added token named like an end."""
    ends = vocabulary.eos_ids[:MAX_ENDS]
    names = {token_id: text for token_id, text in vocabulary.added_tokens.items() if END_NAME.search(text)}
    stops = {
        token_id: llama_cpp.complete([ends[0]], forced=token_id)["stop_type"] == "eos"
        for token_id in dict.fromkeys((*ends, *list(names)[:MAX_NAMED_ENDS]))
    }
    if missed := [vocabulary.tokens[token_id] for token_id in ends if not stops[token_id]]:
        return CheckRow("ends of a text", f"llama.cpp does not stop at {', '.join(map(repr, missed))}", False)
    more = [names[token_id] for token_id, is_end in stops.items() if is_end and token_id not in vocabulary.eos_ids]
    shown = ", ".join(vocabulary.tokens[token_id] for token_id in ends)
    others = f", and for its name at {', '.join(more)}" if more else ""
    return CheckRow("ends of a text", f"llama.cpp stops at {shown}{others}", True)


def _check_added_tokens(llama_cpp: LlamaCpp, vocabulary: GgufVocabulary) -> CheckRow:
    """A special token is found in a text where llama.cpp is asked to, as in a chat; the others always.

    llama.cpp makes control tokens of some symbols by their names, as <|im_end|>: those too are found in a chat.
    """
    got = {
        (token_id, text): llama_cpp.tokenize(text, reads_control_tokens=_is_control(vocabulary, token_id))
        for token_id, text in vocabulary.added_tokens.items()
    }
    wrong = [f"{text!r} is {ids} for {token_id}" for (token_id, text), ids in got.items() if ids != [token_id]]
    if wrong:
        more = f" and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
        return CheckRow("added tokens", "; ".join(wrong[:MAX_SHOWN]) + more, False)
    return CheckRow("added tokens", f"{len(got)} of {len(got)} are one token with the id of transformers", True)


def _is_control(vocabulary: GgufVocabulary, token_id: int) -> bool:
    is_symbol = vocabulary.types[token_id] is PieceType.USER_DEFINED
    return not is_symbol or CONTROL_FORM.fullmatch(vocabulary.tokens[token_id]) is not None


def _check_template(llama_cpp: LlamaCpp, vocabulary: GgufVocabulary) -> CheckRow:
    """Its text must be equal. What it renders is told: the two have each their own implementation of Jinja.

    So are tokens: llama.cpp puts a space prefix after every control token, transformers maybe before the text only.
    """
    expected = vocabulary.chat_templates.get("default")
    if expected is None:
        return CheckRow("chat template", "the tokenizer has none", None)
    got = llama_cpp.read_properties()["chat_template"]
    # Without the newline at the end of the file, which Jinja leaves out as well.
    if got.removesuffix("\n") != expected.removesuffix("\n"):
        return CheckRow("chat template", f"{got[:200]!r} for {expected[:200]!r}", False)
    # llama.cpp leaves out the token that it puts before every text.
    bos = vocabulary.tokens[vocabulary.bos_id] if vocabulary.adds_bos and vocabulary.bos_id is not None else ""
    for conversation, expected_prompt in zip(CONVERSATIONS, vocabulary.conversations, strict=True):
        if expected_prompt is None:
            continue
        rendered, ids = expected_prompt
        answer = llama_cpp.render(conversation)
        if answer.removeprefix(bos) != rendered.removeprefix(bos):
            difference = f"{answer[:200]!r} for {rendered[:200]!r}"
            return CheckRow("chat template", f"its text is equal; llama.cpp renders another prompt: {difference}", None)
        # As its server does with a prompt that it has rendered.
        got = llama_cpp.tokenize(answer, reads_control_tokens=True, adds_ends=True)
        if got != ids:
            first = next(place for place, pair in enumerate(zip_longest(got, ids)) if pair[0] != pair[1])
            shown, wanted = (
                " ".join(repr(vocabulary.tokens[token]) for token in side[max(0, first - 1) : first + 3])
                for side in (got, ids)
            )
            difference = f"{shown} for {wanted} at token {first}"
            return CheckRow("chat template", f"its text is equal; llama.cpp has other tokens: {difference}", None)
    return CheckRow("chat template", f"equal, and so are {len(CONVERSATIONS)} conversations rendered with it", True)
