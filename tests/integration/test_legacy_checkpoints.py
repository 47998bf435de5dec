"""Legacy checkpoints of Megatron's own loop have the tensors and the exports of torch_dist of the same run."""

import json
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.checkpoint.surgery.training_checkpoint import open_training_checkpoint
from megatron_hammer.checkpoint_files.legacy.tensor_parallel import COLUMN, GATED_COLUMN
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.errors import ConversionError
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, train, write_toy_data

pytestmark = pytest.mark.integration

TIED = tuple(flag for flag in TOY_MODEL if flag != "--untie-embeddings-and-output-weights")
BF16 = ("--precision", "bf16")
MIXED = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "80", "--moe-layer-freq", "[0]+[1]*3"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-dtype", "fp32", "--moe-router-enable-expert-bias"),
    *("--moe-shared-expert-intermediate-size", "160", "--moe-token-dispatcher-type", "alltoall"),
)
LAYOUTS = {
    "tp2-pp2-vp2-tied": (
        4,
        *(*TIED, *BF16, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2", "--overlap-grad-reduce", "--ddp-bucket-size", "20000"),
    ),
    "ep2-tp2-plain-optimizer-dense-layer-expert-bias": (
        2,
        *(*TOY_MODEL, *MIXED, *BF16, "--tensor-model-parallel-size", "2", "--no-distributed-optimizer"),
        *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
    ),
}


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("data")
    data = write_toy_data(folder / "data", num_documents=30)
    return ("--data-path", data, "--split", "1,0,0", "--data-cache-path", str(folder / "cache"))


@pytest.fixture(scope="module", params=LAYOUTS)
def both_formats(request, tmp_path_factory, data_flags) -> dict[str, Path]:
    """The same two steps saved in either format: a run on CPU repeats bit for bit."""
    folder = tmp_path_factory.mktemp(request.param)
    processes, *flags = LAYOUTS[request.param]
    for ckpt_format in ("torch", "torch_dist"):
        save = ("--train-iters", "2", "--save", str(folder / ckpt_format), "--ckpt-format", ckpt_format)
        schedule = (*TOY_SCHEDULE, "--lr-warmup-iters", "0")
        train(processes, folder / f"{ckpt_format}.jsonl", *flags, *data_flags, *schedule, *save)
    return {ckpt_format: folder / ckpt_format for ckpt_format in ("torch", "torch_dist")}


@pytest.mark.parametrize("weights", ["model", "master"])
def test_it_reads_equal_to_torch_dist_of_the_same_run(both_formats, weights):
    legacy, sharded = (open_checkpoint(path, weights=weights) for path in both_formats.values())
    assert type(legacy) is not type(sharded)
    assert legacy.tensors.keys() == sharded.tensors.keys()
    assert legacy.iteration == sharded.iteration == 2
    dtype = torch.bfloat16 if weights == "model" else torch.float32
    for name, stored in sharded.tensors.items():
        expected = torch.float32 if name.endswith("expert_bias") else dtype  # a buffer, which has no other copy
        assert (legacy.tensors[name].shape, legacy.tensors[name].dtype) == (stored.shape, expected)
        assert torch.equal(legacy.read(name), sharded.read(name)), name


def test_surgery_sees_the_keys_of_torch_dist(both_formats):
    legacy, sharded = (open_training_checkpoint(path) for path in both_formats.values())
    assert {key: stored.shape for key, stored in legacy.model.items()} == {
        key: stored.shape for key, stored in sharded.model.items()
    }
    assert set(sharded.list_model_objects()) <= set(legacy.list_model_objects())


def test_halves_of_the_gated_mlp_merged_as_plain_rows_are_noticed(both_formats):
    """The twin: fc1 of a rank is gate and up of that rank, not a block of rows."""
    legacy, sharded = (open_checkpoint(path) for path in both_formats.values())
    cut = [name for name, stored in legacy.tensors.items() if stored.layout is GATED_COLUMN and len(stored.parts) > 1]
    for name in cut:
        object.__setattr__(legacy.tensors[name], "layout", COLUMN)
        assert not torch.equal(legacy.read(name), sharded.read(name)), name
    assert cut


def test_it_exports_to_the_same_files(both_formats, tmp_path):
    folders = [tmp_path / "legacy", tmp_path / "torch_dist"]
    for load_dir, save_dir in zip(both_formats.values(), folders, strict=True):
        export_to_hugging_face(ExportOptions(load_dir=load_dir, save_dir=save_dir, verify="tensors"))
    one, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == other
    assert len({json.dumps(json.loads((folder / "config.json").read_text())) for folder in folders}) == 1


def sign_again(file: Path, content: bytearray) -> None:
    """Write the checksums of what changed in `content` since `file` was written: it was saved so, not damaged later."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            header = member.header_offset
            start = (
                header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
            )  # lengths of name and extra field
            crc = zlib.crc32(content[start : start + member.file_size])
            if crc != member.CRC:
                before = member.CRC.to_bytes(4, "little")  # behind the member, and in the directory
                assert content.count(before) == 2
                content[:] = content.replace(before, crc.to_bytes(4, "little"))


def test_nan_of_a_rank_is_refused_by_name(both_formats, tmp_path):
    """The last bytes of a storage become NaN in a copy of the checkpoint."""
    source = next(iter(both_formats["torch"].glob("iter_*")))
    target = tmp_path / source.name
    reader = open_checkpoint(both_formats["torch"])
    name = "decoder.layers.2.self_attention.linear_proj.weight"
    damaged = reader.tensors[name].parts[-1][0].located
    for file in source.glob("mp_rank_*/*.pt"):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = bytearray(file.read_bytes())
        if file == damaged.path:
            content[damaged.start : damaged.start + 2] = b"\xc0\x7f"
            sign_again(file, content)
        copy.write_bytes(content)
    copies = len(reader.tensors[name].parts[-1])
    sentence = f"{name} must equal its copy" if copies > 1 else f"{name}: weights must be finite"
    with pytest.raises(ConversionError, match=sentence):
        export_to_hugging_face(ExportOptions(load_dir=target, save_dir=tmp_path / "hf", verify="tensors"))
    assert not (tmp_path / "hf").exists()
