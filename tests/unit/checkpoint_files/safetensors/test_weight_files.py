"""Weights of a Hugging Face folder in every form that it may have; all its faults are named at once."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_hammer.checkpoint_files.safetensors.weight_files import open_hf_weights
from megatron_hammer.errors import ConversionError

TENSORS = {
    "model.embed.weight": torch.randn(7, 3, dtype=torch.bfloat16),
    "model.half": torch.randn(5, dtype=torch.float16),
    "model.norm": torch.randn(4),
    "model.empty": torch.empty(0, 2),
    "lm_head.weight": torch.randn(11, 2, 3),
}
SHARDS = {"one": ("model.embed.weight", "model.half"), "two": ("model.norm", "model.empty", "lm_head.weight")}


def write_shards(folder, suffix, save):
    files = {f"{stem}.{suffix}": names for stem, names in SHARDS.items()}
    for file_name, names in files.items():
        save({name: TENSORS[name] for name in names}, folder / file_name)
    weight_map = {name: file_name for file_name, names in files.items() for name in names}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_old_format(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.fixture
def sharded(tmp_path):
    write_shards(tmp_path, "safetensors", save_file)
    return tmp_path


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda folder: save_file(TENSORS, folder / "model.safetensors"), id="safetensors"),
        pytest.param(lambda folder: write_shards(folder, "safetensors", save_file), id="safetensors-shards"),
        pytest.param(lambda folder: torch.save(TENSORS, folder / "pytorch_model.bin"), id="bin"),
        pytest.param(lambda folder: write_shards(folder, "bin", torch.save), id="bin-shards"),
        pytest.param(lambda folder: save_old_format(TENSORS, folder / "pytorch_model.bin"), id="bin-before-zip"),
    ],
)
def test_every_form_of_folder_gives_the_same_tensors(tmp_path, write):
    write(tmp_path)
    weights = open_hf_weights(tmp_path)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert weights.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    assert weights.num_bytes == 7 * 3 * 2 + 5 * 2 + 4 * 4 + 11 * 2 * 3 * 4
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor), name
        assert weights.path_of(name).is_file()


def test_views_and_shared_storage_of_a_bin_file_are_read_as_they_are(tmp_path):
    whole = torch.randn(6, 5)
    views = {"whole": whole, "column": whole[:, 2:4], "transposed": whole[1:].t(), "again": whole}
    torch.save(views, tmp_path / "pytorch_model.bin")
    weights = open_hf_weights(tmp_path)
    for name, tensor in views.items():
        assert torch.equal(weights.read(name), tensor), name


def test_unaligned_data_is_read(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 4 + 4)
    data = torch.tensor([1.5, -2.0, 3.25])
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    weights = open_hf_weights(tmp_path)
    assert (8 + len(header)) % 4 == 1
    assert torch.equal(weights.read("w"), data)


def test_writing_to_a_tensor_leaves_the_file_alone(sharded):
    weights = open_hf_weights(sharded)
    weights.read("model.norm").zero_()
    assert torch.equal(weights.read("model.norm"), TENSORS["model.norm"])


def test_reading_a_whole_file_maps_one_tensor_at_a_time(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.ones(1 << 12) for number in range(8)}, path)
    weights = open_hf_weights(tmp_path)
    num_maps = []
    for name in weights.shapes:
        tensor = weights.read(name)
        num_maps.append(Path("/proc/self/maps").read_text().count(str(path)))
        assert tensor.sum() == 1 << 12
        del tensor
    assert num_maps == [1] * 8
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_every_fault_of_a_sharded_folder_is_named_at_once(sharded):
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())["weight_map"]
    index["model.lost"] = "one.safetensors"
    index["model.gone"] = "three.safetensors"
    index["model.cut"] = "four.safetensors"
    del index["model.norm"]
    save_file({"model.half": TENSORS["model.half"], "model.cut": TENSORS["model.norm"]}, sharded / "four.safetensors")
    save_file({"model.half": TENSORS["model.half"], "new": TENSORS["model.norm"]}, sharded / "five.safetensors")
    index["new"] = "five.safetensors"
    (sharded / "four.safetensors").write_bytes((sharded / "four.safetensors").read_bytes()[:-1])
    index_path.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ConversionError) as caught:
        open_hf_weights(sharded)
    problems = "\n".join(caught.value.problems)
    for sentence in (
        "four.safetensors: file must be complete safetensors, got ",
        "three.safetensors: shard does not exist. Fetch the whole folder.",
        "one.safetensors: must hold model.lost, as model.safetensors.index.json says, got no such tensor.",
        "index.json: must name every tensor, got none for model.norm of two.safetensors.",
        "model.half must be in one file, got it in five.safetensors, one.safetensors.",
    ):
        assert sentence in problems
    assert len(caught.value.problems) == 5


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(ConversionError, match="nowhere: model folder does not exist"):
        open_hf_weights(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"or the index of its shards, got \['config.json'\]"):
        open_hf_weights(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_file_that_is_not_an_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match="index must map every tensor to a file beside it, got "):
        open_hf_weights(tmp_path)


def test_headers_that_contradict_themselves_are_named(tmp_path):
    entries = {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        "b": {"dtype": "F4", "shape": [4], "data_offsets": [8, 10]},
    }
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(10))
    with pytest.raises(ConversionError, match=r"a must have 12 bytes, as its shape and dtype say, got 8\b") as caught:
        open_hf_weights(tmp_path)
    assert "b must be of a dtype that PyTorch has, got F4" in str(caught.value)


class Intruder:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04 truncated", "file must be complete weights of torch.save, got "),
        (
            {"weights": torch.ones(2), "code": Intruder()},
            "file must be complete weights of torch.save, got type print is not on the list",
        ),
        ({"weights": torch.ones(2), "epoch": 3}, "file must hold tensors by name, got int under 'epoch'"),
        ([torch.ones(2)], "file must hold tensors by name, got list"),
    ],
)
def test_a_bin_file_that_is_not_weights_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConversionError, match=f"pytorch_model.bin: {message}"):
        open_hf_weights(tmp_path)
    assert "this must not run" not in capsys.readouterr().out


def test_a_file_that_becomes_shorter_is_noticed(sharded):
    weights = open_hf_weights(sharded)
    (sharded / "two.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"two.safetensors: lm_head.weight must end at byte "):
        weights.read("lm_head.weight")


HEADERS = {
    "one tensor twice, another missing": (
        {"a": [0, 8], "b": [0, 8]},
        "b at bytes 0 to 8, where the data before it ends",
    ),
    "a hole": ({"a": [0, 4], "b": [8, 16]}, "b at bytes 8 to 16, where the data before it ends at 4"),
    "a negative offset": ({"a": [-8, 8], "b": [8, 16]}, "-8 in place of a size or an offset of a"),
    "an offset of fractions": ({"a": [0, 8.0], "b": [8, 16]}, r"8\.0 in place of a size or an offset of a"),
    "a huge offset": ({"a": [0, 10**40], "b": [8, 16]}, "1000000000+ in place of a size or an offset of a"),
    "no offsets": ({"a": [], "b": [0, 16]}, ""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_one_sentence(name, tmp_path):
    offsets, message = HEADERS[name]
    header = json.dumps({key: {"dtype": "F32", "shape": [2], "data_offsets": pair} for key, pair in offsets.items()})
    write_header(tmp_path, header.encode())
    with pytest.raises(
        ConversionError, match=rf"model\.safetensors: file must be complete safetensors, got .*{message}"
    ):
        open_hf_weights(tmp_path)


def test_a_nested_header_is_one_sentence(tmp_path):
    write_header(tmp_path, b'{"a":' * 100_000)
    with pytest.raises(ConversionError, match=r"model\.safetensors: file must be complete safetensors, got "):
        open_hf_weights(tmp_path)


def write_header(folder: Path, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header + bytes(16)
    (folder / "model.safetensors").write_bytes(content)


def test_one_file_beside_shards_is_refused_and_beside_an_index_alone_is_read(sharded):
    save_file(TENSORS, sharded / "model.safetensors")
    with pytest.raises(ConversionError, match=r"one file or in shards, got model\.safetensors and one\.safetensors"):
        open_hf_weights(sharded)
    for name in SHARDS:
        (sharded / f"{name}.safetensors").unlink()
    assert open_hf_weights(sharded).shapes.keys() == TENSORS.keys()
