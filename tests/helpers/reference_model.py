"""The model of transformers as the oracle: random weights that show every mistake, and the largest differences."""

import torch

from tests.helpers.whole_model import compute_logits

BATCH_SIZE, SEQ_LENGTH = 5, 29


def randomize(module: torch.nn.Module) -> None:
    """Weights of standard deviation 1/sqrt(width), so that attention is far from uniform and nothing explodes; norms
    not 1; small embeddings, so that epsilon matters.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            is_embedding = "embed_tokens" in name or "wte" in name
            if is_norm and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif is_embedding:
                parameter.normal_(std=0.02)
            else:
                parameter.normal_(std=0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):  # sigmoid scores lie between 0 and 1
                buffer.normal_(std=0.3)


def sample_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (BATCH_SIZE, SEQ_LENGTH), generator=torch.Generator().manual_seed(3))


def record_layers(layers) -> list[torch.Tensor]:
    """The output of every layer of the next forward pass, in order."""
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    return outputs


def compare(ours, reference, vocab_size: int) -> dict[str, float]:
    """Largest absolute difference of every layer's output and of the logits."""
    body = reference.model.layers if hasattr(reference, "model") else reference.transformer.h
    our_layers, reference_layers = record_layers(ours.decoder.layers), record_layers(body)
    tokens = sample_tokens(vocab_size)
    logits = compute_logits(ours, tokens, vocab_size=vocab_size)
    with torch.no_grad():
        expected = reference(tokens).logits
    assert logits.shape == expected.shape
    assert expected.std() > 0.05  # else any two models agree; a tied head has the small numbers of the embedding
    assert len(our_layers) == len(reference_layers) > 1
    pairs = enumerate(zip(our_layers, reference_layers, strict=True))
    differences = {f"layer {i}": (mine.transpose(0, 1) - theirs).abs().max().item() for i, (mine, theirs) in pairs}
    return differences | {"logits": (logits - expected).abs().max().item()}
