"""What transformers computes from a Hugging Face folder, in its own process: `python -m ... <folder>`.

Reads the request in `folder` and writes the reference tensors and its findings there. Nothing is fetched, no code of
the model's folder is run. `verify_conversion.py` starts it; `megatron_forward.py` reads what it writes.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, FAMILIES, build_config, read_hf_model
from megatron_hammer.checkpoint.hugging_face.tensor_sources import HF_BUFFER_ENDINGS
from megatron_hammer.checkpoint.verification.forward_exchange import (
    NOT_DONE,
    NUM_RANDOM_TEXTS,
    REFERENCE_FILE,
    SEED,
    TRANSFORMERS_FINDINGS_FILE,
    ForwardRequest,
    read_request,
    write_findings,
)
from megatron_hammer.checkpoint.verification.layer_check import (
    draw_hidden_states,
    draw_tokens,
    replace_layer_input,
    select_names,
    shorten_window,
)
from megatron_hammer.checkpoint.verification.logit_comparison import measure_difference
from megatron_hammer.checkpoint_files.safetensors.weight_files import HfWeights, open_hf_weights
from megatron_hammer.errors import ConversionError, exit_on_user_error
from megatron_hammer.files.command_line import importing

ATTENTION = "eager"  # the plainest one; how far sdpa is from it says how much rounding alone can do
OTHER_ATTENTION = "sdpa"
VOCABULARY_ENDINGS = ("embed_tokens.weight", "wte.weight", "lm_head.weight")  # Llama, GPT-2, the head of both


@exit_on_user_error
def main() -> None:
    """Compute what the request asks for with transformers; write the tensors, then the findings.

    Argument: the folder of the exchange. Where transformers does not import, the findings say so instead.
    """
    folder = Path(sys.argv[1])
    request = read_request(folder)
    try:
        import transformers
    except Exception as error:  # a broken installation can raise nearly anything
        write_findings(folder / TRANSFORMERS_FINDINGS_FILE, {NOT_DONE: f"transformers does not import: {error}"})
        return
    with importing():
        from transformers import AutoModelForCausalLM  # noqa: F401  its modules; transformers itself is a stub
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    with torch.no_grad():
        tensors, findings = run_model(request) if request.layers is None else run_layers(request)
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / REFERENCE_FILE)
    write_findings(folder / TRANSFORMERS_FINDINGS_FILE, findings)


# --- the whole model -------------------------------------------------------------------------------------------------


def run_model(request: ForwardRequest) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Logits [s, v] of every text, and how much they change with another attention kernel on the first text."""
    import transformers

    config, class_note = load_config(request.hf_dir)
    _shorten_window(config, request.window_shift)
    options = _loading_options(request, config)
    # Class and weights are both arguments here, so nothing in the folder can choose another class.
    if class_note:  # the folder's own class is not to be run: its equal, with the folder's weights
        weights = open_hf_weights(Path(request.hf_dir))
        state = {name: weights.read(name) for name in weights.shapes}
        model, loading = _find_class(config).from_pretrained(None, config=config, state_dict=state, **options)
    else:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            request.hf_dir, config=config, local_files_only=True, trust_remote_code=False, **options
        )
    _validate_loading(loading, request.hf_dir)
    _round_weights(model, request.hf_rounding)
    model.eval()
    texts, has_tokenizer = tokenize(request)
    tensors: dict[str, Tensor] = {}
    for number, tokens in enumerate(texts):
        tensors[f"tokens.{number}"] = tokens
        tensors[f"logits.{number}"] = model(tokens[None]).logits[0].float()
    model.set_attn_implementation(OTHER_ATTENTION)
    noise = measure_difference(model(texts[0][None]).logits[0], tensors["logits.0"])
    # One standard deviation for all texts, because the limits are judged over all texts.
    stacked = torch.cat([tensors[f"logits.{number}"].flatten() for number in range(len(texts))])
    findings = {
        "class": type(model).__name__ + class_note,
        "attention": ATTENTION,
        "num_texts": len(texts),
        "has_tokenizer": has_tokenizer,
        "noise": dataclasses.asdict(noise),
        "std": stacked.std().item(),
    }
    return tensors, findings


def load_config(hf_dir: str) -> tuple[Any, str]:
    """The folder's config, and "" or which class stands for one whose code is in the folder and therefore not run."""
    import transformers

    model_type = json.loads((Path(hf_dir) / CONFIG_NAME).read_bytes()).get("model_type")
    if model_type not in FAMILIES or not FAMILIES[model_type].has_own_code:
        config = transformers.AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
        return config, ""
    found = read_hf_model(Path(hf_dir))
    values = build_config(
        found.family, found.shape, found.dropout, dtype=found.dtype or "float32", bos_id=None, eos_id=None
    )
    return transformers.AutoConfig.for_model(**values), f" in place of {FAMILIES[model_type].hf_classes[0]}"


def _shorten_window(config: Any, shift: int) -> None:
    if getattr(config, "sliding_window", None) and shift:
        config.sliding_window = shorten_window(config.sliding_window, shift, longest=config.max_position_embeddings)


def _loading_options(request: ForwardRequest, config: Any) -> dict[str, Any]:
    """Of from_pretrained. Experts in a loop: the grouped product, which is faster, refuses some widths."""
    has_experts = any(hasattr(config, name) for name in ("num_experts", "num_local_experts"))
    return {
        "dtype": getattr(torch, request.dtype),
        "attn_implementation": ATTENTION,
        "output_loading_info": True,
        **({"experts_implementation": "eager"} if has_experts else {}),
    }


def _find_class(config: Any) -> Any:
    """The class with a language-model head for that config."""
    import transformers

    # Only its class is wanted: on the meta device no memory is allocated.
    with torch.device("meta"):
        return type(transformers.AutoModelForCausalLM.from_config(config))


