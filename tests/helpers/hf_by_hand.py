"""Hugging Face's side of a toy model, written by hand: the oracle of the conversion, which calls none of its code.

`list_shapes` has the names that transformers saves, `permute_to_megatron` puts the same numbers under Megatron's names,
head by head, and `write_config` spells Megatron's arguments as config.json. tests/numerics/test_mapping_by_hand.py
holds the names to transformers itself and the conversion's rows to the permutation.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


# --- config.json -----------------------------------------------------------------------------------------------------


def write_config(args: Namespace) -> dict[str, Any]:
    """config.json of the model that Megatron builds with these arguments."""
    common = {"vocab_size": args.vocab_size, "initializer_range": args.init_method_std}
    common["tie_word_embeddings"] = not args.untie_embeddings_and_output_weights
    if args.normalization == "LayerNorm":
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": args.hidden_size,
            "n_inner": args.ffn_hidden_size,
            "n_layer": args.num_layers,
            "n_head": args.num_attention_heads,
            "n_positions": args.max_position_embeddings,
            "activation_function": "gelu_new" if args.bias_gelu_fusion else "gelu",
            "layer_norm_epsilon": args.layernorm_epsilon,
            "attn_pdrop": args.attention_dropout,
            "embd_pdrop": args.hidden_dropout,
            "resid_pdrop": args.hidden_dropout,
        }
    common |= {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups,
        "head_dim": args.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_theta": float(args.rotary_base),
        "attention_dropout": args.attention_dropout,
    }
    if getattr(args, "use_rope_scaling", False):
        common["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return common | (_experts_config(args) if args.num_experts else _dense_config(args))


def _dense_config(args: Namespace) -> dict[str, Any]:
    if getattr(args, "qk_layernorm", False):
        return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    if args.add_qkv_bias and not args.add_bias_linear:
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_window_config(args)}
    if args.hidden_size % args.num_attention_heads:  # LlamaConfig refuses it
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    has_bias = args.add_bias_linear
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has_bias,
        "mlp_bias": has_bias,
    }


def _window_config(args: Namespace) -> dict[str, Any]:
    if not getattr(args, "window_size", None):
        return {"use_sliding_window": False}
    pattern = args.window_attn_skip_freq or [1] * args.num_layers
    return {
        "use_sliding_window": True,
        "sliding_window": args.window_size[0] + 1,
        "layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in pattern],
    }


def _experts_config(args: Namespace) -> dict[str, Any]:
    shared = {"num_experts_per_tok": args.moe_router_topk, "router_aux_loss_coef": args.moe_aux_loss_coeff}
    if not args.moe_shared_expert_intermediate_size and not getattr(args, "qk_layernorm", False):
        return shared | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": args.moe_ffn_hidden_size,
            "num_local_experts": args.num_experts,
            "sliding_window": None,
        }
    shared |= {
        "num_experts": args.num_experts,
        "moe_intermediate_size": args.moe_ffn_hidden_size,
        "norm_topk_prob": not args.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if not args.moe_shared_expert_intermediate_size:
        return shared | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return shared | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
        "qkv_bias": args.add_qkv_bias,
    }


# --- names and shapes ------------------------------------------------------------------------------------------------


def list_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor that transformers saves for a model of this config.json."""
    if config["model_type"] == "gpt2":
        return _list_gpt2_shapes(config)
    h, v = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (v, h)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _list_layer_shapes(config).items()}
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    return shapes


