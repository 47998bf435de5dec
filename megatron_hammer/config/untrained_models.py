"""What a `ModelShape` can describe and this package cannot train: only a scaling study takes such a model.

The study counts parameters, operations and memory of such a model (checkpoint/hugging_face/studied_families/). Nothing
here translates these fields into Megatron's arguments, so that none of them is dropped on the way.
"""

from collections.abc import Callable

from megatron_hammer.model.shape import ModelShape, RopeScaling

# Field of ModelShape, or of a part of it: (whether the model has it, what that is).
UNTRAINED: dict[str, tuple[Callable[[ModelShape], bool], str]] = {
    "latent_attention": (lambda model: model.latent_attention is not None, "multi-latent attention"),
    "has_attention_sinks": (lambda model: model.has_attention_sinks, "attention sinks"),
    "has_qk_l2_norm": (lambda model: model.has_qk_l2_norm, "norms of queries and keys that have no weights"),
    "has_query_temperature": (lambda model: model.has_query_temperature, "queries that are scaled by position"),
    "num_mtp_layers": (lambda model: model.num_mtp_layers > 0, "layers that predict further tokens"),
    "activation": (lambda model: model.activation == "clamped_swiglu", "a clamped SwiGLU"),
    "sliding_window.is_chunked": (
        lambda model: model.sliding_window is not None and model.sliding_window.is_chunked,
        "attention within chunks",
    ),
    "moe.has_scaled_inputs": (
        lambda model: model.moe is not None and model.moe.has_scaled_inputs,
        "experts whose inputs are multiplied by their weights",
    ),
    "rope_scaling": (
        # Megatron's flags have the factor alone; the other numbers are constants of its code.
        lambda model: (
            isinstance(model.rope_scaling, RopeScaling)
            and model.rope_scaling != RopeScaling(factor=model.rope_scaling.factor)
        ),
        "a scaled rope with other bounds than Llama 3.1's",
    ),
}


def find_untrained(model: ModelShape) -> list[str]:
    """A problem for everything that the model has and that cannot be trained; empty if it can be."""
    return [
        f"{field}: {what} can be studied but not trained here, got model={model.name}. "
        "Project it, or train a model without it."
        for field, (is_there, what) in UNTRAINED.items()
        if is_there(model)
    ]
