"""Reading mp_rank folders: every layout and version gives the same tensors, and every kind of damage is named."""

import re
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_rows import validate_names_and_shapes
from megatron_hammer.checkpoint_files.legacy.reader import open_legacy_checkpoint
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.tensor_parallel_parts import order_qkv_by_version, split_gated_columns
from tests.helpers.toy_legacy_checkpoint import (
    NUM_LAYERS,
    OLD_LAYER,
    gpt2_weights,
    legacy_arguments,
    llama_weights,
    write_legacy_checkpoint,
)
from tests.helpers.toy_model import GPT2_ARGUMENTS, LLAMA

QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.{}.mlp.linear_fc1.weight"
HIDDEN, HEADS, HEAD_DIM = LLAMA.hidden_size, LLAMA.num_attention_heads, LLAMA.head_dim


def assert_reads(directory, weights):
    reader = open_legacy_checkpoint(directory)
    assert reader.tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (reader.tensors[name].shape, reader.tensors[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor), name
    return reader


@pytest.mark.parametrize(
    "tp, stages, changes",
    [
        pytest.param(1, ((4,),), {}, id="one"),
        pytest.param(2, ((2,), (2,)), {}, id="tp2-pp2"),
        pytest.param(4, ((1, 1), (1, 1)), {}, id="tp4-pp2-vp2-fewer-groups-than-ranks"),
        pytest.param(1, ((1,), (3,)), {"decoder_first_pipeline_num_layers": 1}, id="uneven"),
        pytest.param(
            2,
            ((1,), (2,), (1,)),
            {
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            id="embedding-and-loss-counted",
        ),
        pytest.param(1, ((0, 2), (1, 1)), {"pipeline_model_parallel_layout": "E|t|tt|tL"}, id="free-layout"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_gives_the_same_tensors(tmp_path, tp, stages, changes, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in llama_weights().items()}
    args = legacy_arguments(tensor_model_parallel_size=tp, pipeline_model_parallel_size=len(stages), **changes)
    target = write_legacy_checkpoint(tmp_path, weights, tp=tp, stages=stages, arguments=args)
    reader = assert_reads(target, weights)
    assert (reader.iteration, reader.args.hidden_size) == (10, HIDDEN)


def test_the_padding_of_the_vocabulary_is_left_out(tmp_path):
    weights = llama_weights()
    reader = open_legacy_checkpoint(write_legacy_checkpoint(tmp_path, weights, tp=2))
    reader.remove_vocab_padding(53)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert reader.tensors[name].shape == (53, HIDDEN)
        assert torch.equal(reader.read(name), weights[name][:53])


def test_gate_and_up_stored_as_plain_rows_give_other_weights(tmp_path):
    """The twin of the interleaved halves: read as a plain MLP, the same files give other rows."""
    weights = llama_weights()
    args = legacy_arguments(tensor_model_parallel_size=2, swiglu=False)
    honest = legacy_arguments(tensor_model_parallel_size=2)

    def keep_halves(state, tp_rank, _):
        for layer in range(NUM_LAYERS):
            state["model"][FC1.format(layer)] = split_gated_columns(weights[FC1.format(layer)], 2)[tp_rank]

    broken = open_legacy_checkpoint(
        write_legacy_checkpoint(tmp_path / "a", weights, tp=2, arguments=args, change=keep_halves)
    )
    assert not torch.equal(broken.read(FC1.format(0)), weights[FC1.format(0)])
    assert_reads(write_legacy_checkpoint(tmp_path / "b", weights, tp=2, arguments=honest), weights)


def test_ranks_read_in_another_order_give_other_query_groups(tmp_path):
    weights = llama_weights()
    target = write_legacy_checkpoint(tmp_path, weights, tp=2)
    (target / "mp_rank_00").rename(target / "first")
    (target / "mp_rank_01").rename(target / "mp_rank_00")
    (target / "first").rename(target / "mp_rank_01")
    swapped = open_legacy_checkpoint(target).read(QKV.format(1))
    assert not torch.equal(swapped, weights[QKV.format(1)])
    assert torch.equal(swapped, weights[QKV.format(1)].roll(weights[QKV.format(1)].shape[0] // 2, 0))


def test_experts_of_expert_parallel_ranks_get_their_numbers(tmp_path):
    """Four experts on ep=2; with expert_tp=1 inside tp=2, only two of the four (tp, ep) exist."""
    fc1, fc2 = torch.randn(4, 2 * 10, HIDDEN), torch.randn(4, HIDDEN, 10)
    router, shared = torch.randn(4, HIDDEN), torch.randn(2 * 6, HIDDEN)
    args = legacy_arguments(
        num_layers=1, num_experts=4, tensor_model_parallel_size=2, expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )  # fmt: skip
    target = tmp_path / "iter_0000003"
    for rank in range(2):  # tp = rank, ep = rank
        experts = {}
        for local in range(2):
            prefix = f"decoder.layers.0.mlp.experts.local_experts.{local}"
            experts |= {
                f"{prefix}.linear_fc1.weight": fc1[2 * rank + local].clone(),
                f"{prefix}.linear_fc2.weight": fc2[2 * rank + local].clone(),
                f"{prefix}.linear_fc2._extra_state": None,
            }
        dense = {
            "decoder.layers.0.pre_mlp_layernorm.weight": torch.ones(HIDDEN),
            "decoder.layers.0.mlp.router.weight": router,
            "decoder.layers.0.mlp.shared_experts.linear_fc1.weight": split_gated_columns(shared, 2)[rank],
        }
        state = {"args": args, "iteration": 3, "checkpoint_version": 3.0, "model": dense | experts}
        (target / f"mp_rank_0{rank}_00{rank}").mkdir(parents=True)
        torch.save(state, target / f"mp_rank_0{rank}_00{rank}" / "model_optim_rng.pt")
    reader = open_legacy_checkpoint(target)
    assert len(reader.tensors) == 3 + 8
    for expert in range(4):
        name = f"decoder.layers.0.mlp.experts.experts.{expert}.linear_fc"
        assert torch.equal(reader.read(f"{name}1.weight"), fc1[expert])
        assert torch.equal(reader.read(f"{name}2.weight"), fc2[expert])
    assert torch.equal(reader.read("decoder.layers.0.mlp.router.weight"), router)
    assert torch.equal(reader.read("decoder.layers.0.mlp.shared_experts.linear_fc1.weight"), shared)


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_are_cut_by_their_own_tensor_parallelism(tmp_path, ep):
    """expert_tp=2 in tp=2, named as TransformerEngine's grouped layer names them."""
    fc1 = torch.randn(2, 2 * 10, HIDDEN)
    args = legacy_arguments(num_layers=1, num_experts=2, tensor_model_parallel_size=2, expert_model_parallel_size=ep)
    target = tmp_path / "iter_0000003"
    for ep_rank in range(ep):
        for tp_rank in range(2):
            held = range(ep_rank * 2 // ep, (ep_rank + 1) * 2 // ep)
            model = {
                f"decoder.layers.0.mlp.experts.linear_fc1.weight{local}": split_gated_columns(fc1[expert], 2)[tp_rank]
                for local, expert in enumerate(held)
            }
            folder = target / (f"mp_rank_0{tp_rank}" + (f"_00{ep_rank}" if ep > 1 else ""))
            folder.mkdir(parents=True)
            state = {"args": args, "iteration": 3, "checkpoint_version": 3.0, "model": model}
            torch.save(state, folder / "model_optim_rng.pt")
    reader = open_legacy_checkpoint(target)
    for expert in range(2):
        read = reader.read(f"decoder.layers.0.mlp.experts.experts.{expert}.linear_fc1.weight")
        assert torch.equal(read, fc1[expert])


def old_spelling(weights, *, part, checkpoint_version):
    """Nested and named as before megatron-core; `part` is the module's name of that time."""
    layers = {}
    for layer in range(NUM_LAYERS):
        for old, new in OLD_LAYER.items():
            attention = "attention" if part == "transformer" else "self_attention"
            for kind in ("weight", "bias"):
                tensor = weights[f"decoder.layers.{layer}.{new}{kind}"]
                if old.endswith("query_key_value"):
                    tensor = order_qkv_by_version(tensor, checkpoint_version=checkpoint_version, head_dim=HEAD_DIM)
                layers[f"layers.{layer}.{re.sub('^attention', attention, old)}.{kind}"] = tensor.clone()
    for kind in ("weight", "bias"):
        layers[f"final_layernorm.{kind}"] = weights[f"decoder.final_layernorm.{kind}"]
    embedding = {
        f"{kind}_embeddings": {"weight": weights[f"embedding.{kind}_embeddings.weight"]}
        for kind in ("word", "position")
    }
    return {"language_model": {"embedding": embedding, part: layers}}


def old_arguments():
    """What Megatron-LM of 2020 saved that matters."""
    return Namespace(
        num_layers=NUM_LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS,
        max_position_embeddings=LLAMA.max_position_embeddings, layernorm_epsilon=1e-5, init_method_std=0.02,
        attention_dropout=0.1, hidden_dropout=0.1, padded_vocab_size=64, model_parallel_size=1,
        ffn_hidden_size=LLAMA.ffn_hidden_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    "part, checkpoint_version, is_zip",
    [("transformer", 0, False), ("transformer", 1.0, True), ("encoder", 2.0, True), ("encoder", 3.0, True)],
)
def test_models_of_before_megatron_core_are_read(tmp_path, part, checkpoint_version, is_zip):
    weights = gpt2_weights()

    def respell(state, *_):
        state["model"] = old_spelling(weights, part=part, checkpoint_version=checkpoint_version)
        if checkpoint_version == 0:
            del state["checkpoint_version"]
        state["rng_state"] = ("MT19937", np.arange(3))

    target = write_legacy_checkpoint(
        tmp_path, weights, arguments=Namespace(**vars(old_arguments()), **GPT2_ARGUMENTS), change=respell,
        checkpoint_version=checkpoint_version, _use_new_zipfile_serialization=is_zip,
    )  # fmt: skip
    reader = assert_reads(target, weights)
    model = read_saved_model(reader.args)
    pairs = expand(select_family(model), model)
    shapes = {name: stored.shape for name, stored in reader.tensors.items()}
    validate_names_and_shapes({pair.megatron_name: pair.megatron_shape for pair in pairs}, shapes, where="here")
    assert model.activation == "gelu_tanh"


def test_missing_arguments_get_the_behaviour_of_the_old_megatron(tmp_path):
    """Without today's arguments: LayerNorm, learned positions, biases, tied embeddings, no groups."""
    weights = gpt2_weights()

    def respell(state, *_):
        state["model"] = old_spelling(weights, part="encoder", checkpoint_version=2.0)
        state["args"] = old_arguments()

    toy = legacy_arguments(**GPT2_ARGUMENTS)
    target = write_legacy_checkpoint(tmp_path, weights, arguments=toy, change=respell, checkpoint_version=2.0)
    model = read_saved_model(assert_reads(target, weights).args)
    assert select_family(model).hf_class == "GPT2LMHeadModel"
    assert (model.head_dim, model.num_query_groups, model.vocab_size) == (HEAD_DIM, HEADS, 64)
    assert (model.has_tied_embeddings, model.has_linear_bias, model.position_embedding_type) == (
        *(True, True),
        "learned_absolute",
    )


def test_a_version_without_a_defined_order_is_refused(tmp_path):
    weights = gpt2_weights()

    def respell(state, *_):
        state["model"] = old_spelling(weights, part="encoder", checkpoint_version=2.0)

    target = write_legacy_checkpoint(
        tmp_path, weights, arguments=legacy_arguments(**GPT2_ARGUMENTS), change=respell, checkpoint_version=1.7
    )
    with pytest.raises(CheckpointError, match=r"the order of query_key_value is defined for 0, 1, 2 and 3, got 1\.7\b"):
        open_legacy_checkpoint(target)


def test_copies_of_a_tied_embedding_must_be_equal(tmp_path):
    weights = gpt2_weights()
    args = legacy_arguments(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, **GPT2_ARGUMENTS)
    options = {"tp": 2, "stages": ((2,), (2,)), "arguments": args}
    assert_reads(write_legacy_checkpoint(tmp_path / "same", weights, **options), weights)

    def drift(state, tp_rank, pp_rank):
        if (tp_rank, pp_rank) == (1, 1):
            state["model"]["output_layer.weight"][3, 5] += 1

    reader = open_legacy_checkpoint(write_legacy_checkpoint(tmp_path / "drift", weights, change=drift, **options))
    with pytest.raises(
        ConversionError,
        match=r"mp_rank_01_001/model_optim_rng.pt: embedding.word_embeddings.weight must equal .*"
        r"mp_rank_01_000/model_optim_rng.pt, got a difference",
    ):
        reader.read("embedding.word_embeddings.weight")


def test_replicated_tensors_must_be_equal_on_all_ranks(tmp_path):
    def drift(state, tp_rank, _):
        state["model"]["decoder.layers.2.mlp.linear_fc1.layer_norm_weight"][4] += tp_rank

    reader = open_legacy_checkpoint(write_legacy_checkpoint(tmp_path, llama_weights(), tp=2, change=drift))
    with pytest.raises(ConversionError, match=r"mp_rank_01.*: decoder.layers.2.mlp.linear_fc1.layer_norm_weight must"):
        reader.read("decoder.layers.2.mlp.linear_fc1.layer_norm_weight")


def test_missing_truncated_and_mixed_ranks_are_all_named(tmp_path):
    def mix(state, tp_rank, pp_rank):
        if (tp_rank, pp_rank) == (1, 1):
            state["iteration"] = 11

    target = write_legacy_checkpoint(tmp_path, llama_weights(), tp=2, stages=((2,), (2,)), change=mix)
    (target / "mp_rank_00_001" / "model_optim_rng.pt").unlink()
    short = target / "mp_rank_01_000" / "model_optim_rng.pt"
    short.write_bytes(short.read_bytes()[:5000])
    (target / "mp_rank_07_000").mkdir()
    (target / "mp_rank_07_000" / "model_optim_rng.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"mp_rank_00_001: rank must hold model_optim_rng\.pt, got no such"
    ) as caught:
        open_legacy_checkpoint(target)
    truncated, _, foreign, mixed = caught.value.problems
    assert "mp_rank_01_000/model_optim_rng.pt: contents must be what --ckpt-format torch writes, got EOF" in truncated
    assert "EOFError: the archive has no end. The file is damaged" in truncated
    assert "mp_rank_07_000: rank must be one of tp=2, pp=2, ep=1" in foreign
    assert "mp_rank_01_001/model_optim_rng.pt: iteration must be that of mp_rank_00_000, got 11 and 10" in mixed


def test_a_model_whose_optimizer_lies_apart_is_read(tmp_path):
    """Before megatron-core the distributed optimizer wrote mp_rank_TT/model_rng.pt and mp_rank_TT_DDD/optim.pt."""
    weights = llama_weights()
    target = write_legacy_checkpoint(tmp_path, weights, tp=2)
    for tp_rank in range(2):
        folder = target / f"mp_rank_{tp_rank:02d}"
        (folder / "model_optim_rng.pt").rename(folder / "model_rng.pt")
        (target / f"{folder.name}_000").mkdir()
        torch.save({}, target / f"{folder.name}_000" / "optim.pt")
    assert_reads(target, weights)


@pytest.mark.parametrize("content", [[1, 2], {"iteration": 10}, {"args": None, "model": 3}])
def test_a_file_without_a_model_is_refused(tmp_path, content):
    target = write_legacy_checkpoint(tmp_path, llama_weights(), tp=2)
    torch.save(content, target / "mp_rank_01" / "model_optim_rng.pt")
    with pytest.raises(
        CheckpointError, match=r"mp_rank_01/model_optim_rng\.pt: (must hold model, or|contents must be)"
    ):
        open_legacy_checkpoint(target)


def test_files_of_two_iterations_are_noticed(tmp_path):
    target = write_legacy_checkpoint(tmp_path, llama_weights())
    renamed = target.rename(tmp_path / "iter_0000020")
    with pytest.raises(CheckpointError, match=r"state must be of iteration 20, got iteration=10\b"):
        open_legacy_checkpoint(renamed)


def test_layers_that_are_not_the_models_are_refused(tmp_path):
    target = write_legacy_checkpoint(tmp_path / "few", llama_weights(), stages=((1,), (1,)))
    with pytest.raises(CheckpointError, match=r"stages must hold num_layers=4 layers in all, got \[\[1\], \[1\]\]"):
        open_legacy_checkpoint(target)
    target = write_legacy_checkpoint(tmp_path / "uneven", llama_weights(), stages=((1,), (3,)))
    with pytest.raises(CheckpointError, match=r"stages must hold \[\[2\], \[2\]\] layers, as the arguments say"):
        open_legacy_checkpoint(target)


def test_all_tensors_without_a_rule_are_named_at_once(tmp_path):
    def add(state, *_):
        state["model"] |= {"lm_head.bias": torch.zeros(64), "decoder.layers.0.mlp.weird": [1]}

    target = write_legacy_checkpoint(tmp_path, llama_weights(), change=add)
    with pytest.raises(CheckpointError, match=r"decoder.layers.0.mlp.weird must be a tensor, got list") as caught:
        open_legacy_checkpoint(target)
    assert len(caught.value.problems) == 2
    assert "lm_head.bias: no rule says how it lies on the ranks" in str(caught.value)


def test_parts_that_do_not_fit_are_named(tmp_path):
    def change(state, tp_rank, _):
        if tp_rank == 1:
            del state["model"]["output_layer.weight"]
            state["model"][QKV.format(0)] = torch.randn(8, HIDDEN)

    target = write_legacy_checkpoint(tmp_path, llama_weights(), tp=2, change=change)
    with pytest.raises(CheckpointError, match=r"output_layer.weight: every one of 2 ranks must hold a part, got none"):
        open_legacy_checkpoint(target)
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight: must have one shape and dtype on all ranks, got \("):
        open_legacy_checkpoint(target)


def test_expert_shards_that_overwrote_each_other_are_refused(tmp_path):
    args = legacy_arguments(num_experts=4, expert_tensor_parallel_size=2)
    target = write_legacy_checkpoint(tmp_path, llama_weights(), arguments=args)
    with pytest.raises(CheckpointError, match="expert_tensor_parallel_size must divide tensor_model_parallel_size"):
        open_legacy_checkpoint(target)


def test_a_checkpoint_without_ranks_or_arguments_is_refused(tmp_path):
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(CheckpointError, match=r"must hold mp_rank_\* folders with model_optim_rng.pt, got none"):
        open_legacy_checkpoint(tmp_path)
    target = write_legacy_checkpoint(tmp_path, llama_weights(), change=lambda state, *_: state.pop("args"))
    with pytest.raises(CheckpointError, match="must hold Megatron's arguments, got none"):
        open_legacy_checkpoint(target)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_with_code_is_refused_and_does_not_run(tmp_path, is_zip):
    target = write_legacy_checkpoint(
        tmp_path,
        llama_weights(),
        change=lambda state, *_: state.update(rng_state=Evil()),
        _use_new_zipfile_serialization=is_zip,
    )
    with pytest.raises(
        CheckpointError, match=r"model_optim_rng.pt: contents must be what --ckpt-format torch writes, "
    ):
        open_legacy_checkpoint(target)


def test_types_of_megatron_and_numpy_are_read_as_inert(tmp_path):
    """Even code of a listed package does not run: its name becomes a record."""

    class Deadly:
        def __reduce__(self):
            return (np.load, ("/nonexistent",))

    weights = llama_weights()
    target = write_legacy_checkpoint(tmp_path, weights, change=lambda state, *_: state.update(rng_state=[Deadly()]))
    assert_reads(target, weights)


def test_types_allowed_for_torch_load_are_still_refused(tmp_path):
    """megatron's import allows numpy's functions, which must neither run nor clash with their stand-ins."""
    weights = llama_weights()
    reconstruct = np.arange(3).__reduce__()[0]
    target = write_legacy_checkpoint(tmp_path, weights, change=lambda state, *_: state.update(rng_state=np.arange(3)))
    with torch.serialization.safe_globals([reconstruct, np.ndarray, np.dtype, exec]):
        before = set(torch.serialization.get_safe_globals())
        assert_reads(target, weights)
        assert set(torch.serialization.get_safe_globals()) == before
        torch.save({"model": {}, "args": Evil()}, target / "mp_rank_00" / "model_optim_rng.pt")
        with pytest.raises(CheckpointError, match=r"got type \S+ is not on the list of types"):
            open_legacy_checkpoint(target)


def test_reading_imports_no_megatron(tmp_path):
    target = write_legacy_checkpoint(tmp_path, llama_weights())
    code = (
        "import sys; from pathlib import Path; "
        "from megatron_hammer.checkpoint_files.legacy.reader import open_legacy_checkpoint; "
        f"open_legacy_checkpoint(Path({str(target)!r})).read('output_layer.weight'); "
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'transformers')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_under_the_name_of_every_python(tmp_path, module):
    """Python 3.13 pickles a path as pathlib._local.PosixPath, other versions as pathlib.PosixPath."""

    class Pickled:
        def __reduce__(self):
            return kind, ("corpus", "a.bin")

    kind = type("PosixPath", (), {"__module__": module, "__qualname__": "PosixPath"})
    names = types.ModuleType(module)
    names.PosixPath = kind
    weights = llama_weights()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, module, names)
        target = write_legacy_checkpoint(tmp_path, weights, arguments=legacy_arguments(data=Pickled()))
    assert open_legacy_checkpoint(target).args.data == Path("corpus/a.bin")
