"""Compares what Megatron computes from a checkpoint with what transformers has written: `python -m ... <folder>`.

The second process of `verify_conversion.py`. It reads the request and the reference in `folder` and writes numbers
only.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.verification.forward_exchange import (
    MEGATRON_FINDINGS_FILE,
    NOT_DONE,
    REFERENCE_FILE,
    SEED,
    TRANSFORMERS_FINDINGS_FILE,
    ForwardRequest,
    read_findings,
    read_request,
    write_findings,
)
from megatron_hammer.checkpoint.verification.layer_check import (
    describe_layer,
    draw_hidden_states,
    draw_tokens,
    replace_layer_input,
    select_names,
    shorten_window,
)
from megatron_hammer.checkpoint.verification.logit_comparison import compare_logits, measure_difference, merge_texts
from megatron_hammer.checkpoint_files.checkpoint_reader import BUFFER_ENDINGS, VOCABULARY_TENSORS
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.errors import exit_on_user_error

NORM_WEIGHT_ENDINGS = ("layer_norm_weight", "layernorm.weight")
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


@exit_on_user_error
def main() -> None:
    """Compute what the request asks for with Megatron, compare it with transformers' file and write the findings.

    Argument: the folder of the exchange. Where megatron does not import, the findings say so instead.
    """
    folder = Path(sys.argv[1])
    request = read_request(folder)
    try:
        from megatron_hammer.platforms import megatron_compat

        # Before megatron is imported: its @jit_fuser is torch.compile, which must be off on a CPU (megatron_compat.py).
        megatron_compat.install("cpu")
        import megatron.training  # noqa: F401
    except Exception as error:  # a broken installation can raise nearly anything
        write_findings(folder / MEGATRON_FINDINGS_FILE, {NOT_DONE: f"megatron-core does not import: {error}"})
        return
    from safetensors import safe_open

    from megatron_hammer.checkpoint.verification.megatron_model import single_rank

    torch.manual_seed(SEED)
    with safe_open(folder / REFERENCE_FILE, framework="pt") as reference, single_rank(), torch.no_grad():
        if request.layers is None:
            num_texts = read_findings(folder / TRANSFORMERS_FINDINGS_FILE)["num_texts"]
            findings = compare_model(request, reference, num_texts)
        else:
            findings = compare_layers(request, reference)
    write_findings(folder / MEGATRON_FINDINGS_FILE, findings)


def compare_model(request: ForwardRequest, reference: Any, num_texts: int) -> dict[str, Any]:
    """The differences over every text; reference: the opened file of transformers' tokens and logits."""
    from megatron_hammer.checkpoint.verification.megatron_model import build_model, compute_logits, read_model_arguments

    reader = _open(request)
    namespace = read_model_arguments(reader.saved_args, **_changes(request, reader, request.vocab_size))
    model = build_model(namespace)
    _fill(model, reader, request, {name: name for name in reader.tensors})
    differences = []
    for number in range(num_texts):
        tokens = reference.get_tensor(f"tokens.{number}")
        logits = compute_logits(model, tokens)
        differences.append(compare_logits(logits, reference.get_tensor(f"logits.{number}"), tokens))
    return dataclasses.asdict(merge_texts(differences))


