"""Which layouts only move rows, and which message names a tensor that was changed."""

import dataclasses
from pathlib import Path

import torch

from megatron_hammer.checkpoint.convert.proofs import (
    compare_tensors,
    find_row_runs,
    join_proofs,
    list_faults,
    stacks_rows,
)
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP, TensorLayout
from tests.helpers.toy_model import GPT2_ARGUMENTS, toy_arguments

MODEL = read_saved_model(toy_arguments())
PAIRS = {pair.megatron_name: pair for pair in expand(select_family(MODEL), MODEL)}
QKV, FC1 = (f"decoder.layers.1.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1"))


def test_a_layout_says_which_rows_go_where():
    # two groups, each of three query heads, a key and a value of four rows
    assert find_row_runs(PAIRS[QKV], MODEL) == [[(0, 12), (20, 12)], [(12, 4), (32, 4)], [(16, 4), (36, 4)]]
    assert find_row_runs(PAIRS[FC1], MODEL) == [[(0, 20)], [(20, 20)]]
    assert find_row_runs(PAIRS["decoder.final_layernorm.weight"], MODEL) == [[(0, 24)]]


def test_a_layout_that_transposes_or_drops_rows_is_not_a_row_move():
    gpt2 = read_saved_model(toy_arguments(**GPT2_ARGUMENTS))
    runs = {pair.megatron_name: find_row_runs(pair, gpt2) for pair in expand(select_family(gpt2), gpt2)}
    assert runs["decoder.layers.1.mlp.linear_fc2.weight"] is runs[QKV] is None
    assert runs["decoder.layers.1.self_attention.linear_qkv.bias"] == [
        [*((first, 4) for first in range(0, 72, 12)), *((first, 4) for first in range(4, 72, 12))]
        + [(first, 4) for first in range(8, 72, 12)]
    ]
    layout = dataclasses.replace(PAIRS[FC1].layout, split=lambda tensor, _: (tensor[:20], tensor[:20]))
    assert find_row_runs(dataclasses.replace(PAIRS[FC1], layout=layout), MODEL) is None


def test_only_parts_that_lie_one_under_the_other_are_stacked():
    assert stacks_rows(PAIRS[FC1], MODEL)
    assert not stacks_rows(PAIRS[QKV], MODEL)
    swapped = TensorLayout(split=GATE_UP.split, merge=lambda parts, model: GATE_UP.merge(parts[::-1], model))
    assert not stacks_rows(dataclasses.replace(PAIRS[FC1], layout=swapped), MODEL)
    alone = read_saved_model(toy_arguments(num_query_groups=1))  # one group: q, k and v lie one under the other
    assert stacks_rows(next(p for p in expand(select_family(alone), alone) if p.megatron_name == QKV), alone)
    gpt2 = read_saved_model(toy_arguments(**GPT2_ARGUMENTS))
    fc2 = "decoder.layers.1.mlp.linear_fc2.weight"
    assert not stacks_rows(next(p for p in expand(select_family(gpt2), gpt2) if p.megatron_name == fc2), gpt2)


def test_each_fault_is_a_sentence():
    places = {"dtype": torch.float16, "source": Path("in"), "target": Path("out"), "remedy": "Fetch it again"}
    good = torch.tensor([1.0, -0.0])
    assert list_faults("w", compare_tensors(good, good.clone()), **places) == []
    infinite, negative_zero = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 0.0])
    proof = join_proofs([compare_tensors(infinite, infinite), compare_tensors(good, negative_zero)])
    first, second = list_faults("w", proof, **places, written_as="m")
    assert first.startswith("w: weights must be finite in float16, got NaN or infinity in in. Fetch it again, or pass")
    assert second.startswith("w: what was written as m must read back equal, got a difference in out. Check the disk")
