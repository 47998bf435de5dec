"""Each thing that a chat template must fulfil is asked for: twins of ChatML that break one of them are refused."""

import json
import re
from pathlib import Path

import pytest

from megatron_hammer.data.conversations.formats import Conversation, ConversationError
from megatron_hammer.errors import ConfigError, DataError, HammerError
from megatron_hammer.post_training.templates.chat_template import SHIPPED, ChatTemplate, load_chat_template
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.post_training.templates.proof import prove_template
from tests.helpers.chat_tokenizers import train_with_controls, train_with_symbols, write_byte_level
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.toy_tokenizer import train_toy_tokenizer, write_llama_folder

CHATML = load_chat_template("chatml").text
ANSWER = '{{- message.content + "<|im_end|>" }}'
HEADER = '{{- "<|im_start|>" + message.role + "\\n" }}'


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def change(*pairs: tuple[str, str]) -> str:
    text = CHATML
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_templates_fulfil_everything(byte_level: Path, name: str) -> None:
    tokenizer = ChatTokenizer(byte_level, load_chat_template(name))
    end = {"llama3": "<|eot_id|>"}.get(name, "<|im_end|>")  # which is this tokenizer's eos_token
    assert prove_template(tokenizer) == (tokenizer.controls[end],)


def test_tokenizers_of_other_kinds_fulfil_it_too(tmp_path: Path) -> None:
    symbols, controls = train_with_symbols(tmp_path / "a.model"), train_with_controls(tmp_path / "b.model")
    folder = write_llama_folder(tmp_path / "llama", train_toy_tokenizer(tmp_path), 347)
    for path in (symbols, controls, folder):
        tokenizer = ChatTokenizer(path, load_chat_template("chatml"))
        assert prove_template(tokenizer) == (tokenizer.controls["<|im_end|>"],)


