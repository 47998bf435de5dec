"""Which dtype is compared, with which limit, and which message reports a side that failed."""

import json
import subprocess
import types

import pytest
import torch

from megatron_hammer.checkpoint.verification import verify_conversion as verify
from megatron_hammer.checkpoint.verification.forward_exchange import (
    MEGATRON_FINDINGS_FILE,
    TRANSFORMERS_FINDINGS_FILE,
    ForwardRequest,
    read_request,
    write_findings,
)
from megatron_hammer.checkpoint.verification.layer_check import (
    draw_hidden_states,
    replace_layer_input,
    sample_layers,
    sample_rows,
    select_names,
)
from megatron_hammer.checkpoint.verification.logit_comparison import measure_difference
from megatron_hammer.checkpoint.verification.verdicts import build_limit
from megatron_hammer.checkpoint.verification.verify_conversion import CheckRow, plan_comparison, verify_model
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.toy_model import MOE_ARGUMENTS
from tests.helpers.toy_pair import write_toy_pair

PLAN = {"level": "auto", "iteration": None, "texts": None, "weights": "model"}


def with_free_memory(monkeypatch, num_bytes: int) -> None:
    memory = types.SimpleNamespace(available=num_bytes)
    monkeypatch.setattr(verify, "psutil", types.SimpleNamespace(virtual_memory=lambda: memory))


# --- planning --------------------------------------------------------------------------------------------------------


def test_the_whole_model_is_compared_where_three_of_it_fit(tmp_path, monkeypatch):
    pair = write_toy_pair(tmp_path, {})
    stored_bytes = 4 * (2 * 64 * 24 + 24 + 3 * (24 + 40 * 24 + 24 * 24 + 24 + 40 * 24 + 24 * 20))
    with_free_memory(monkeypatch, 3 * stored_bytes)
    request = plan_comparison(*pair, **PLAN)
    assert (request.layers, request.dtype, request.rows) == (None, "float32", ())
    with_free_memory(monkeypatch, 3 * stored_bytes - 3)
    request = plan_comparison(*pair, **PLAN)
    assert (request.layers, request.dtype, len(request.rows)) == ((0, 1, 2), "float32", 53)
    request = plan_comparison(*pair, **{**PLAN, "level": "logits"})  # fits, but without room to spare
    assert (request.layers, request.dtype) == (None, "float32")
    with_free_memory(monkeypatch, stored_bytes)
    assert plan_comparison(*pair, **{**PLAN, "level": "logits"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "hf_dtype", "roundings"),
    [
        (torch.float32, torch.bfloat16, ("bfloat16", None)),
        (torch.bfloat16, torch.float32, (None, "bfloat16")),
        (torch.bfloat16, torch.float16, (None, None)),
    ],
)
def test_the_side_of_more_bits_is_rounded(tmp_path, dtype, hf_dtype, roundings):
    request = plan_comparison(*write_toy_pair(tmp_path, MOE_ARGUMENTS, dtype=dtype, hf_dtype=hf_dtype), **PLAN)
    assert (request.megatron_rounding, request.hf_rounding) == roundings
    assert (request.vocab_size, request.num_tokens, request.has_experts) == (53, 32, True)


def test_a_request_survives_its_file(tmp_path):
    request = plan_comparison(*write_toy_pair(tmp_path, {}), **{**PLAN, "level": "layers", "texts": ["a", "b"]})
    request.write(tmp_path)
    assert read_request(tmp_path) == request


def test_sampled_layers_are_the_first_the_middle_the_last_and_one_more():
    assert sample_layers(1) == (0,)
    assert sample_layers(2) == (0, 1)
    layers = sample_layers(80)
    assert {0, 40, 79} < set(layers)
    assert len(layers) == 4
    assert sample_layers(80) == layers


def test_sampled_rows_begin_and_end_with_the_vocabulary():
    assert sample_rows(53) == tuple(range(53))
    rows = sample_rows(105_789)
    assert (rows[0], rows[-1]) == (0, 105_788)
    assert 64 <= len(rows) <= 66
    assert list(rows) == sorted(set(rows))


def test_names_of_a_layer_are_renumbered_and_those_outside_stay():
    names = ["model.embed_tokens.weight", "model.layers.1.mlp.experts.11.up_proj.weight", "model.layers.11.x", "h.1.y"]
    assert select_names(names, 1) == {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.11.up_proj.weight": "model.layers.0.mlp.experts.11.up_proj.weight",
        "h.1.y": "h.0.y",
    }


def test_a_layers_input_is_replaced_however_it_is_passed():
    layer = torch.nn.Linear(5, 3)
    hidden = draw_hidden_states(7, 5, seed=1)
    assert torch.equal(hidden, draw_hidden_states(7, 5, seed=1))
    with replace_layer_input(layer, hidden) as outputs:
        layer(torch.zeros(7, 5))
    assert torch.equal(outputs[0], layer(hidden))
    assert torch.equal(layer(torch.zeros(7, 5)), layer.bias.expand(7, 3))


# --- judging ---------------------------------------------------------------------------------------------------------


def request_of(**changes) -> ForwardRequest:
    values = {
        "megatron_dir": "m",
        "weights": "model",
        "hf_dir": "h",
        "vocab_size": 53,
        "num_tokens": 10,
        "has_experts": False,
        "dtype": "float32",
    }
    return ForwardRequest(**(values | changes))


def difference(*position_max: float):
    """Of tensors [s, 1] that are so far apart."""
    return measure_difference(torch.tensor(position_max)[:, None], torch.zeros(len(position_max), 1))


def limit_of(noise: float = 0.0, **changes):
    found = difference(noise)
    values = {"position_max": found.position_max, "square_sum": found.square_sum, "num_elements": 1}
    return build_limit(request_of(**changes), 2.0, values)


