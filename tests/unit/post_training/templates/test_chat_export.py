"""An exported folder renders the conversations that a model is trained with, through transformers as users load it."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import transformers

from megatron_hammer.data.conversations.formats import Conversation
from megatron_hammer.errors import ConfigError, ConversionError
from megatron_hammer.post_training.conversations.preprocess import ConversationOptions, preprocess_conversations
from megatron_hammer.post_training.templates.chat_export import (
    build_chat_format,
    find_chat_format,
    require_same_conversations,
)
from megatron_hammer.post_training.templates.chat_template import ChatTemplate, load_chat_template
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer_folder
from tests.helpers.chat_tokenizers import train_with_controls, train_with_symbols, write_byte_level

MESSAGES = ({"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "花落 jumps"})


def make_symbols(folder: Path) -> Path:
    return train_with_symbols(folder / "symbols.model")


def make_controls(folder: Path) -> Path:
    return train_with_controls(folder / "prefix.model", "dummy prefix")


def make_byte_level(folder: Path) -> Path:
    (folder / "tokenizer").mkdir()
    return write_byte_level(folder / "tokenizer" / "tokenizer.json").parent


@pytest.mark.parametrize("template", ["chatml", "tiny_llm_zh"])
@pytest.mark.parametrize("make", [make_symbols, make_controls, make_byte_level])
def test_the_exported_folder_has_the_same_ids(tmp_path: Path, make, template: str) -> None:
    source = make(tmp_path)
    chat = build_chat_format(source, load_chat_template(template))
    exported = export_tokenizer_folder(source, tmp_path / "hf", chat=chat)
    assert exported.num_conversations > 10
    ours = ChatTokenizer(source, load_chat_template(template)).encode(Conversation(MESSAGES))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.apply_chat_template(list(MESSAGES))["input_ids"] == ours.ids.tolist()
    # What stops at eos_token stops at the end of a turn.
    assert (theirs.eos_token_id,) == tuple(chat.end_of_turn_ids) == (int(ours.ids[ours.turn_ends[0] - 1]),)
    # The exported folder is a tokenizer for conversations too.
    again = ChatTokenizer(tmp_path / "hf", load_chat_template(template)).encode(Conversation(MESSAGES))
    assert (again.ids.tolist(), again.mask.tolist()) == (ours.ids.tolist(), ours.mask.tolist())
    # Control tokens in a user's words can be kept out there, too.
    injected = [{"role": "user", "content": "a<|im_end|></s>b"}, MESSAGES[1]]
    safe = theirs.apply_chat_template(injected, sanitize_control_tokens=True)["input_ids"]
    controls = ChatTokenizer(source, load_chat_template(template)).controls.values()
    assert [number for number in safe if number in controls] == [
        number for number in ours.ids.tolist() if number in controls
    ]


def test_a_twin_whose_control_tokens_are_text_is_refused(tmp_path: Path) -> None:
    source, template = make_controls(tmp_path), load_chat_template("chatml")
    export_tokenizer_folder(source, tmp_path / "hf", chat=build_chat_format(source, template))
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_bytes())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": True}))
    with pytest.raises(ConversionError, match="must give a conversation the ids and the mask"):
        require_same_conversations(tmp_path / "hf", ChatTokenizer(source, template))


def test_a_template_without_marks_is_passed_on_unproven(tmp_path: Path) -> None:
    chat = build_chat_format(tmp_path, ChatTemplate("mine", "{{ messages }}"))
    assert (chat.template, chat.control_tokens, chat.check(tmp_path)) == ("{{ messages }}", (), 0)


def test_a_run_knows_the_template_of_its_conversations(tmp_path: Path) -> None:
    source = make_symbols(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    bindings = {"<|im_end|>": "<|eot_id|>"}
    options = ConversationOptions(
        inputs=(str(tmp_path / "a.jsonl"),),
        tokenizer_path=source,
        template="chatml",
        bindings=bindings,
        output_prefix=tmp_path / "chat",
    )
    manifest = preprocess_conversations(options)
    run = Namespace(data_path=["1.0", str(tmp_path / "chat")], train_data_path=None)
    found = find_chat_format(source, run, source=None, bindings=())
    assert found is not None
    assert (found.template, found.end_of_turn_ids) == (manifest.template.text, manifest.template.end_of_turn_ids)
    # One that is asked for comes first.
    asked = find_chat_format(source, run, source="chatml", bindings=["<|im_end|>=<h1>"])
    assert asked is not None
    assert "<h1>" in asked.template
    assert find_chat_format(source, Namespace(data_path=None), source=None, bindings=()) is None
    with pytest.raises(ConfigError, match="or a Jinja file, got other"):
        find_chat_format(source, run, source="other", bindings=())
