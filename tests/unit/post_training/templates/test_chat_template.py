"""A template is found by name or path, and what is no template of conversations is named."""

from pathlib import Path

import pytest

from megatron_hammer.data.conversations.formats import Conversation, ConversationError
from megatron_hammer.errors import ConfigError
from megatron_hammer.post_training.templates.chat_template import ChatTemplate, load_chat_template, parse_bindings

MARKED = "{% generation %}{{ messages[0].content }}<|end|>{% endgeneration %}"
TURN = Conversation(({"role": "assistant", "content": "hi"},))


def test_a_template_is_known_by_its_text(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(MARKED)
    template = load_chat_template(tmp_path / "mine.jinja")
    assert template == ChatTemplate("mine.jinja", MARKED)
    assert template.render(TURN, {}) == ("hi<|end|>", [(0, 9)])
    assert load_chat_template("tiny-llm-zh").name == "tiny_llm_zh"
    assert load_chat_template("chatml").sha256 != load_chat_template("chatml", {"<|im_end|>": "</s>"}).sha256


def test_tokens_can_be_exchanged() -> None:
    exchanged = load_chat_template("chatml", {"<|im_start|>": "<|im_end|>", "<|im_end|>": "<|im_start|>"})
    assert exchanged.render(TURN, {})[0] == "<|im_end|>assistant\nhi<|im_start|>\n"


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chatml, llama3, qwen, tiny_llm_zh or a Jinja file, got alpaca"):
        load_chat_template("alpaca")
    (tmp_path / "plain.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ConfigError, match=r"plain\.jinja: chat template must mark.*got no {% generation %}"):
        load_chat_template(tmp_path / "plain.jinja")
    with pytest.raises(ConfigError, match=r"bind-token: chatml must write the token, got <\|user\|>"):
        load_chat_template("chatml", {"<|user|>": "<h1>"})


def test_errors_of_a_template_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="mine:2: chat template must be Jinja"):
        ChatTemplate("mine", MARKED + "\n{% if %}").render(TURN, {})
    with pytest.raises(ConversationError, match="must render it, got: no such turn") as caught:
        ChatTemplate("mine", MARKED + "{{ raise_exception('no such turn') }}").render(TURN, {})
    assert caught.value.reason == "refused-by-template"


@pytest.mark.parametrize(
    "attack",
    ["messages.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os.system('true')", "open('a')"],
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(ConversationError, match="must render it"):
        ChatTemplate("mine", MARKED + "{{ " + attack + " }}").render(TURN, {})


def test_bindings_are_pairs() -> None:
    assert parse_bindings(["<|a|>=<b>", "<|c|>=="]) == {"<|a|>": "<b>", "<|c|>": "="}
    for pairs in (["<|a|>"], ["=b"], ["a="], ["a=b", "a=c"], ["a=c", "b=c"]):
        with pytest.raises(ConfigError, match="bind-token: must be TOKEN=OTHER, each of them once"):
            parse_bindings(pairs)
