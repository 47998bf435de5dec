"""A folder gets its chat template, and the settings that conversations need; each change has a note."""

import json
from pathlib import Path

from megatron_hammer.tokenizer.export.chat_format import ChatFormat, write_chat_format


def write(folder: Path, **config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} | config))
    return folder


def read(folder: Path, name: str = "tokenizer_config.json") -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / name).read_bytes())
    return content


def test_a_template_alone_changes_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, split_special_tokens=True)
    assert write_chat_format(tmp_path, ChatFormat(template="{{ 'é' }}")) == ()
    assert read(tmp_path) == {"eos_token": "</s>", "split_special_tokens": True}
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ 'é' }}"


def test_control_tokens_are_found_and_the_end_of_a_turn_is_the_end(tmp_path: Path) -> None:
    write(tmp_path, split_special_tokens=True, eos_token={"content": "</s>"})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    chat = ChatFormat(template="", end_of_turn_ids=(5,), eos_token="<|e|>", control_tokens=("<|e|>", "<|s|>"))
    first, second = write_chat_format(tmp_path, chat)
    assert first.startswith("split_special_tokens is off")
    assert second.startswith("eos_token is <|e|>")
    changed = {"eos_token": "<|e|>", "split_special_tokens": False, "chat_control_tokens": ["<|e|>", "<|s|>"]}
    assert read(tmp_path) == changed
    assert read(tmp_path, "special_tokens_map.json") == {"eos_token": "<|e|>", "bos_token": "<s>"}
    assert write_chat_format(tmp_path, chat) == ()  # nothing is left to change