def _validate_loading(loading: dict[str, Any], hf_dir: str) -> None:
    """Raise ConversionError if transformers filled a tensor by chance or left one out."""
    problems = [
        f"{hf_dir}: transformers must load every tensor, got {what.removesuffix('_keys')} "
        f"{sorted(map(str, names))[:5]}. "
        "The names are not those of its class."
        # transformers only warns about these and fills missing tensors at random: another model would be compared.
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (names := loading.get(what))
    ]
    if problems:
        raise ConversionError(*problems)


def _round_weights(model: Any, dtype: str | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))


def tokenize(request: ForwardRequest) -> tuple[list[Tensor], bool]:
    """The texts as token ids [s], by the folder's tokenizer; where it has none, ids drawn by a fixed seed.

    Raises ConversionError if the tokenizer gives an id that the model does not have.
    """
    # Cut after the tokenizer, so that a text ends with a whole token.
    longest = request.num_tokens
    tokenizer = _load_tokenizer(request.hf_dir)
    if tokenizer is None:
        drawn = [draw_tokens(request.vocab_size, length=longest, seed=SEED + i) for i in range(NUM_RANDOM_TEXTS)]
        return drawn, False
    texts = [tokenizer(text)["input_ids"][:longest] for text in request.texts]
    too_large = max((token for tokens in texts for token in tokens), default=0)
    if too_large >= request.vocab_size:
        raise ConversionError(
            f"{request.hf_dir}: tokenizer must give ids below vocab_size={request.vocab_size}, got {too_large}. "
            "It is the tokenizer of another model."
        )
    if not any(len(tokens) > 1 for tokens in texts):
        raise ConversionError(
            f"texts: at least one must have two tokens, got {list(request.texts)[:3]}. Pass longer ones."
        )
    # One token has no next token, so it has no loss.
    return [torch.tensor(tokens) for tokens in texts if len(tokens) > 1], True


def _load_tokenizer(hf_dir: str) -> Any:
    """The folder's tokenizer, None if it has none that loads without running the folder's code."""
    import transformers

    if not any((Path(hf_dir) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    except ValueError:  # its class is code of the folder
        return None


# --- layer by layer --------------------------------------------------------------------------------------------------


def run_layers(request: ForwardRequest) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of every sampled layer alone: its output [s, h], the logits [s, rows] after it, and the embedding's rows."""
    weights = open_hf_weights(Path(request.hf_dir))
    tensors: dict[str, Tensor] = {}
    noise: dict[str, list[dict[str, Any]]] = {"noise": [], "logits_noise": []}
    name = ""
    for layer in request.layers or ():
        config, class_note = load_config(request.hf_dir)
        _shorten_window(config, request.window_shift)
        model = build_one_layer(config, weights, layer, request)
        name = type(model).__name__ + class_note
        hidden = draw_hidden_states(request.num_tokens, config.hidden_size, seed=SEED + layer).to(model.dtype)
        output, logits = run_layer(model, hidden)
        tensors[f"output.{layer}"], tensors[f"logits.{layer}"] = output.float(), logits.float()
        # The same for every layer, so the last one is kept.
        tensors["embedding"] = model.get_input_embeddings().weight[: len(request.rows)].clone()
        model.set_attn_implementation(OTHER_ATTENTION)
        for kind, again, before in zip(noise, run_layer(model, hidden), (output, logits), strict=True):
            noise[kind].append(dataclasses.asdict(measure_difference(again, before)))
        del model
    return tensors, {"class": name, "attention": ATTENTION, **noise}


def run_layer(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output [s, h] of the model's only layer on `hidden` [s, h], and the logits [s, v] that follow."""
    body = model.get_decoder()
    layer = (body.layers if hasattr(body, "layers") else body.h)[0]
    tokens = draw_tokens(model.config.vocab_size, length=len(hidden))
    with replace_layer_input(layer, hidden[None]) as outputs:
        logits = model(tokens[None]).logits
    return outputs[0][0], logits[0]


def build_one_layer(config: Any, weights: HfWeights, layer: int, request: ForwardRequest) -> Any:
    """The folder's class with this layer as its only one and the sampled rows as its vocabulary."""
    names = select_names(weights.shapes, layer)
    config.num_hidden_layers, config.vocab_size = 1, len(request.rows)
    # The ids may lie beyond the sampled rows, which are the whole vocabulary here.
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
    for name in ("layer_types", "no_rope_layers"):
        # The list must have one entry per layer, and this model has one layer.
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer]])
    _choose_kind(config, is_mixture=any(".experts." in name for name in names.values()))
    dtype = getattr(torch, request.dtype)
    rounding = getattr(torch, request.hf_rounding) if request.hf_rounding else None
    state = {}
    for name, new_name in names.items():
        tensor = weights.read(name)
        if name.endswith(VOCABULARY_ENDINGS):
            tensor = tensor[list(request.rows)]
        if not name.endswith(HF_BUFFER_ENDINGS):
            tensor = (tensor if rounding is None else tensor.to(rounding)).to(dtype)
        state[new_name] = tensor
    options = _loading_options(request, config)
    model, loading = _find_class(config).from_pretrained(None, config=config, state_dict=state, **options)
    _validate_loading(loading, request.hf_dir)
    return model.eval()


def _choose_kind(config: Any, *, is_mixture: bool) -> None:
    """Let the only layer be a mixture of experts or a dense one, in the spelling of the class."""
    kinds = {
        "first_k_dense_replace": int(not is_mixture),
        "mlp_only_layers": [] if is_mixture else [0],
        "decoder_sparse_step": 1,
        "mlp_layer_types": ["sparse" if is_mixture else "dense"],
    }
    for name, value in kinds.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


if __name__ == "__main__":
    main()
