from argparse import Namespace
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.post_training.conversations.preprocess import ConversationOptions, preprocess_conversations
from megatron_hammer.post_training.templates import model_template
from megatron_hammer.post_training.templates.model_template import open_chat_tokenizer
from tests.helpers.chat_tokenizers import train_with_symbols


def test_a_checkpoint_has_the_template_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer_path = train_with_symbols(tmp_path / "symbols.model")
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    manifest = preprocess_conversations(
        ConversationOptions(
            inputs=(str(tmp_path / "a.jsonl"),),
            tokenizer_path=tokenizer_path,
            template="chatml",
            bindings={"<|im_end|>": "<|eot_id|>"},
            output_prefix=tmp_path / "chat",
        )
    )
    saved = Namespace(data_path=[str(tmp_path / "chat")], train_data_path=None)
    monkeypatch.setattr(model_template, "open_checkpoint", lambda path: Namespace(args=saved))
    tokenizer, ends = open_chat_tokenizer(tmp_path / "run", tokenizer_path, chat_template=None)
    assert (tokenizer.template.text, ends) == (manifest.template.text, manifest.template.end_of_turn_ids)
    # What is asked for comes first, and a run on plain text has none.
    asked, _ = open_chat_tokenizer(tmp_path / "run", tokenizer_path, chat_template="chatml")
    assert asked.template.text != tokenizer.template.text
    saved.data_path = None
    with pytest.raises(ConfigError, match=r"run: model must have a chat_template.jinja, got none"):
        open_chat_tokenizer(tmp_path / "run", tokenizer_path, chat_template=None)
