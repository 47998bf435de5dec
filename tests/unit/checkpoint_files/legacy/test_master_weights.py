"""fp32 master weights of a legacy checkpoint are found, compared with the model weights, or refused."""

import re

import pytest
import torch

from megatron_hammer.checkpoint_files.legacy.master_weights import place_parameters
from megatron_hammer.checkpoint_files.legacy.reader import open_legacy_checkpoint
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.toy_legacy_checkpoint import legacy_arguments, llama_weights, write_legacy_checkpoint

STAGES = ((1, 1), (1, 1))
ARGUMENTS = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 2}


def flatten(parameters, *, alignment, bucket_size=None):
    """A gathered buffer written by hand: backwards, aligned in each bucket, buckets one after the other."""
    buckets, bucket = [], torch.empty(0)
    for parameter in reversed(parameters):
        padding = -bucket.numel() % alignment
        bucket = torch.cat([bucket, torch.zeros(padding), parameter.flatten()])
        if bucket_size is not None and bucket.numel() >= bucket_size:
            buckets, bucket = [*buckets, bucket], torch.empty(0)
    return torch.cat([*buckets, bucket])


class Masters:
    """fp32 weights in two parts: what a rank's model holds, rounded, and what its optimizer holds."""

    def __init__(self, *, kind="distributed", alignment=64, bucket_size=None, damage=None):
        self.kind, self.alignment, self.bucket_size, self.damage = kind, alignment, bucket_size, damage
        self.states = {}

    def __call__(self, state, tp_rank, pp_rank):
        chunks = [state["model0"], state["model1"]]
        if self.kind == "distributed":
            buffers = {"buckets_coalesced": True}
            for index, chunk in enumerate(chunks):
                flat = flatten(list(chunk.values()), alignment=self.alignment, bucket_size=self.bucket_size)
                tensors = {"param": flat, "exp_avg": flat * 2, "numel_unpadded": flat.numel()}
                buffers[index] = {(torch.bfloat16, torch.float32): tensors}
            self.states[tp_rank, pp_rank] = buffers
        else:
            parameters = [tensor.clone() for chunk in chunks for tensor in chunk.values()]
            with_decay, without = ([p for p in parameters if (p.dim() > 1) == is_wide] for is_wide in (True, False))
            groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]
            state["optimizer"] = {
                "optimizer": {"param_groups": groups},
                "fp32_from_fp16_params": [with_decay, without],
            }
        if self.damage is not None:
            self.damage(state.get("optimizer"), self.states.get((tp_rank, pp_rank)))
        for chunk in chunks:
            chunk.update({name: tensor.bfloat16() for name, tensor in chunk.items()})

    def write(self, folder, weights, **changes):
        args = legacy_arguments(**(ARGUMENTS | changes))
        target = write_legacy_checkpoint(folder, weights, tp=2, stages=STAGES, arguments=args, change=self)
        for (tp_rank, pp_rank), state in self.states.items():
            torch.save(state, target / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}" / "distrib_optim.pt")
        return target


@pytest.mark.parametrize(
    "masters, changes",
    [
        pytest.param(Masters(), {}, id="one-bucket"),
        pytest.param(Masters(bucket_size=700), {"ddp_bucket_size": 700}, id="buckets"),
        pytest.param(Masters(alignment=1), {}, id="without-alignment"),
        pytest.param(Masters(kind="plain"), {}, id="plain-optimizer"),
    ],
)
def test_masters_of_every_optimizer_are_found(tmp_path, masters, changes):
    weights = llama_weights()
    target = masters.write(tmp_path, weights, **changes)
    reader, rounded = open_legacy_checkpoint(target, weights="master"), open_legacy_checkpoint(target)
    assert reader.tensors.keys() == rounded.tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert reader.tensors[name].dtype == torch.float32
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(rounded.read(name), tensor.bfloat16()), name