def test_in_fp32_the_largest_difference_counts():
    assert limit_of().judge(difference(0, 1.9e-4))[0]
    is_passed, text = limit_of().judge(difference(0, 2.1e-4))
    assert not is_passed
    assert text == "max |difference| 2.10e-04, limit 2.00e-04 (0.0001 of the standard deviation, 2)"
    assert not limit_of().judge(difference(0, float("nan")))[0]


def test_a_noisy_model_has_a_wider_limit():
    is_passed, text = limit_of(noise=1e-3).judge(difference(1.9e-2))
    assert is_passed
    assert text.endswith("limit 2.00e-02 (20 times what transformers' eager and sdpa attention differ by)")
    assert not limit_of(noise=1e-3).judge(difference(2.1e-2))[0]
    is_passed, text = limit_of(noise=1.0, dtype="bfloat16").judge(difference(9.0))
    assert is_passed
    assert text.endswith("limit 1.00e+01 (10 times what transformers' eager and sdpa attention differ by)")


def test_in_bf16_the_root_mean_square_counts():
    limit = limit_of(dtype="bfloat16")
    assert limit.judge(difference(0, 0, 0, 0.19))[0]
    is_passed, text = limit.judge(difference(0.11, 0.11))
    assert not is_passed
    assert text == "root mean square difference 1.10e-01, limit 1.00e-01 (0.05 of the standard deviation, 2)"
    assert not limit.judge(difference(0, float("nan")))[0]


def test_a_tie_between_experts_is_not_a_wrong_expert():
    limit = limit_of(has_experts=True)
    is_passed, text = limit.judge(difference(0, 0, 0, 0, 0, 0.2))
    assert is_passed
    assert text.endswith("; 5 of 6 positions within it, the others after a tie between experts")
    assert not limit_of().judge(difference(0, 0, 0, 0, 0, 0.2))[0]  # a dense model has no ties
    assert not limit.judge(difference(0, 0, 0.01, 0.01, 0.01))[0]  # a wrong expert is met by most texts
    assert not limit.judge(difference(0, 0, 0, 0, 0, 3.0))[0]  # nor is one position that far off


# --- a side that does not come to its end ----------------------------------------------------------------------------


def run_sides(monkeypatch, *results):
    """Sides that end as told: (exit code, stderr) or the findings that they leave."""
    calls = iter(results)

    def run(module, folder):
        result = next(calls)
        if isinstance(result, dict):
            is_first = module == "transformers_forward"
            write_findings(folder / (TRANSFORMERS_FINDINGS_FILE if is_first else MEGATRON_FINDINGS_FILE), result)
            return subprocess.CompletedProcess([], 0, "", "")
        return subprocess.CompletedProcess([], result[0], "", result[1])

    monkeypatch.setattr(verify, "_run_side", run)


def test_a_crash_is_a_failed_row_with_the_last_lines(tmp_path, monkeypatch):
    pair = write_toy_pair(tmp_path, {})
    run_sides(monkeypatch, (1, "one\ntwo\n\n  three\nOSError: four\n"))
    assert verify_model(*pair) == [
        CheckRow("transformers runs the folder", "exit code 1: two | three | OSError: four", False)
    ]
    run_sides(monkeypatch, {}, (-9, ""))
    assert verify_model(*pair) == [CheckRow("Megatron runs the checkpoint", "killed by signal 9: no message", False)]


def test_a_check_that_cannot_be_done_names_its_reason(tmp_path, monkeypatch):
    pair = write_toy_pair(tmp_path, {})
    run_sides(monkeypatch, {}, {"not_done": "megatron-core does not import: no such symbol"})
    reason = "megatron-core does not import: no such symbol"
    assert verify_model(*pair) == [CheckRow("Megatron runs the checkpoint", reason, None)]
    monkeypatch.setattr(verify, "_is_installed", lambda name: name != "transformers")
    reason = "transformers not installed: pip install megatron-core transformers"
    assert verify_model(*pair) == [CheckRow("Megatron against transformers", reason, None)]


def test_a_model_with_constant_output_proves_nothing(tmp_path, monkeypatch):
    pair = write_toy_pair(tmp_path, {})
    text = {"position_max": [0.0], "square_sum": 0.0, "num_elements": 1}
    ours = {"logits": text, "log_probabilities": text, "num_same_choice": 1, "changed_margin": 0.0}
    ours |= {"num_targets": 1, "loss_sum": 1.0, "reference_loss_sum": 1.0}
    theirs = {"class": "LlamaForCausalLM", "num_texts": 5, "has_tokenizer": True, "std": 0.0, "noise": text}
    run_sides(monkeypatch, theirs, ours)
    (row,) = verify_model(*pair)
    assert (row.result, row.is_passed) == ("standard deviation 0: nothing to compare", False)


def test_tensors_are_left_to_the_converters(tmp_path):
    assert verify_model(tmp_path, tmp_path, level="tensors") == []


def test_a_side_that_cannot_be_opened_is_an_error(tmp_path):
    megatron_dir, hf_dir = write_toy_pair(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"nowhere: checkpoint directory does not exist\."):
        verify_model(tmp_path / "nowhere", hf_dir)
    config = json.loads((hf_dir / "config.json").read_text())
    del config["vocab_size"]
    (hf_dir / "config.json").write_text(json.dumps(config))
    message = r"config\.json: vocab_size must be given, got nothing\. Fetch the file again"
    with pytest.raises(ConversionError, match=message):
        verify_model(megatron_dir, hf_dir)
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"hf: must hold model\.safetensors or pytorch_model\.bin"):
        verify_model(megatron_dir, hf_dir)