def compare_layers(request: ForwardRequest, reference: Any) -> dict[str, Any]:
    """The differences of every sampled layer alone, of the rows of the embedding, and of the norm and head after it."""
    from megatron_hammer.checkpoint.verification.megatron_model import build_model, read_model_arguments

    reader = _open(request)
    found = []
    for layer in request.layers or ():
        changes = {**_changes(request, reader, len(request.rows)), "num_layers": 1}
        changes |= describe_layer(reader.saved_args, layer)
        if reader.args.num_experts:
            changes["moe_layer_freq"] = [int(_is_mixture(reader.args.moe_layer_freq, layer))]
        model = build_model(read_model_arguments(reader.saved_args, **changes))
        _fill(model, reader, request, select_names(reader.tensors, layer))
        hidden = draw_hidden_states(request.num_tokens, reader.args.hidden_size, seed=SEED + layer)
        # Drawn in fp32 and then rounded, as on the other side, so that both get the same numbers.
        hidden = hidden.to(getattr(torch, request.dtype))
        output, logits = run_layer(model, hidden, num_rows=len(request.rows))
        expected, expected_logits = (reference.get_tensor(f"{name}.{layer}") for name in ("output", "logits"))
        embedding = model.embedding.word_embeddings.weight
        found.append(
            {
                "layer": layer,
                "output": dataclasses.asdict(measure_difference(output, expected)),
                "output_std": (expected - hidden.float()).std().item(),  # of what the layer adds
                "logits": dataclasses.asdict(measure_difference(logits, expected_logits)),
                "logits_std": expected_logits.std().item(),
                "embedding": measure_difference(embedding, reference.get_tensor("embedding")).max,
            }
        )
        # Before the next is built: otherwise two layers would be in memory at a time.
        del model
    return {"layers": found}


def _is_mixture(frequency: Any, layer: int) -> bool:
    return bool(frequency[layer]) if isinstance(frequency, list) else layer % frequency == 0


def run_layer(model: Any, hidden: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """The output [s, h] of the model's only layer on `hidden` [s, h], and the logits [s, v] that follow."""
    from megatron_hammer.checkpoint.verification.megatron_model import compute_logits

    # Their embeddings are replaced by `hidden`; the ids only have to be valid.
    tokens = draw_tokens(num_rows, length=len(hidden))
    with replace_layer_input(model.decoder.layers[0], hidden[:, None]) as outputs:  # megatron's are [s, b, h]
        logits = compute_logits(model, tokens)
    return outputs[0][:, 0], logits


def _open(request: ForwardRequest) -> Any:
    """The checkpoint without vocabulary padding, at the master weights where they are asked for."""
    reader = open_checkpoint(request.megatron_dir, weights=request.weights)
    reader.remove_vocab_padding(request.vocab_size)
    return reader


def _changes(request: ForwardRequest, reader: Any, vocab_size: int) -> dict[str, Any]:
    # Equal: without padding rows, logits have the same width as transformers'.
    changes = {"vocab_size": vocab_size, "padded_vocab_size": vocab_size, "precision": _PRECISIONS[request.dtype]}
    window = getattr(reader.saved_args, "window_size", None)
    if window:
        # Megatron counts the tokens before a position, transformers the position too.
        longest = reader.args.max_position_embeddings
        shortened = shorten_window(window[0] + 1, request.window_shift, longest=longest) - 1
        changes["window_size"] = (shortened, *window[1:])
    return changes


def _fill(model: Any, reader: Any, request: ForwardRequest, stored_names: dict[str, str]) -> None:
    """Weights under the model's names; stored_names: stored name -> the model's."""
    from megatron_hammer.checkpoint.verification.megatron_model import fill_weights

    source = {name: stored for stored, name in stored_names.items()}
    rounding = getattr(torch, request.megatron_rounding) if request.megatron_rounding else None
    is_zero_centered, hf_dtype = model.config.layernorm_zero_centered_gamma, getattr(torch, request.hf_dtype)

    def read(name: str) -> Tensor:
        tensor: Tensor = reader.read(source[name])
        if request.rows and name in VOCABULARY_TENSORS:
            tensor = tensor[list(request.rows)]
        if is_zero_centered and name.endswith(NORM_WEIGHT_ENDINGS):
            # The folder's weight is the stored one + 1 in the folder's dtype; Megatron adds the 1 itself.
            return (tensor.float() + 1).to(hf_dtype).float() - 1
        # Only rounded here; copying into the parameter brings it back to the dtype of the computation.
        return tensor if rounding is None or name.endswith(BUFFER_ENDINGS) else tensor.to(rounding)

    fill_weights(model, set(source), read, where=str(reader.directory))


if __name__ == "__main__":
    main()