@pytest.mark.parametrize("decays", [False, True])
def test_norms_of_queries_and_keys_may_have_weight_decay(tmp_path, decays):
    """--apply-wd-to-qk-layernorm puts them into the group of the matrices."""
    names = [
        f"decoder.layers.0.self_attention.{name}" for name in ("q_layernorm.weight", "linear_qkv.layer_norm_weight")
    ]
    one_layer = {name: tensor for name, tensor in llama_weights().items() if ".layers." not in name or ".0." in name}
    weights = one_layer | {name: torch.randn(4 if "q_" in name else 24) for name in names}

    def save_optimizer(state, *_):
        model = state["model"]
        with_decay = [value.clone() for name, value in model.items() if value.dim() > 1 or (decays and "q_" in name)]
        without = [value.clone() for name, value in model.items() if value.dim() == 1 and not (decays and "q_" in name)]
        groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]
        state["optimizer"] = {
            "optimizer": {"param_groups": groups},
            "fp32_from_fp16_params": [with_decay, without],
        }
        model.update({name: value.bfloat16() for name, value in model.items()})

    arguments = legacy_arguments(num_layers=1, qk_layernorm=True, apply_wd_to_qk_layernorm=decays)
    target = write_legacy_checkpoint(tmp_path, weights, stages=((1,),), arguments=arguments, change=save_optimizer)
    reader = open_legacy_checkpoint(target, weights="master")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("etp, is_chained", [(2, False), (1, True)])
def test_experts_with_a_tensor_parallel_size_of_their_own_have_an_optimizer(tmp_path, etp, is_chained):
    """Megatron compares the two sizes, without expert parallelism too: use_expert_pgs of ColumnParallelLinear."""
    args = legacy_arguments(num_layers=1, num_experts=1, tensor_model_parallel_size=2, expert_tensor_parallel_size=etp)
    expert = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"
    fc2, router = torch.randn(24, 10), torch.randn(1, 24)
    target = tmp_path / "iter_0000003"
    for rank in range(2):
        parts = {
            "decoder.layers.0.mlp.router.weight": router,
            expert: fc2.clone() if etp == 1 else fc2.chunk(2, dim=1)[rank].clone(),
        }
        states = [
            {
                "optimizer": {"param_groups": [{"wd_mult": 1.0}]},
                "fp32_from_fp16_params": [[value.clone() for value in own]],
            }
            for own in ([[part] for part in parts.values()] if is_chained else [list(parts.values())])
        ]
        state = {"args": args, "iteration": 3, "checkpoint_version": 3.0}
        state["model"] = {name: value.bfloat16() for name, value in parts.items()}
        (target / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save(
            state | {"optimizer": states if is_chained else states[0]},
            target / f"mp_rank_0{rank}" / "model_optim_rng.pt",
        )
    reader = open_legacy_checkpoint(target, weights="master")
    assert torch.equal(reader.read("decoder.layers.0.mlp.experts.experts.0.linear_fc2.weight"), fc2)
    assert torch.equal(reader.read("decoder.layers.0.mlp.router.weight"), router)


def test_a_parameter_of_another_place_is_noticed(tmp_path):
    """The twin: every weight is taken one alignment too early in the buffer."""

    def swap(_, buffers):
        for index in range(2):
            flat = buffers[index][torch.bfloat16, torch.float32]["param"]
            flat.copy_(flat.roll(64))

    reader = open_legacy_checkpoint(Masters(damage=swap).write(tmp_path, llama_weights()), weights="master")
    with pytest.raises(
        ConversionError,
        match=r"distrib_optim\.pt: the fp32 master weight of output_layer\.weight .*got a difference",
    ):
        reader.read("output_layer.weight")


def test_fp32_weights_are_their_own_masters(tmp_path):
    weights = llama_weights()
    reader = open_legacy_checkpoint(write_legacy_checkpoint(tmp_path, weights, tp=2), weights="master")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in weights.items())


def _remove(optimizer, _):
    optimizer.pop("fp32_from_fp16_params")


