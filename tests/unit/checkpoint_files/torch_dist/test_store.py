"""The raw contents of a torch_dist directory: every key, any part of any tensor; incomplete keys are named."""

import io
import itertools
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_hammer.checkpoint_files.torch_dist import store as torch_dist_store
from megatron_hammer.checkpoint_files.torch_dist.description import StoredChunk
from megatron_hammer.checkpoint_files.torch_dist.store import COMMON_STATE_KEY, TorchDistStore
from megatron_hammer.checkpoint_files.torch_dist.writer import open_checkpoint_writer
from megatron_hammer.errors import CheckpointError
from tests.helpers.messages import assert_problems, raises_problem
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint

QKV = "decoder.layers.self_attention.linear_qkv.weight"


def test_every_key_is_listed_with_its_shape_dtype_and_chunks(tmp_path):
    tensors = toy_llama_tensors(dtype=torch.bfloat16)
    store = TorchDistStore(write_toy_checkpoint(tmp_path, tensors, num_chunks=2))
    assert store.tensors.keys() == tensors.keys()  # the optimizer's too
    assert store.tensors[QKV].shape == (3, 40, 24)
    assert store.tensors[QKV].dtype == torch.bfloat16
    assert store.tensors[QKV].chunks == (
        StoredChunk((0, 0, 0), (2, 40, 12)),
        StoredChunk((0, 0, 12), (2, 40, 12)),
        StoredChunk((2, 0, 0), (1, 40, 12)),
        StoredChunk((2, 0, 12), (1, 40, 12)),
    )
    assert store.objects == ()
    assert store.common_state["iteration"] == 10
    assert store.read_object(COMMON_STATE_KEY)[0]["args"].hidden_size == 24
    assert (
        torch.serialization.load(io.BytesIO(store.read_object_bytes(COMMON_STATE_KEY)), weights_only=False)[0][
            "iteration"
        ]
        == 10
    )
    store.validate()


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("is_plain", [True, False])
def test_any_box_is_read_from_any_chunks(tmp_path, num_chunks, is_plain, monkeypatch):
    if not is_plain:  # as if every chunk were of a kind that only torch.load reads
        monkeypatch.setattr(torch_dist_store, "find_saved_tensor", lambda *args, **kwargs: None)
    tensor = torch.arange(3 * 8 * 10, dtype=torch.float32).reshape(3, 8, 10)
    store = TorchDistStore(write_toy_checkpoint(tmp_path, {"key": tensor}, num_chunks=num_chunks))
    for start, size in itertools.product(
        itertools.product((0, 1), (0, 3), (0, 5)), itertools.product((1, 2), (5,), (2, 5))
    ):
        box = tuple(slice(first, first + number) for first, number in zip(start, size, strict=True))
        assert torch.equal(store.read("key", start, size), tensor[box])
    assert torch.equal(store.read("key", (0, 0, 0), tensor.shape), tensor)


def test_all_incomplete_keys_are_named_but_only_among_those_asked_for(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    metadata = pickle.loads((target / ".metadata").read_bytes())
    metadata.state_dict_metadata["output_layer.weight"].chunks.pop()
    index = next(index for index in metadata.storage_data if index.fqn == QKV)
    del metadata.storage_data[index]
    (target / ".metadata").write_bytes(pickle.dumps(metadata))
    (target / "__1_0.distcp").write_bytes((target / "__1_0.distcp").read_bytes()[:-100])
    store = TorchDistStore(target)
    with pytest.raises(CheckpointError) as caught:
        store.validate()
    short, *unfinished = caught.value.problems
    assert "__1_0.distcp: must hold at least" in short
    assert_problems(
        sorted(sentence.split(": ")[1] for sentence in unfinished),
        (f"{QKV} must have 2880 elements", "got 1920"),
        ("output_layer.weight must have 1536 elements", "got 1152"),
    )
    with pytest.raises(CheckpointError) as caught:
        store.validate(["output_layer.weight"])
    assert [problem for problem in caught.value.problems if QKV in problem] == []


def test_a_chunk_of_another_dtype_or_shape_than_the_metadata_says_is_refused(tmp_path):
    target = write_toy_checkpoint(tmp_path, {"key": torch.randn(4, 6)}, num_chunks=1)
    metadata = pickle.loads((target / ".metadata").read_bytes())
    metadata.state_dict_metadata["key"].properties.dtype = torch.bfloat16
    (target / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"key must have a chunk of shape \(4, 6\) torch.bfloat16 at \(0, 0\), got"
    ):
        TorchDistStore(target).read("key", (0, 0), (4, 6))


def test_a_file_that_shrank_after_it_was_opened_is_named(tmp_path):
    target = write_toy_checkpoint(tmp_path, {"key": torch.randn(4, 6)}, num_chunks=1)
    store = TorchDistStore(target)
    (target / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: key must have the bytes that were saved"):
        store.read("key", (0, 0), (4, 6))
    (target / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: file must be readable, got No such file or directory"):
        store.read("key", (0, 0), (4, 6))


def test_common_state_that_is_no_dictionary_is_refused(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors(), common_state=7)
    with pytest.raises(CheckpointError, match="common state must be a dictionary, got int"):
        TorchDistStore(target).common_state  # noqa: B018


def test_a_link_out_of_the_checkpoint_is_refused_and_a_folder_of_links_is_read(tmp_path: Path) -> None:
    """The cache of Hugging Face's hub has links only, all to one folder."""
    blobs = write_toy_checkpoint(tmp_path / "blobs", toy_llama_tensors())
    snapshot, mixed = tmp_path / "snapshot", tmp_path / "mixed"
    for folder in (snapshot, mixed):
        folder.mkdir()
        for path in blobs.iterdir():
            (folder / path.name).symlink_to(path)
    assert TorchDistStore(snapshot).tensors == TorchDistStore(blobs).tensors
    (tmp_path / "linked").symlink_to(snapshot)
    TorchDistStore(tmp_path / "linked").validate()
    stray = min(mixed.glob("*.distcp"))
    for path in set(mixed.iterdir()) - {stray}:
        path.unlink()
        path.hardlink_to(blobs / path.name)
    with raises_problem(CheckpointError, f"{stray}: must lie in", f"a link to {blobs / stray.name}"):
        TorchDistStore(mixed)


def test_threads_that_need_one_file_hash_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = toy_llama_tensors()
    with open_checkpoint_writer(tmp_path, iteration=3) as writer:
        for key, tensor in tensors.items():
            writer.declare(key, tensor.shape, tensor.dtype)
            writer.write_chunk(key, [0] * tensor.dim(), tensor)
        writer.commit({"args": None, "iteration": 3})
    store, hashed = TorchDistStore(tmp_path / "iter_0000003"), []

    def find_damage(_directory: Path, hashes: dict[str, object]) -> list[str]:
        hashed.extend(hashes)
        time.sleep(0.05)  # the others ask meanwhile
        return []

    monkeypatch.setattr(torch_dist_store, "find_damage", find_damage)
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda key: store.read(key, [0] * tensors[key].dim(), tensors[key].shape), tensors)
    assert all(map(torch.equal, read, tensors.values()))
    assert hashed == ["__0_0.distcp"]
