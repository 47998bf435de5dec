"""Conversations come back as they were written, and files that do not belong together are named."""

import dataclasses
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_hammer.data.conversations.manifest import ConversationManifest, TemplateIdentity
from megatron_hammer.data.conversations.pair import ConversationWriter, mask_prefix, open_conversations
from megatron_hammer.data.indexed.manifest import TokenizerIdentity, read_manifest
from megatron_hammer.data.indexed.pair import IndexedWriter, bin_path, idx_path
from megatron_hammer.errors import DataError

IDS = [[5, 6, 7], [400, 2], [9, 9, 9, 9, 3]]
MASKS = [[0, 1, 1], [0, 1], [0, 0, 1, 0, 1]]
MANIFEST = ConversationManifest(
    sources=(),
    ignored_files=(),
    tokenizer=TokenizerIdentity(name="t.model", sha256="cd" * 32, vocab_size=401),
    options={"format": "auto"},
    dtype="uint16",
    num_documents=3,
    num_tokens=10,
    text_bytes=31,
    num_empty_documents=0,
    problems=("a.jsonl:4: nothing to learn.",),
    tool_version="0.1.0",
    template=TemplateIdentity(name="chatml", sha256="ab" * 32, text="{{ messages }}", end_of_turn_ids=(3,)),
    num_records=4,
    num_learned_tokens=5,
    num_dropped_by_reason={"nothing-to-learn": 1},
    shortened=(),
    num_without_last_answer=0,
)


def write(prefix: Path) -> None:
    with ConversationWriter(prefix, np.dtype(np.uint16)) as writer:
        ids, masks = ([np.array(part) for part in parts] for parts in (IDS, MASKS))
        writer.add(np.concatenate(ids[:2]), np.concatenate(masks[:2]).astype(np.uint8), [3, 2])
        writer.add(ids[2], masks[2].astype(np.uint8), [5])
        assert (writer.num_conversations, writer.num_tokens, writer.num_learned_tokens) == (3, 10, 5)
        writer.finish()
        writer.publish(MANIFEST)


def test_conversations_come_back(tmp_path: Path) -> None:
    write(tmp_path / "chat")
    stored = open_conversations(tmp_path / "chat")
    offsets = stored.read_offsets()
    assert len(stored) == 3
    assert stored.manifest == MANIFEST
    assert offsets.tolist() == [0, 3, 5, 10]
    for number, (ids, mask) in enumerate(zip(IDS, MASKS, strict=True)):
        found = stored.select(offsets[number], offsets[number + 1])
        assert (found[0].tolist(), found[1].tolist()) == (ids, mask)
    assert {path.name for path in tmp_path.iterdir()} == {
        "chat.bin",
        "chat.idx",
        "chat.manifest.json",
        "chat_loss_mask.bin",
        "chat_loss_mask.idx",
    }
    # What reads manifests of pairs, such as the check of a run's tokenizer, reads these too.
    plain = read_manifest(tmp_path / "chat")
    assert plain is not None
    assert plain.tokenizer == MANIFEST.tokenizer


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks"), ConversationWriter(tmp_path / "chat", np.dtype("uint16")) as writer:
        writer.add(np.array([1, 2]), np.array([0, 1], np.uint8), [2, 0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "ids, mask, lengths", [([1, 2], [0], [2]), ([1, 2], [0, 2], [2]), ([1, 2], [0, 1], [2, 0])], ids=str
)
def test_wrong_masks_and_empty_conversations_are_bugs(
    tmp_path: Path, ids: list[int], mask: list[int], lengths: list[int]
) -> None:
    with ConversationWriter(tmp_path / "chat", np.dtype(np.uint16)) as writer, pytest.raises(ValueError, match="masks"):
        writer.add(np.array(ids), np.array(mask, np.uint8), lengths)


def test_masks_of_other_conversations_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "chat")
    with IndexedWriter(mask_prefix(tmp_path / "chat"), np.dtype(np.uint8)) as writer:
        writer.add_documents(np.ones(10, np.uint8), np.array([2, 3, 5]))
    with pytest.raises(DataError, match="masks must have the lengths"):
        open_conversations(tmp_path / "chat")


def test_masks_of_another_type_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "chat")
    with IndexedWriter(mask_prefix(tmp_path / "chat"), np.dtype(np.int32)) as writer:
        writer.add_documents(np.ones(10, np.int32), np.array([3, 2, 5]))
    with pytest.raises(DataError, match=r"loss_mask\.bin: masks must be uint8, got int32"):
        open_conversations(tmp_path / "chat")


def test_conversations_of_several_sequences_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "chat")
    for prefix, dtype in ((tmp_path / "chat", np.uint16), (mask_prefix(tmp_path / "chat"), np.uint8)):
        with IndexedWriter(prefix, np.dtype(dtype)) as writer:
            writer.add_documents(np.ones(10, dtype), np.array([3, 2, 5]), np.array([2, 1]))
    with pytest.raises(DataError, match="each conversation must be one sequence"):
        open_conversations(tmp_path / "chat")


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "chat")
    for path in (idx_path(mask_prefix(tmp_path / "chat")), bin_path(tmp_path / "chat")):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name}: file does not exist"):
            open_conversations(tmp_path / "chat")
        path.write_bytes(content)
    (tmp_path / "chat.manifest.json").unlink()
    with pytest.raises(DataError, match="manifest must lie beside conversations"):
        open_conversations(tmp_path / "chat")


def test_the_manifest_of_a_corpus_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "chat")
    fields = {name: value for name, value in dataclasses.asdict(MANIFEST).items() if name != "template"}
    (tmp_path / "chat.manifest.json").write_bytes(orjson.dumps(fields))
    with pytest.raises(DataError, match="template must be given"):
        open_conversations(tmp_path / "chat")


def test_a_crash_while_publishing_leaves_nothing_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "chat")
    calls = iter(range(9))
    plain = IndexedWriter.publish

    def publish_the_masks_only(writer: IndexedWriter) -> None:
        if next(calls):
            raise KeyboardInterrupt
        plain(writer)

    monkeypatch.setattr(IndexedWriter, "publish", publish_the_masks_only)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "chat")
    with pytest.raises(DataError, match=r"chat\.idx: file does not exist"):
        open_conversations(tmp_path / "chat")
