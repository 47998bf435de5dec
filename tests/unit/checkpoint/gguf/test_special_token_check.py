"""llama.cpp's own answers about a tokenizer with added tokens, a template and a BOS; each that is lost is noticed."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.checkpoint.gguf import metadata as gguf_metadata
from megatron_hammer.checkpoint.gguf import verification as gguf_verification
from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
from megatron_hammer.checkpoint.gguf.tokenizer_check import LEADING, PREFIX, TURN_END
from megatron_hammer.errors import ConversionError
from megatron_hammer.post_training.templates.chat_export import build_chat_format
from megatron_hammer.post_training.templates.chat_template import load_chat_template
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import PieceType, read_sentencepiece_model
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer_folder
from tests.helpers.chat_tokenizers import CHAT_TOKENS, train_with_controls, write_byte_level
from tests.helpers.gguf_models import write_gguf_source
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import LLAMA_ADDED_TOKENS, write_llama_folder

pytest.importorskip("xllamacpp", reason="xllamacpp, the wheel of llama.cpp, is missing; pip install xllamacpp")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    model_path = train_model(folder.with_name("tokenizer.model"), **MODEL_OPTIONS["dummy prefix"])
    num_pieces = len(read_sentencepiece_model(model_path).pieces)
    write_gguf_source(folder, "llama", vocab_size=num_pieces + 7, num_hidden_layers=1, eos_token_id=[2, 9])
    for path in folder.glob("*token*"):
        path.unlink()
    return write_llama_folder(folder, model_path, num_pieces)


@pytest.fixture(autouse=True)
def without_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared elsewhere, and take longer than all others."""
    monkeypatch.setattr(gguf_verification, "MOST_THREADS", 1)
    monkeypatch.setattr(gguf_verification, "continue_prompts", lambda *arguments, **options: [])
    monkeypatch.setattr(gguf_verification, "find_obstacle", lambda num_parameters: "not asked here")


def convert(source: Path, target: Path, *, is_passed: bool | None = True) -> dict[str, str]:
    report = export_to_gguf(GgufOptions(load_dir=source, save_path=target, file_type="f32"))
    return {check.check: check.result for check in report.checks if check.is_passed is is_passed}


def test_ends_added_tokens_and_the_chat_template_are_llama_cpps_own(tmp_path: Path, source: Path) -> None:
    rows = convert(source, tmp_path / "model.gguf")
    # Where transformers is another tokenizer than sentencepiece, llama.cpp is as sentencepiece, and that is said.
    differences = re.findall(r"(\d+) with (.*?)(?:; |$)", rows["tokenizer, samples"])
    assert {cause: int(count) for count, cause in differences} == {LEADING: 4, PREFIX: 1}
    assert rows["tokens around a text"] == "bos before, as in transformers"
    assert rows["ends of a text"] == "llama.cpp stops at </s>, <0x06>, and for its name at <|im_end|>"
    num_added = len(LLAMA_ADDED_TOKENS) + 3  # <unk>, <s> and </s> are listed too
    assert rows["added tokens"].startswith(f"{num_added} of {num_added} are one token")


def test_other_tokens_of_a_conversation_are_told(tmp_path: Path, source: Path) -> None:
    # legacy=False: transformers puts the prefix before the text only, and llama.cpp after every control token.
    row = convert(source, tmp_path / "model.gguf", is_passed=None)["chat template"]
    assert "llama.cpp has other tokens: " in row
    assert "'<|im_start|>' '▁' " in row


TOKENIZERS = {
    "symbols": lambda folder: train_model(
        folder / "symbols.model", **MODEL_OPTIONS["plain"] | {"user_defined_symbols": list(CHAT_TOKENS)}
    ),
    "control pieces and a prefix": lambda folder: train_with_controls(folder / "prefix.model", "dummy prefix"),
    "byte-level": lambda folder: write_byte_level(folder / "tokenizer.json"),
}


@pytest.mark.parametrize(
    "kind, template",
    [
        ("symbols", "chatml"),
        ("control pieces and a prefix", "tiny_llm_zh"),
        ("byte-level", "llama3"),
        ("byte-level", "qwen"),
    ],
)
def test_conversations_of_exported_folders_have_the_same_tokens(tmp_path: Path, kind: str, template: str) -> None:
    tokenizer_path = TOKENIZERS[kind](tmp_path)
    chat = build_chat_format(tokenizer_path, load_chat_template(template))
    export_tokenizer_folder(tokenizer_path, tmp_path / "tokenizer", chat=chat)
    folder = write_gguf_source(
        tmp_path / "hf", vocab_size=load_encoder(tokenizer_path).vocab_size + 3, num_hidden_layers=1
    )
    for path in folder.glob("*token*"):
        path.unlink()
    shutil.copytree(tmp_path / "tokenizer", folder, dirs_exist_ok=True)
    rows = convert(folder, tmp_path / "model.gguf")
    assert rows["chat template"].startswith("equal, and so are 2 conversations")
    if kind == "symbols":  # <|im_end|> and <|eot_id|> alone, and in a text
        assert TURN_END in rows["tokenizer, samples"]


def test_a_tokenizer_that_puts_a_space_after_symbols_as_llama_cpp_does(tmp_path: Path, source: Path) -> None:
    """legacy=True, as Llama 1 and 2 say it: but not where a space is there already."""
    legacy = tmp_path / "hf"
    shutil.copytree(source, legacy)
    config = json.loads((legacy / "tokenizer_config.json").read_text())
    (legacy / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": True}))
    assert (
        "4 with a space prefix and a space at the start" in convert(legacy, tmp_path / "m.gguf")["tokenizer, samples"]
    )


def test_a_piece_that_a_file_makes_an_added_token_is_one(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    pieces = read_sentencepiece_model(folder / "tokenizer.model").pieces
    number, piece = next((n, p) for n, p in enumerate(pieces) if p.type is PieceType.NORMAL and p.text.isalpha())
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps(added | {piece.text: number}))
    assert convert(folder, tmp_path / "m.gguf")["added tokens"].startswith("8 of 8 are one token")


LOST: dict[str, tuple[dict[str, Any], str]] = {
    "bos": ({"adds_bos": False}, r"tokens around a text must agree, got \{'': \[\]"),
    "another bos": ({"bos_id": 5}, r"tokens around a text must agree, got \{'': \[5\]"),
    "end": ({"eos_ids": (2,)}, "ends of a text must agree, got llama.cpp does not stop at '<0x06>'"),
    "template": ({"chat_templates": {}}, "chat template must agree, got "),
    "added token": ({"types": PieceType.UNUSED}, "added tokens must agree, got "),
}


@pytest.mark.parametrize("name", LOST)
def test_twin_what_is_not_written_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, problem = LOST[name]
    describe = gguf_metadata._describe_tokenizer

    def describe_changed(writer, vocabulary):
        kinds = vocabulary.types
        changed = changes if "types" not in changes else {"types": (*kinds[:-4], changes["types"], *kinds[-3:])}
        describe(writer, dataclasses.replace(vocabulary, **changed))

    monkeypatch.setattr(gguf_metadata, "_describe_tokenizer", describe_changed)
    with pytest.raises(ConversionError, match=problem):
        convert(source, tmp_path / "model.gguf")
