"""Packed layers are read back: against packing by hand, and against AutoRound's own layers of both formats."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hammer.checkpoint_files.safetensors.weight_files import open_hf_weights
from megatron_hammer.errors import ConversionError
from megatron_hammer.serving.quantization.packed_weights import (
    iterate_plain_weights,
    list_packed_layers,
    list_plain_shapes,
    read_packed_layer,
    write_plain_folder,
)
from tests.helpers.messages import raises_problem
from tests.helpers.packed_folders import GROUP_SIZE, pack_folder, pack_layer, write_small_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_small_source(tmp_path_factory.mktemp("packed") / "source")


def read_one(folder, parts, method, bits):
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in parts.items()}, folder / "model.safetensors")
    return read_packed_layer(open_hf_weights(folder), "layer", {"quant_method": method, "bits": bits})


@pytest.mark.parametrize("method, bits", [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_every_weight_is_within_half_a_step(tmp_path, method: str, bits: int) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    got, steps = read_one(tmp_path, pack_layer(weight, method, bits), method, bits)
    assert got.shape == steps.shape == weight.shape
    # Weights at the ends of a group's range are clamped by up to one step more, as the zero point is rounded.
    assert ((got - weight).abs() <= steps * 1.01).all()
    assert ((got - weight).abs() / steps).mean() < 0.3


def test_reading_in_the_order_of_the_other_format_is_far_off(tmp_path) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    parts = pack_layer(weight, "awq", 4)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    got, steps = read_one(tmp_path, parts, "awq", 4)
    assert ((got.reshape(-1, 8, 96)[:, order].reshape(64, 96) - weight).abs() / steps).mean() > 1.5


def test_groups_in_another_order_are_followed(tmp_path) -> None:
    """desc_act of GPTQ: g_idx says the group of every input."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    parts = pack_layer(weight, "gptq", 8)
    expected, _ = read_one(tmp_path, parts, "gptq", 8)
    numbers = parts["qweight"].view(torch.uint8).reshape(24, 64, 4).transpose(1, 2).reshape(96, 64)[order]
    moved = numbers.reshape(24, 4, 64).transpose(1, 2).contiguous().view(torch.int32).reshape(24, 64)
    got, _ = read_one(tmp_path, parts | {"qweight": moved, "g_idx": parts["g_idx"][order]}, "gptq", 8)
    assert torch.equal(got, expected[:, order])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_auto_round_computes_the_same_weights(tmp_path, method: str) -> None:
    """A layer that AutoRound computes from the packed parts, given the identity, is the weight."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    parts = pack_layer(weight, method, 4)
    got, _ = read_one(tmp_path, parts, method, 4)
    if method == "awq":
        from auto_round.export.export_to_awq.utils import WQLinear_GEMM

        layer = WQLinear_GEMM(4, GROUP_SIZE, 96, 64, False, "cpu")
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

        # Symmetric: this layer has one zero point for all.
        parts["qzeros"] = torch.full_like(parts["qzeros"], 0x77777777)
        layer = QuantLinear(4, GROUP_SIZE, 96, 64, False)
        got, _ = read_one(tmp_path, parts, method, 4)
    layer.load_state_dict({name: value for name, value in parts.items() if name != "g_idx"}, strict=False)
    if hasattr(layer, "post_init"):
        layer.post_init()
    computed = layer(torch.eye(96, dtype=torch.float16)[None])[0].T.float()
    # fp16 rounds the product of scale and number.
    torch.testing.assert_close(got, computed, rtol=2e-3, atol=1e-4)


def test_a_plain_folder_has_the_usual_names_and_no_trace_of_the_format(source, tmp_path) -> None:
    quantized, plain = pack_folder(source, tmp_path / "gptq", "gptq"), tmp_path / "plain"
    plain.mkdir()
    write_plain_folder(quantized, plain)
    before, after = load_file(source / "model.safetensors"), load_file(plain / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].half())
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config
    assert (plain / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert len(list_packed_layers(open_hf_weights(quantized))) == 14
    assert list_packed_layers(open_hf_weights(plain)) == []


@pytest.mark.parametrize("method, bits", [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_plain_shapes_are_known_without_unpacking(source, tmp_path, method: str, bits: int) -> None:
    quantized = pack_folder(source, tmp_path / "q", method, bits)
    expected = {name: tuple(tensor.shape) for name, tensor in iterate_plain_weights(quantized)}
    assert list(list_plain_shapes(quantized).items()) == list(expected.items())


def test_plain_shapes_name_a_missing_part(source, tmp_path) -> None:
    quantized = pack_folder(source, tmp_path / "q", "gptq")
    tensors = load_file(quantized / "model.safetensors")
    layer = list_packed_layers(open_hf_weights(quantized))[0]
    del tensors[f"{layer}.scales"]
    save_file(tensors, quantized / "model.safetensors")
    with raises_problem(ConversionError, str(quantized), layer, "scales"):
        list_plain_shapes(quantized)


@pytest.mark.parametrize("change", [{"bits": 3}, {"quant_method": "awq", "version": "gemv"}, {"quant_method": "fp8"}])
def test_other_formats_are_refused(source, tmp_path, change) -> None:
    quantized = pack_folder(source, tmp_path / "q", "gptq")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] |= change
    (quantized / "config.json").write_text(json.dumps(config))
    with raises_problem(ConversionError, f"{quantized / 'config.json'}, quantization_config", next(iter(change))):
        write_plain_folder(quantized, tmp_path)


def test_a_missing_part_is_named(tmp_path) -> None:
    parts = pack_layer(torch.randn(64, 96), "gptq", 4)
    del parts["scales"]
    with raises_problem(ConversionError, str(tmp_path), "layer", "scales"):
        read_one(tmp_path, parts, "gptq", 4)
