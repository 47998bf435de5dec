"""What stands in the way of a quantization is named beforehand."""

import json

import pytest
import transformers

from megatron_hammer.errors import ConversionError
from megatron_hammer.serving.quantization.source_model import list_shape_problems, open_quantizable
from tests.helpers.messages import assert_problems, raises_problem
from tests.helpers.packed_folders import pack_folder, write_small_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_small_source(tmp_path_factory.mktemp("source") / "model")


def test_the_linear_layers_of_the_blocks_are_found(source) -> None:
    layers = open_quantizable(source, group_size=32).layers
    assert len(layers) == 14
    assert {name.rpartition(".")[2] for name in layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_shapes_that_do_not_divide_are_named_with_a_size_that_does(source) -> None:
    with pytest.raises(ConversionError) as error:
        open_quantizable(source, group_size=64)
    # 96 inputs for six layers of each block, 160 for down_proj; o_proj has 192, which 64 divides.
    problems = error.value.problems
    assert len(problems) == 12
    assert not [problem for problem in problems if "o_proj" in problem]
    down = [problem for problem in problems if problem.startswith("model.layers.1.mlp.down_proj")]
    assert_problems(down, ("model.layers.1.mlp.down_proj", "160 inputs and 96 outputs", "Pass --group-size 32."))


@pytest.mark.parametrize(
    "shapes, group_size, remedy",
    [
        ({"a": (64, 96), "b": (64, 704)}, 128, "--group-size 32"),
        ({"a": (64, 192), "b": (64, 704)}, 128, "--group-size 64"),
        ({"a": (64, 100)}, 50, "q8_0"),  # 50 divides 100, but no kernel reads it
        ({"a": (72, 64)}, 64, "q8_0"),
    ],
)
def test_the_remedy_is_one_that_works(shapes, group_size: int, remedy: str) -> None:
    problems = list_shape_problems(shapes, group_size)
    assert problems
    assert all(remedy in problem for problem in problems)
    if remedy.startswith("--"):
        assert list_shape_problems(shapes, int(remedy.split()[1])) == []


def test_a_quantized_model_is_refused(source, tmp_path) -> None:
    packed = pack_folder(source, tmp_path / "gptq", "gptq")
    with raises_problem(ConversionError, f"{packed / 'config.json'}, quantization_config", "got gptq", "before quant"):
        open_quantizable(packed, group_size=32)


def test_a_mixture_is_refused(tmp_path) -> None:
    config = transformers.Qwen3MoeConfig(num_experts=5, num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(tmp_path)
    with raises_problem(ConversionError, str(tmp_path), "experts", "got 5", "to_gguf.py"):
        open_quantizable(tmp_path, group_size=32)


def test_other_layouts_are_refused(tmp_path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_head=2, n_layer=1, vocab_size=99))
    model.save_pretrained(tmp_path)
    with raises_problem(ConversionError, str(tmp_path), "model.layers", "GPT2LMHeadModel"):
        open_quantizable(tmp_path, group_size=32)


def test_a_megatron_checkpoint_is_pointed_to_the_export(tmp_path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    with raises_problem(ConversionError, str(tmp_path), "Megatron checkpoint", "megatron_to_hf.py"):
        open_quantizable(tmp_path, group_size=32)


def test_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with raises_problem(ConversionError, f"{tmp_path / 'm.gguf'}", "Hugging Face folder", "got a file"):
        open_quantizable(tmp_path / "m.gguf", group_size=32)


def test_a_config_that_is_no_model_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with raises_problem(ConversionError, "config.json, model_type", "bert"):
        open_quantizable(tmp_path, group_size=32)