def _shorten(_, buffers):
    tensors = buffers[0][torch.bfloat16, torch.float32]
    tensors["param"] = tensors["param"][:-1].clone()


def _separate(_, buffers):
    buffers["buckets_coalesced"] = False


def _drop(optimizer, _):
    optimizer["fp32_from_fp16_params"][0].pop()


def _merge(_, buffers):
    buffers.pop(1)


@pytest.mark.parametrize(
    "kind, damage, found",
    [
        ("plain", _remove, "got an optimizer with ['optimizer']"),
        ("plain", _drop, "got 8 tensors in a parameter group for 9 weights"),
        ("distributed", _shorten, "elements of torch.float32, which no order of the weights gives"),
        ("distributed", _separate, "got a distributed optimizer of before its buckets were joined"),
        ("distributed", _merge, "got 1 buffers for 2"),
    ],
)
def test_an_optimizer_of_unknown_order_is_refused(tmp_path, kind, damage, found):
    target = Masters(kind=kind, damage=damage).write(tmp_path, llama_weights())
    with pytest.raises(CheckpointError, match=re.escape(found) + r".*\. Pass --weights model\.$"):
        open_legacy_checkpoint(target, weights="master")


def test_a_checkpoint_without_its_optimizer_is_refused(tmp_path):
    target = write_legacy_checkpoint(tmp_path, {k: v.bfloat16() for k, v in llama_weights().items()})
    with pytest.raises(
        CheckpointError, match=r"mp_rank_00: fp32 master weights must be in the optimizer's state in an "
    ):
        open_legacy_checkpoint(target, weights="master")


def test_dense_masters_may_lie_with_one_expert_rank_only(tmp_path):
    """Data-parallel rank 0 of the dense weights is one rank; each expert rank is rank 0 of its experts."""
    router, experts = torch.randn(4, 24), torch.randn(4, 40, 24)
    args = legacy_arguments(num_layers=1, num_experts=4, expert_model_parallel_size=2, data_parallel_size=2)
    target = tmp_path / "iter_0000003"
    for rank in range(2):
        dense = {"decoder.layers.0.mlp.router.weight": router}
        own = {
            f"decoder.layers.0.mlp.experts.local_experts.{i}.linear_fc1.weight": experts[2 * rank + i] for i in range(2)
        }
        states = [
            {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): {"param": flatten(held, alignment=64)}}}
            for held in (list(dense.values()), list(own.values()))
        ]
        folder = target / f"mp_rank_00_00{rank}"
        folder.mkdir(parents=True)
        torch.save([states[0] if rank == 0 else None, states[1]], folder / "distrib_optim.pt")
        model = {name: tensor.bfloat16() for name, tensor in (dense | own).items()}
        state = {"args": args, "iteration": 3, "checkpoint_version": 3.0, "model": model}
        torch.save(state, folder / "model_optim_rng.pt")
    reader = open_legacy_checkpoint(target, weights="master")
    assert torch.equal(reader.read("decoder.layers.0.mlp.router.weight"), router)
    for expert in range(4):
        name = f"decoder.layers.0.mlp.experts.experts.{expert}.linear_fc1.weight"
        assert torch.equal(reader.read(name), experts[expert])


def test_where_parameters_start():
    """Backwards from 0, on multiples of 64; a bucket ends at its size; a shared embedding is alone in its own."""
    plain = {"alignment": 64, "bucket_size": None}
    assert place_parameters([10, 70, 3], [False] * 3, **plain) == ([192, 64, 0], 202)
    assert place_parameters([10, 70, 3], [True, False, False], **plain) == ([192, 64, 0], 202)
    assert place_parameters([10, 70, 3], [False] * 3, alignment=64, bucket_size=60) == ([134, 64, 0], 144)
    assert place_parameters([10, 70, 3], [False] * 3, alignment=1, bucket_size=None) == ([73, 3, 0], 83)
    assert place_parameters([10, 70, 3], [False, False, True], **plain) == ([131, 3, 0], 141)
