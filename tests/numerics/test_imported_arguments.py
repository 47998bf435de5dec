"""Megatron's own loader accepts the arguments of an imported checkpoint: `--use-checkpoint-args` and its checks."""

from argparse import Namespace

import pytest

from megatron_hammer.checkpoint.convert.from_hugging_face import ImportOptions, import_from_hugging_face
from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config
from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.platforms import megatron_compat
from tests.helpers.toy_hf_folder import LLAMA_CONFIG, write_toy_folder
from tests.helpers.whole_model import read_arguments

MOE = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 9,
    "norm_topk_prob": False,
}
MODELS = {"llama": {}, "qwen2 moe": MOE, "tied": {"tie_word_embeddings": True, "head_dim": 10}}


@pytest.fixture(params=MODELS)
def config(request):
    return LLAMA_CONFIG | MODELS[request.param]


@pytest.fixture
def checkpoint(tmp_path, config):
    write_toy_folder(tmp_path / "hf", **config)
    import_from_hugging_face(ImportOptions(hf_dir=tmp_path / "hf", save_dir=tmp_path / "megatron", verify="tensors"))
    return tmp_path / "megatron"


def parse(config):
    """Megatron's namespace for the flags of that model."""
    model, _ = interpret_config(config, name="toy")
    return read_arguments(model, ("--seq-length", "32", "--train-iters", "1"))


def test_use_checkpoint_args_finds_the_model(checkpoint, config):
    """Megatron's flags of another model, all of which the checkpoint's must replace."""
    megatron_compat.install("cpu")
    from megatron.training.checkpointing import load_args_from_checkpoint

    expected = build_model_arguments(interpret_config(config)[0])
    other = parse(LLAMA_CONFIG)
    taken = Namespace(**vars(other))
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "seq_length"):
        setattr(taken, name, None)  # flags that were not given
    taken.load, taken.max_position_embeddings, taken.add_bias_linear, taken.swiglu = str(checkpoint), None, True, False
    taken.rotary_base, taken.normalization, taken.num_query_groups = 7, "LayerNorm", 1
    _, saved = load_args_from_checkpoint(taken)
    assert saved.imported_from == "hf"
    # Flags for which Megatron has no `--use-checkpoint-args`.
    own = {"vocab_size", "layernorm_epsilon", "init_method_std", "embedding_norm", "qk_layernorm", "use_rope_scaling"}
    own |= {"moe_aux_loss_coeff", "moe_shared_expert_gate", "moe_token_dispatcher_type"}
    for name in expected.keys() - own:
        assert getattr(taken, name) == expected[name], name
    assert taken.iteration == 0


def test_its_checks_pass_for_the_model_and_not_for_another(checkpoint, config, monkeypatch):
    megatron_compat.install("cpu")
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    state = dist_checkpointing.load_common_state_dict(str(checkpoint / "release"))
    arguments = parse(config)
    arguments.vocab_file, arguments.use_dist_ckpt = None, True
    monkeypatch.setattr(checkpointing, "get_args", lambda: arguments)
    monkeypatch.setattr(checkpointing, "_CHECKPOINT_VERSION", state["checkpoint_version"])
    checkpointing.check_checkpoint_args(state["args"])
    arguments.hidden_size += 6
    with pytest.raises(AssertionError, match=r"hidden_size value from checkpoint \(24\) is not equal"):
        checkpointing.check_checkpoint_args(state["args"])