BROKEN = {
    "the end is not learned": (
        change((ANSWER + "\n        {%- end", "{{- message.content }}{% end"), ('{{- "\\n" }}', '{{- "<|im_end|>" }}')),
        r"control token inside the marks, got 'corge answer' at the end: the model would never learn to stop",
    ),
    "the end is text": (
        change((ANSWER + "\n        {%- endgeneration %}", '{{- message.content + "END" }}{% endgeneration %}')),
        r"inside the marks, got 'corge answerEND' at the end",
    ),
    "the mask covers everything": (
        "{% generation %}" + change(("{%- generation %}", ""), ("{%- endgeneration %}", "")) + "{% endgeneration %}",
        r"mark every turn|alone, got marks around other turns",
    ),
    "the mask covers nothing": (
        change(("{%- generation %}", "{%- generation %}{% endgeneration %}"), ("        {%- endgeneration %}\n", "")),
        r"mark the assistant's text, got '' between the marks",
    ),
    "the mask covers the header": (
        change((HEADER, '{% if message.role != "assistant" %}' + HEADER + "{% endif %}"), (ANSWER + "\n        {%- end",
                '{{- "<|im_start|>assistant\\n" + message.content + "<|im_end|>" }}{%- end')),
        r"begin the marks where its generation prompt ends",
    ),
    "only the last answer is marked": (
        change(("{%- generation %}", "{% if loop.last %}{% generation %}"), ("{%- endgeneration %}",
                '{% endgeneration %}{% else %}' + ANSWER + "{% endif %}")),
        r"mark every turn of the assistant, got 1 marks in 3 turns",
    ),
    "the generation prompt differs": (
        change(('{{- "<|im_start|>assistant\\n" }}', '{{- "<|im_start|>assistant: " }}')),
        r"got .*assistant: ' as a prompt and .*assistant\\n' before the mark",
    ),
    "the last turn differs": (
        change(('{{- "\\n" }}', '{{- "bye" if loop.last and message.role == "assistant" else "\\n" }}')),
        r"write a turn alike whatever follows it, got .*bye' at the end of 2 messages",
    ),
    "it touches the text": (
        change((HEADER, '{{- "<" + message.role + "<" }}'), ('"<|im_start|>assistant\\n"', '"<assistant<"')),
        r"part texts from what it writes itself, got one where the text .* makes a control token",
    ),
    "the system text touches the question": (
        change((HEADER, '{% if message.role == "system" %}{{ message.content }}{% continue %}{% endif %}'
                '{% if loop.index0 != 1 or loop.previtem.role != "system" %}' + HEADER + "{% endif %}")),
        r"part texts from what it writes itself",
    ),
    "the end begins the turn": (
        change((ANSWER + "\n        {%- end", '{{- "<|im_end|>" + message.content + "<|im_end|>" }}{%- end')),
        r"write <\|im_end\|> once in a turn, got '<\|im_end\|>corge answer",
    ),
    "it cannot render": (change(("messages %}", "nothing.at_all %}")), r"must render a question and its answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_refused(byte_level: Path, name: str) -> None:
    text, match = BROKEN[name]
    with pytest.raises(ConfigError, match=match):
        prove_template(ChatTokenizer(byte_level, ChatTemplate("mine", text)))


def test_a_template_may_refuse_system_texts(byte_level: Path) -> None:
    text = change((HEADER, '{% if message.role == "system" %}{{ raise_exception("none") }}{% endif %}' + HEADER))
    assert prove_template(ChatTokenizer(byte_level, ChatTemplate("mine", text)))


def test_a_template_that_leaves_system_texts_out_is_for_conversations_without(byte_level: Path) -> None:
    text = change(("for message in messages", 'for message in messages if message.role != "system"'))
    tokenizer = ChatTokenizer(byte_level, ChatTemplate("mine", text))
    assert prove_template(tokenizer)
    turn = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    tokenizer.encode(Conversation(turn))
    with pytest.raises(ConversationError, match="must write every text, got 'be brief'"):
        tokenizer.encode(Conversation(({"role": "system", "content": "be brief"}, *turn)))


@pytest.mark.parametrize(
    "text, name",
    [("strftime_now('%d %b %Y')", "strftime_now"), ("['Hi', 'Hello'] |random", "random"), ("lipsum(1)", "lipsum")],
)
def test_a_template_that_depends_on_the_clock_or_on_chance_is_refused(byte_level: Path, text: str, name: str) -> None:
    template = ChatTemplate("mine", f"{{{{ {text} }}}}\n{CHATML}")
    with pytest.raises(ConfigError, match=f"must render alike at any time, got {name}"):
        prove_template(ChatTokenizer(byte_level, template))
    prove_template(ChatTokenizer(byte_level, ChatTemplate("mine", f"{{# {text} #}}{CHATML}")))


@pytest.mark.parametrize("other", ["<|no_such|>", "<TOKENS_UNUSED_999>", "user"])
def test_a_token_that_the_tokenizer_lacks_cannot_be_bound(byte_level: Path, other: str) -> None:
    template = load_chat_template("chatml", {"<|im_start|>": other})
    with pytest.raises(
        DataError, match=rf"the token that --bind-token names, got {re.escape(other)}, which is no symbol"
    ):
        prove_template(ChatTokenizer(byte_level, template))


def test_missing_control_tokens_are_named_with_remedies(tmp_path: Path) -> None:
    path = train_toy_tokenizer(tmp_path)
    with pytest.raises(DataError) as caught:
        prove_template(ChatTokenizer(path, load_chat_template("chatml")))
    message = str(caught.value)
    assert "got none for <|im_end|> <|im_start|>, which would be several tokens" in message
    assert "--bind-token '<|im_end|>=TOKEN'" in message


def test_a_missing_variable_is_named(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    with pytest.raises(DataError, match="must have the bos_token that chat template llama3 writes") as caught:
        prove_template(ChatTokenizer(tmp_path / "tokenizer.json", load_chat_template("llama3")))
    assert isinstance(caught.value, HammerError)


def test_control_tokens_that_take_spaces_are_compared(byte_level: Path, tmp_path: Path) -> None:
    """A token with rstrip swallows the line end behind it, as transformers has it; ours do too."""
    definition = json.loads(byte_level.read_bytes())
    for token in definition["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = ChatTokenizer(tmp_path / "tokenizer.json", load_chat_template("chatml"))
    assert prove_template(tokenizer) == (tokenizer.controls["<|im_end|>"],)


@needs_shared_data
def test_hammerllm_chats_with_tokens_that_no_text_uses() -> None:
    template = load_chat_template("chatml", {"<|im_start|>": "<TOKENS_UNUSED_2>", "<|im_end|>": "<TOKENS_UNUSED_3>"})
    tokenizer = ChatTokenizer(SHARED_DATA / "tokenizer" / "hammerllm.model", template)
    assert prove_template(tokenizer) == (103030,)
    # Its 242 user-defined symbols stay what they are in texts.
    assert tokenizer.controls.keys() == {"<unk>", "<s>", "</s>", "<TOKENS_UNUSED_2>", "<TOKENS_UNUSED_3>"}