def read_head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def count_experts(config: Mapping[str, Any]) -> int:
    """transformers spells it in three ways, and for one architecture in another way in another version."""
    return next(config[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config)


def _list_layer_shapes(config: Mapping[str, Any]) -> Shapes:
    h, d, kind = config["hidden_size"], read_head_dim(config), config["model_type"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: Shapes = {
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "post_attention_layernorm.weight": (h,),
    }
    if kind in ("qwen2", "tinyllm") or config.get("attention_bias") or config.get("qkv_bias", kind == "qwen2_moe"):
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.get("attention_bias"):
        shapes["self_attn.o_proj.bias"] = (h,)
    if kind in ("qwen3", "qwen3_moe"):
        shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    if kind == "mixtral":
        shapes["block_sparse_moe.gate.weight"] = (config["num_local_experts"], h)
        for expert in range(config["num_local_experts"]):
            names = {"gate": "w1", "up": "w3", "down": "w2"}
            parts = _list_mlp_shapes(h, config["intermediate_size"])
            shapes |= {f"block_sparse_moe.experts.{expert}.{names[part]}.weight": parts[part] for part in parts}
    elif kind in ("qwen2_moe", "qwen3_moe"):
        shapes["mlp.gate.weight"] = (config["num_experts"], h)
        for expert in range(config["num_experts"]):
            parts = _list_mlp_shapes(h, config["moe_intermediate_size"])
            shapes |= {f"mlp.experts.{expert}.{part}_proj.weight": parts[part] for part in parts}
        if kind == "qwen2_moe":
            parts = _list_mlp_shapes(h, config["shared_expert_intermediate_size"])
            shapes |= {f"mlp.shared_expert.{part}_proj.weight": parts[part] for part in parts}
            shapes["mlp.shared_expert_gate.weight"] = (1, h)
    else:
        parts = _list_mlp_shapes(h, config["intermediate_size"])
        shapes |= {f"mlp.{part}_proj.weight": parts[part] for part in parts}
        if config.get("mlp_bias"):
            shapes |= {f"mlp.{part}_proj.bias": parts[part][:1] for part in parts}
    return shapes


def _list_mlp_shapes(h: int, f: int) -> Shapes:
    return {"gate": (f, h), "up": (f, h), "down": (h, f)}


def _list_gpt2_shapes(config: Mapping[str, Any]) -> Shapes:
    h, f = config["n_embd"], config["n_inner"]
    shapes: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], h),
        "transformer.wpe.weight": (config["n_positions"], h),
    }
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}{norm}.weight": (h,), f"{prefix}{norm}.bias": (h,)}
        sizes = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, f), "mlp.c_proj": (f, h)}
        for name, (num_in, num_out) in sizes.items():
            shapes |= {f"{prefix}{name}.weight": (num_in, num_out), f"{prefix}{name}.bias": (num_out,)}
    shapes |= {"transformer.ln_f.weight": (h,), "transformer.ln_f.bias": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    return shapes


# --- the permutation -------------------------------------------------------------------------------------------------


def permute_to_megatron(config: Mapping[str, Any], hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers under Megatron's names, as megatron.core lays them out; uses every tensor of `hf` once."""
    if config["model_type"] == "gpt2":
        return _permute_gpt2(config, hf)
    left = dict(hf)
    megatron = {"embedding.word_embeddings.weight": left.pop("model.embed_tokens.weight")}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        taken = {name.removeprefix(theirs): left.pop(name) for name in list(left) if name.startswith(theirs)}
        megatron |= {ours + name: tensor for name, tensor in _permute_layer(config, taken).items()}
        assert not taken, f"{theirs}: {', '.join(taken)} has no place"
    megatron["decoder.final_layernorm.weight"] = left.pop("model.norm.weight")
    if "lm_head.weight" in left:
        megatron["output_layer.weight"] = left.pop("lm_head.weight")
    assert not left, f"{', '.join(left)} has no place"
    return megatron


def _permute_layer(config: Mapping[str, Any], hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pops what it uses from `hf`, the tensors of one layer."""
    _take_apart(config, hf)
    megatron = {"self_attention.linear_qkv.layer_norm_weight": hf.pop("input_layernorm.weight")}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in hf:
            query, key, value = (hf.pop(f"self_attn.{part}_proj.{kind}") for part in "qkv")
            groups = config.get("num_key_value_heads", config["num_attention_heads"])
            megatron[f"self_attention.linear_qkv.{kind}"] = interleave_heads(
                query, key, value, groups, read_head_dim(config)
            )
        if f"self_attn.o_proj.{kind}" in hf:
            megatron[f"self_attention.linear_proj.{kind}"] = hf.pop(f"self_attn.o_proj.{kind}")
    for part in "qk":
        if f"self_attn.{part}_norm.weight" in hf:
            megatron[f"self_attention.{part}_layernorm.weight"] = hf.pop(f"self_attn.{part}_norm.weight")
    norm = hf.pop("post_attention_layernorm.weight")
    if "mlp.gate_proj.weight" in hf:
        megatron["mlp.linear_fc1.layer_norm_weight"] = norm
        megatron |= _permute_mlp("mlp.", "mlp.{}_proj", hf)
        return megatron
    megatron["pre_mlp_layernorm.weight"] = norm
    if "block_sparse_moe.gate.weight" in hf:
        megatron["mlp.router.weight"] = hf.pop("block_sparse_moe.gate.weight")
        spelled = {"gate": "w1", "up": "w3", "down": "w2"}
        for expert in range(count_experts(config)):
            own = {part: hf.pop(f"block_sparse_moe.experts.{expert}.{spelled[part]}.weight") for part in spelled}
            renamed = {f"{part}.weight": tensor for part, tensor in own.items()}
            megatron |= _permute_mlp(f"mlp.experts.experts.{expert}.", "{}", renamed)
        return megatron
    hunyuan = "mlp.expert_bias" in hf
    megatron["mlp.router.weight"] = hf.pop("mlp.router.gate.weight" if hunyuan else "mlp.gate.weight")
    if bias := [name for name in hf if name.endswith(("e_score_correction_bias", "expert_bias"))]:
        megatron["mlp.router.expert_bias"] = hf.pop(*bias)
        megatron |= _permute_mlp("mlp.shared_experts.", f"mlp.shared_{'mlp' if hunyuan else 'experts'}.{{}}_proj", hf)
    for expert in range(count_experts(config)):
        megatron |= _permute_mlp(f"mlp.experts.experts.{expert}.", f"mlp.experts.{expert}.{{}}_proj", hf)
    if "mlp.shared_expert_gate.weight" in hf:
        megatron |= _permute_mlp("mlp.shared_experts.", "mlp.shared_expert.{}_proj", hf)
        megatron["mlp.shared_experts.gate_weight"] = hf.pop("mlp.shared_expert_gate.weight")
    return megatron


def _take_apart(config: Mapping[str, Any], hf: dict[str, Tensor]) -> None:
    """Phi-3's fused tensors and Helium's rows as Llama has them."""
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    if "self_attn.qkv_proj.weight" in hf:
        qkv, h = hf.pop("self_attn.qkv_proj.weight"), config["hidden_size"]
        d = h // heads
        ends = {"q": (0, heads * d), "k": (heads * d, (heads + groups) * d), "v": ((heads + groups) * d, len(qkv))}
        hf |= {f"self_attn.{part}_proj.weight": qkv[begin:end] for part, (begin, end) in ends.items()}
        gate_up, f = hf.pop("mlp.gate_up_proj.weight"), config["intermediate_size"]
        hf |= {"mlp.gate_proj.weight": gate_up[:f], "mlp.up_proj.weight": gate_up[f:]}
    if config["model_type"] == "helium":
        for name in [f"self_attn.{part}_proj.{kind}" for part in "qk" for kind in ("weight", "bias")]:
            if name in hf:
                d = read_head_dim(config)
                heads_of = hf[name].split(d)
                hf[name] = torch.cat([torch.cat([head[0::2], head[1::2]]) for head in heads_of])


def _permute_mlp(ours: str, theirs: str, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """linear_fc1 has the rows of the gate, which go through the activation, before those of up."""
    megatron = {}
    for kind in ("weight", "bias"):
        if f"{theirs.format('gate')}.{kind}" in hf:
            gate, up, down = (hf.pop(f"{theirs.format(part)}.{kind}") for part in ("gate", "up", "down"))
            megatron |= {f"{ours}linear_fc1.{kind}": torch.cat([gate, up]), f"{ours}linear_fc2.{kind}": down}
    return megatron


def interleave_heads(query: Tensor, key: Tensor, value: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """The rows of linear_qkv: for each group its query heads, then its key, then its value."""
    rows = []
    heads_per_group = len(query) // head_dim // num_groups
    for group in range(num_groups):
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            rows.append(query[head * head_dim : (head + 1) * head_dim])
        rows.append(key[group * head_dim : (group + 1) * head_dim])
        rows.append(value[group * head_dim : (group + 1) * head_dim])
    return torch.cat(rows)


def _permute_gpt2(config: Mapping[str, Any], hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its linear layers store [in, out], and q, k and v are columns of one matrix."""
    heads, h = config["n_head"], config["n_embd"]
    megatron = {
        "embedding.word_embeddings.weight": hf["transformer.wte.weight"],
        "embedding.position_embeddings.weight": hf["transformer.wpe.weight"],
    }
    for layer in range(config["n_layer"]):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            query, key, value = (hf[f"{theirs}attn.c_attn.{kind}"][..., n * h : (n + 1) * h] for n in range(3))
            rows = [part.t() if kind == "weight" else part for part in (query, key, value)]
            projection, fc1, fc2 = (hf[f"{theirs}{name}.{kind}"] for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
            megatron |= {
                f"{ours}self_attention.linear_qkv.layer_norm_{kind}": hf[f"{theirs}ln_1.{kind}"],
                f"{ours}self_attention.linear_qkv.{kind}": interleave_heads(*rows, heads, h // heads),
                f"{ours}self_attention.linear_proj.{kind}": projection.t() if kind == "weight" else projection,
                f"{ours}mlp.linear_fc1.layer_norm_{kind}": hf[f"{theirs}ln_2.{kind}"],
                f"{ours}mlp.linear_fc1.{kind}": fc1.t() if kind == "weight" else fc1,
                f"{ours}mlp.linear_fc2.{kind}": fc2.t() if kind == "weight" else fc2,
            }
    megatron |= {f"decoder.final_layernorm.{kind}": hf[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")}
    if "lm_head.weight" in hf:
        megatron["output_layer.weight"] = hf["lm_head.weight"]
    return megatron
