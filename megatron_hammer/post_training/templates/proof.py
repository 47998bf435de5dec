"""What a chat template must fulfil with a tokenizer before anything is trained with it; each failure names its cause.

The field's silent failures: an end-of-turn token that is never learned, so that the model never stops; loss on the
user's words; a control token that is several tokens of text; a conversation that reads otherwise once it continues.
"""

import re
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from megatron_hammer.data.conversations.formats import Conversation, ConversationError
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.post_training.templates.chat_template import CONTROL_FORM
from megatron_hammer.post_training.templates.chat_tokenizer import ASSISTANT, PLAIN_PROBE, ChatTokenizer

QUESTION, ANSWER, SYSTEM = "quux question", "corge answer", "grault system"

JINJA_COMMENT = re.compile(r"{#.*?#}", re.DOTALL)
# What Jinja and transformers offer that is another text each time: a date, a random choice, a random text.
CHANGING = re.compile(r"\b(strftime_now|lipsum)\b|\|\s*(random)\b")


def prove_template(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Return the ids that end a turn of the assistant.

    Raises ConfigError for a template, and DataError for a tokenizer, with every problem that can be told apart.
    """
    name = tokenizer.template.name
    try:
        tokenizer.render(PLAIN_PROBE)
    except ConversationError as error:
        raise ConfigError(f"{name}: chat template must render a question and its answer, got: {error}") from error
    probes = list_probes(tokenizer)
    if problems := [*_list_missing_variables(tokenizer), *_list_missing_tokens(tokenizer, probes)]:
        raise DataError(*problems)
    if changing := CHANGING.search(JINJA_COMMENT.sub("", tokenizer.template.text)):
        raise ConfigError(
            f"{name}: chat template must render alike at any time, got {changing[1] or changing[2]}. Write a fixed "
            "text, or none."
        )
    # One group after another: with wrong marks, for instance, the beginnings of turns mean nothing.
    for problems in (
        [problem for probe in probes for problem in _list_mask_problems(tokenizer, probe)],
        [problem for probe in probes for problem in _list_prefix_problems(tokenizer, probe)],
        _list_boundary_problems(tokenizer, probes[-1]),
    ):
        if problems:
            raise ConfigError(*dict.fromkeys(problems))
    ends: set[int] = set()
    for probe in probes:
        try:
            encoded = tokenizer.encode(probe)
        except ConversationError as error:
            raise ConfigError(f"{name}: {error}") from error
        ends |= {int(encoded.ids[end - 1]) for end in encoded.turn_ends}
        _require_plain_ids(tokenizer, probe, encoded.ids)
    return tuple(sorted(ends))


def list_probes(tokenizer: ChatTokenizer) -> list[Conversation]:
    """Short conversations that the template renders; it may refuse system texts."""
    turn = ({"role": "user", "content": QUESTION}, {"role": ASSISTANT, "content": ANSWER})
    system = {"role": "system", "content": SYSTEM}
    probes = []
    for messages in (turn, turn * 3, (system, *turn, *turn)):
        with suppress(ConversationError):
            rendered, _ = tokenizer.render(Conversation(messages))
            # One that leaves system texts out refuses the conversations that have them.
            if messages[0] is not system or SYSTEM in rendered:
                probes.append(Conversation(messages))
    return probes


def _list_missing_variables(tokenizer: ChatTokenizer) -> list[str]:
    """Jinja writes nothing for a variable that it lacks."""
    import jinja2.meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    source = _compile_jinja_template(tokenizer.template.text).environment.parse(tokenizer.template.text)
    needed = jinja2.meta.find_undeclared_variables(source) & {"bos_token", "eos_token"}
    return [
        f"{tokenizer.encoder.path}: tokenizer must have the {variable} that chat template {tokenizer.template.name} "
        "writes, got none. Name it in tokenizer_config.json, or use another template."
        for variable in sorted(needed - tokenizer.special_tokens.keys())
    ]


def _list_missing_tokens(tokenizer: ChatTokenizer, probes: list[Conversation]) -> Iterator[str]:
    where, bound = f"{tokenizer.encoder.path}: tokenizer must have", tokenizer.template.bound_tokens
    for token in bound:
        if token not in tokenizer.controls:
            yield f"{where} the token that --bind-token names, got {token}, which is no symbol of it. Name another."
    written = {token for probe in probes for token in CONTROL_FORM.findall(tokenizer.render(probe)[0])}
    if missing := sorted(written - tokenizer.controls.keys() - set(bound)):
        yield (
            f"{where} the control tokens of chat template {tokenizer.template.name}, got none for "
            f"{' '.join(missing)}, which would be several tokens of text. Bind them to tokens that it has and no text "
            f"uses (--bind-token '{missing[0]}=TOKEN'), or add them: hammer tokenizer merge --mode vocabulary with "
            "--user-defined-symbols-file, then hammer resize-embeddings."
        )


def _list_mask_problems(tokenizer: ChatTokenizer, probe: Conversation) -> Iterator[str]:
    where = f"{tokenizer.template.name}: chat template must"
    rendered, spans = tokenizer.render(probe)
    answers = [number for number, message in enumerate(probe.messages) if message["role"] == ASSISTANT]
    if len(spans) != len(answers):
        yield f"{where} mark every turn of the assistant, got {len(spans)} marks in {len(answers)} turns. Move them."
        return
    for number, (start, end) in zip(answers, spans, strict=True):
        said = rendered[start:end]
        if QUESTION in said or SYSTEM in said:
            yield f"{where} mark the assistant's text alone, got marks around other turns too. Move them."
            continue
        header, _ = tokenizer.render(Conversation(probe.messages[:number]), add_generation_prompt=True)
        if ANSWER not in said:
            yield f"{where} mark the assistant's text, got {said!r} between the marks. Move them."
        elif not (ends := [token for token in tokenizer.controls if said.endswith(token)]):
            yield (
                f"{where} end the assistant's turn with a control token inside the marks, got {said[-20:]!r} at the "
                "end: the model would never learn to stop. Write its end-of-turn token before {% endgeneration %}."
            )
        elif said.count(token := max(ends, key=len)) > 1:
            yield f"{where} write {token} once in a turn, got {said[:40]!r}: the model would stop there. Keep the last."
        elif header != rendered[:start]:
            yield (
                f"{where} begin the marks where its generation prompt ends, got {header[-40:]!r} as a prompt and "
                f"{rendered[:start][-40:]!r} before the mark. Move {{% generation %}}, or the header before it."
            )


def _list_prefix_problems(tokenizer: ChatTokenizer, probe: Conversation) -> Iterator[str]:
    whole, _ = tokenizer.render(probe)
    for number, message in enumerate(probe.messages, start=1):
        if message["role"] == ASSISTANT:
            part, _ = tokenizer.render(Conversation(probe.messages[:number]))
            if not whole.startswith(part):
                yield (
                    f"{tokenizer.template.name}: chat template must write a turn alike whatever follows it, got "
                    f"{part[-40:]!r} at the end of {number} messages, which {len(probe.messages)} do not begin with. "
                    "Write nothing that depends on being last."
                )


def _list_boundary_problems(tokenizer: ChatTokenizer, probe: Conversation) -> list[str]:
    """Texts that end with the beginning of a control token, and begin with the end of one, must stay text.

    Where a template writes `<` or `>` directly beside a text, or one text directly behind another, as a system text
    before the first question, both together could be such a token.
    """
    expected = tokenizer.control_sequence(probe)
    for token in tokenizer.controls:
        for cut in range(1, len(token)):
            text = f"{token[cut:]} x {token[:cut]}"
            messages = tuple(message | {"content": text} for message in probe.messages)
            if tokenizer.control_sequence(Conversation(messages)) != expected:
                return [
                    f"{tokenizer.template.name}: chat template must part texts from what it writes itself, got one "
                    f"where the text {text!r} makes a control token {token}. Write a line end between them."
                ]
    return []


def _require_plain_ids(tokenizer: ChatTokenizer, probe: Conversation, ids: np.ndarray) -> None:
    """Raise DataError where the ids are not those that transformers would find in the rendered text."""
    expected = tokenizer.plain.encode(tokenizer.render(probe)[0], add_special_tokens=False).ids
    if ids.tolist() != expected:
        raise DataError(
            f"{tokenizer.encoder.path}: tokenizer must encode a conversation alike whether its control tokens are "
            f"found in text or put there, got {ids.tolist()[:12]} for {expected[:12]}. Set lstrip, rstrip and "
            "normalized of its control tokens to false."
        )
