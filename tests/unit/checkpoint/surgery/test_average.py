"""The mean is computed as documented, and only for models of one architecture."""

import re

import pytest
import torch

from megatron_hammer.checkpoint.surgery.average import average, mean_of
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.messages import assert_problems
from tests.helpers.toy_training_checkpoint import model_tensors, optimizer_tensors, read_all, training_arguments
from tests.helpers.toy_training_checkpoint import write_training_checkpoint as write

QKV = "decoder.layers.self_attention.linear_qkv.weight"


def write_three(folder, dtype=torch.float32):
    """Three checkpoints whose weights differ; returns their tensors."""
    models = [model_tensors(dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    for number, model in enumerate(models):
        write(folder / str(number), tensors={**model, **optimizer_tensors(model)})
    return models, [folder / str(number) for number in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights(tmp_path, dtype):
    models, folders = write_three(tmp_path, dtype)
    report = average(folders, tmp_path / "mean")
    found, store = read_all(tmp_path / "mean", "release")
    assert found.keys() == models[0].keys()  # without the optimizer's
    for key, tensor in found.items():
        first, second, third = (model[key].float() for model in models)
        assert torch.equal(tensor, ((first + second + third) / 3).to(dtype))
    assert [share for _, share in report.sources] == [1 / 3] * 3
    assert report.num_weights == 9
    assert store.common_state.keys() == {"args", "iteration", "checkpoint_version", "content_metadata"}
    assert store.common_state["args"].consumed_train_samples == 0


def test_given_weights_in_the_given_order(tmp_path):
    models, folders = write_three(tmp_path)
    average(folders, tmp_path / "mean", weights=[0.5, 0.3, 0.4])
    found, _ = read_all(tmp_path / "mean", "release")
    for key, tensor in found.items():
        terms = [model[key] * share for model, share in zip(models, (0.5, 0.3, 0.4), strict=True)]
        assert torch.equal(tensor, (terms[0] + terms[1] + terms[2]) / 1.2)
    # The twin: another order of weights is another model.
    average(folders, tmp_path / "other", weights=[0.3, 0.5, 0.4])
    assert not torch.equal(read_all(tmp_path / "other", "release")[0][QKV], found[QKV])


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_one_model_with_itself_is_that_model(dtype, count):
    tensor = torch.randn(50, 70, generator=torch.Generator().manual_seed(4)).to(dtype)
    mean = mean_of([tensor] * count, [1.0] * count)
    if dtype == torch.float32 and count == 3:  # 3x is rounded in fp32: the quotient may be the next number, 2^-23 off
        torch.testing.assert_close(mean, tensor, rtol=2.0**-23, atol=0)
    else:
        assert torch.equal(mean, tensor)


def test_the_mean_is_rounded_once_from_fp32():
    # In bf16 1 + 2^-9 would already be rounded away before the division.
    parts = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-7], dtype=torch.bfloat16)]
    assert mean_of(parts, [1.0, 3.0]).item() == torch.tensor((1 + 3 * 2.0**-7) / 4).to(torch.bfloat16).item()


def test_every_difference_is_named(tmp_path):
    _, folders = write_three(tmp_path)
    tensors = model_tensors()
    tensors.pop("output_layer.weight")
    tensors["decoder.final_layernorm.weight"] = tensors["decoder.final_layernorm.weight"].bfloat16()
    write(tmp_path / "odd", tensors=tensors, arguments=training_arguments(rotary_base=500_000, swiglu=False))
    with pytest.raises(ConversionError) as caught:
        average([*folders, tmp_path / "odd"], tmp_path / "mean")
    odd, first = tmp_path / "odd" / "iter_0000010", tmp_path / "0" / "iter_0000010"
    where = f"in {odd}, unlike {first}"
    assert_problems(
        caught.value.problems,
        ("rotary_base:", "must be the same", f"got 500000 {where}: 10000"),
        ("swiglu:", "must be the same", f"got None {where}: True"),
        (
            "decoder.final_layernorm.weight:",
            "must be the same",
            f"got (24,) torch.bfloat16 {where}: (24,) torch.float32",
        ),
        ("output_layer.weight:", "must be the same", f"got no such tensor {where}: (64, 24) torch.float32"),
    )
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("num_folders", "weights", "text"),
    [
        (1, None, "checkpoints: must be at least two, got 1. Name another."),
        (3, [1.0, 2.0], "weights: must be one for each checkpoint, got 2 for 3 checkpoints. Pass as many."),
        (2, [1.0, -1.0], "weights: must be finite numbers with a positive sum, got 1.0, -1.0. Change them."),
        (2, [1e308, 1e308], "weights: must be finite numbers with a positive sum, got 1e+308, 1e+308. Change them."),
        (2, [1.0, float("inf")], "weights: must be finite numbers with a positive sum, got 1.0, inf. Change them."),
    ],
)
def test_weights_that_make_no_mean(tmp_path, num_folders, weights, text):
    with pytest.raises(ConversionError, match=re.escape(text)):
        average([tmp_path] * num_folders, tmp_path / "mean", weights=weights)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint directory does not exist"):
        average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")


def test_a_checkpoint_does_not_count_twice_by_another_name(tmp_path):
    _, (first, second, _) = write_three(tmp_path)
    (tmp_path / "link").symlink_to(first)
    for other in (first, first / ".." / first.name, tmp_path / "link", next(first.glob("iter_*"))):
        with pytest.raises(ConversionError, match="checkpoint must be named once, got it as"):
            average([first, second, other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
