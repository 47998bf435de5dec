"""Records become what the tokenizer makes of each, and every record that is left out has a line and a reason."""

import gzip
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_hammer.data.conversations.formats import read_conversation
from megatron_hammer.data.conversations.manifest import ConversationManifest
from megatron_hammer.data.conversations.pair import Conversations, open_conversations
from megatron_hammer.data.indexed.manifest import hash_file
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.post_training.conversations import preprocess as module
from megatron_hammer.post_training.conversations.block_encoder import RecordOptions
from megatron_hammer.post_training.conversations.preprocess import ConversationOptions, preprocess_conversations
from megatron_hammer.post_training.templates.chat_template import load_chat_template
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from tests.helpers.chat_tokenizers import train_with_symbols

Record = Mapping[str, Any]
ALPACA = [{"instruction": f"question {number} 👩‍👩‍👧", "output": "花落 " * (number % 7 + 1)} for number in range(60)]
TURN = [{"role": "user", "content": "the <|im_end|> fox"}, {"role": "assistant", "content": "jumps </s>"}]
CHATS = [{"messages": TURN * turns} for turns in (1, 2, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_with_symbols(tmp_path_factory.mktemp("model") / "symbols.model")


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def build(model: Path, folder: Path, **changes: Any) -> ConversationOptions:
    options = {"inputs": (str(folder / "in"),), "tokenizer_path": model, "template": "chatml"}
    return ConversationOptions(**options | {"output_prefix": folder / "out" / "chat"} | changes)


def read_all(stored: Conversations) -> list[tuple[list[int], list[int]]]:
    ends = stored.read_offsets()
    parts = [stored.select(start, stop) for start, stop in itertools.pairwise(ends)]
    return [(ids.tolist(), mask.tolist()) for ids, mask in parts]


def encode(model: Path, records: list[Any]) -> list[tuple[list[int], list[int]]]:
    tokenizer = ChatTokenizer(model, load_chat_template("chatml"))
    encoded = [tokenizer.encode(read_conversation(record)) for record in records]
    return [(part.ids.tolist(), part.mask.tolist()) for part in encoded]


def test_every_kind_of_file_is_read_in_order(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    lines = write_lines(folder / "a.jsonl", ALPACA).read_bytes()
    (folder / "b.json").write_text(json.dumps(CHATS, ensure_ascii=False))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), folder / "e.parquet")
    (folder / "notes.md").write_text("not data")
    manifest = preprocess_conversations(build(model, tmp_path))
    stored = open_conversations(tmp_path / "out" / "chat")
    assert read_all(stored) == encode(model, [*ALPACA, *CHATS, *ALPACA, *ALPACA, *CHATS])
    assert stored.manifest == manifest
    assert (manifest.num_records, manifest.num_documents, manifest.num_dropped_documents) == (186, 186, 0)
    assert manifest.num_learned_tokens == stored.masks.tokens.sum()
    assert [Path(source.path).name[0] for source in manifest.sources] == ["a", "b", "c", "d", "e"]
    assert manifest.ignored_files == (str(folder / "notes.md"),)
    prefix = str(tmp_path / "out" / "chat")
    hashes = [hash_file(Path(prefix + suffix)) for suffix in (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx")]
    assert hashes == [manifest.bin_sha256, manifest.idx_sha256, manifest.mask_bin_sha256, manifest.mask_idx_sha256]
    template = load_chat_template("chatml")
    assert (manifest.template.sha256, manifest.template.text) == (template.sha256, template.text)
    assert len({path.name for path in (tmp_path / "out").iterdir()}) == 5  # nothing else is left


def test_the_bytes_do_not_depend_on_the_workers(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*ALPACA, {"text": "no format"}, *CHATS])
    results = []
    for workers, block_bytes in ((1, 1 << 20), (2, 500)):
        prefix = tmp_path / f"out{workers}" / "chat"
        options = build(
            model, tmp_path, output_prefix=prefix, num_workers=workers, max_errors=1, block_bytes=block_bytes
        )
        preprocess_conversations(options)
        results.append({path.name: path.read_bytes() for path in prefix.parent.iterdir()})
    assert results[0] == results[1]
    assert len(results[0]) == 5


def test_a_second_run_replaces_the_first_and_does_not_read_it(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", CHATS)
    options = build(model, tmp_path, inputs=(str(tmp_path),), output_prefix=tmp_path / "chat")
    first = preprocess_conversations(options)
    (tmp_path / "chat.bin.partial").write_bytes(b"left by a kill")
    assert preprocess_conversations(options) == first
    assert first.ignored_files == ()


BAD = [
    {"messages": TURN[:1]},
    {"messages": [TURN[0], {"role": "assistant", "content": " "}]},
    {"text": "a document"},
    {"messages": [TURN[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
]
REASONS = {"bad-record": 1, "empty-turn": 1, "nothing-to-learn": 1, "refused-by-template": 1}


def test_what_is_left_out_has_a_line_and_a_reason(model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "a.jsonl", [CHATS[0], *BAD, CHATS[1]])
    with pytest.raises(DataError, match=r"at most 3 unusable records are allowed, got at least 4") as caught:
        preprocess_conversations(build(model, tmp_path, max_errors=3))
    places = [f"{path}:{number}" for number in (2, 3, 4, 5)]
    assert [line.split(": ")[0] for line in caught.value.problems[:4]] == places
    assert not list((tmp_path / "out").iterdir())
    manifest = preprocess_conversations(build(model, tmp_path, max_errors=4))
    assert manifest.num_dropped_by_reason == REASONS
    assert [line.split(": ")[0] for line in manifest.problems] == places
    assert (manifest.num_records, manifest.num_documents) == (6, 2)
    assert read_all(open_conversations(tmp_path / "out" / "chat")) == encode(model, CHATS[:2])


def run_with_limit(model: Path, folder: Path, overlong: Any, limit: int) -> ConversationManifest:
    write_lines(folder / "in" / "a.jsonl", CHATS)
    records = RecordOptions(max_length=limit, overlong=overlong)
    return preprocess_conversations(build(model, folder, records=records))


def test_long_conversations_are_dropped_cut_or_refused(model: Path, tmp_path: Path) -> None:
    whole = encode(model, CHATS)
    limit = len(whole[1][0])  # of two turns: the third has one more
    assert len(whole[0][0]) < limit < len(whole[2][0])
    manifest = run_with_limit(model, tmp_path, "drop", limit)
    assert manifest.num_dropped_by_reason == {"too-long": 1}
    assert manifest.options["max_length"] == limit
    assert f"at most {limit} tokens, got {len(whole[2][0])}" in manifest.problems[0]
    assert read_all(open_conversations(tmp_path / "out" / "chat")) == whole[:2]

    manifest = run_with_limit(model, tmp_path, "cut-turns", limit)
    cut = read_all(open_conversations(tmp_path / "out" / "chat"))[2]
    assert (manifest.num_documents, manifest.num_dropped_documents) == (3, 0)
    assert "2 of 3 answers are kept" in manifest.shortened[0]
    # The beginning of the whole conversation, up to the end of its second answer, which is learned.
    size = len(cut[0])
    assert cut == (whole[2][0][:size], whole[2][1][:size])
    assert (cut[0][-1], cut[1][-1]) == (manifest.template.end_of_turn_ids[0], 1)

    with pytest.raises(DataError, match=r"a\.jsonl:3: conversation must have at most"):
        run_with_limit(model, tmp_path, "error", limit)
    with pytest.raises(DataError, match=r"got none in 3 records \(3 too-long; the first: .*a\.jsonl:1: "):
        run_with_limit(model, tmp_path, "cut-turns", 4)


def test_conversations_that_end_without_an_answer_are_counted(model: Path, tmp_path: Path) -> None:
    messages = [*CHATS[0]["messages"], {"role": "user", "content": "and then?"}]
    write_lines(tmp_path / "in" / "a.jsonl", [{"messages": messages}, *CHATS])
    manifest = preprocess_conversations(build(model, tmp_path))
    ids, mask = read_all(open_conversations(tmp_path / "out" / "chat"))[0]
    assert manifest.num_without_last_answer == 1
    assert (len(ids) > len(encode(model, CHATS[:1])[0][0]), mask[-1]) == (True, 0)


def test_a_template_is_proven_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    text = load_chat_template("chatml").text.replace('{{- message.content + "<|im_end|>" }}', "{{- message.content }}")
    (tmp_path / "mine.jinja").write_text(text)
    write_lines(tmp_path / "in" / "a.jsonl", CHATS)
    with pytest.raises(ConfigError, match="the model would never learn to stop"):
        preprocess_conversations(build(model, tmp_path, template=str(tmp_path / "mine.jinja")))
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "in" / "a.jsonl", CHATS)
    plain = module._write

    def append_and_write(*arguments: Any) -> Any:
        with open(path, "a") as file:
            file.write("\n")
        return plain(*arguments)

    monkeypatch.setattr(module, "_write", append_and_write)
    with pytest.raises(DataError, match=r"a\.jsonl: file must not change while it is read"):
        preprocess_conversations(build(model, tmp_path, max_errors=1))
    assert not list((tmp_path / "out").iterdir())


def test_an_array_of_ids_has_the_type_of_the_vocabulary(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", CHATS)
    assert preprocess_conversations(build(model, tmp_path)).dtype == "uint16"
    assert open_conversations(tmp_path / "out" / "chat").ids.dtype == np.uint16
