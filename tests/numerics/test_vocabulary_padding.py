"""The loss over a padded vocabulary against PyTorch's cross entropy over the vocabulary itself."""

import math

import pytest
import torch
from torch import Tensor

from megatron_hammer.model.vocabulary_padding import mask_padding_logits
from tests.helpers.toy_model import LLAMA
from tests.helpers.whole_model import read_arguments, single_rank

SEQUENCE, BATCH, PADDED = 13, 3, 64
VOCAB_SIZE = LLAMA.vocab_size  # 53
TOLERANCE = 1e-6  # relative; measured 1e-7
FUSED = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def build_training_model(*flags: str):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_hammer.model.provider import HammerModelBuilder, build_model_config

    config = build_model_config(
        gpt_config_from_args(read_arguments(LLAMA, ("--make-vocab-size-divisible-by", "16", *flags))),
        backend="torch",
        has_embedding_norm=False,
        num_tokens=VOCAB_SIZE,
    )
    return HammerModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def sample_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and labels [b, s]; the last token of the vocabulary is among the labels."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE + 1), generator=generator)
    tokens[1, -1] = VOCAB_SIZE - 1
    return tokens[:, :-1], torch.arange(SEQUENCE).expand(BATCH, -1), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("flags", [(), FUSED], ids=["vocab-parallel", "fused"])
def test_loss_and_gradients_are_those_of_the_vocabulary_alone(flags: tuple[str, ...]) -> None:
    tokens, positions, labels = sample_batch()
    model = build_training_model(*flags)
    losses = model(tokens, positions, None, labels=labels)
    losses.mean().backward()
    head, gradient = model.output_layer.weight, model.output_layer.weight.grad.clone()

    head.grad = None
    logits = model(tokens, positions, None)[..., :VOCAB_SIZE]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected.mean().backward()
    torch.testing.assert_close(losses.flatten(), expected, rtol=TOLERANCE, atol=0)
    assert head.shape[0] == PADDED
    assert not gradient[VOCAB_SIZE:].any()
    # megatron's fused loss rounds the gradient of the logits to bf16; measured 1.7e-4, of gradients up to 0.1
    torch.testing.assert_close(gradient, head.grad, rtol=0, atol=1e-3 if flags else 1e-8)


def test_counting_the_padding_would_show() -> None:
    """The twin: the same weights with a probability for each of the 11 padding rows."""
    tokens, positions, labels = sample_batch()
    model = build_training_model()
    masked = model(tokens, positions, None, labels=labels).mean().item()
    model.num_tokens = None
    counted = model(tokens, positions, None, labels=labels).mean().item()
    assert counted - masked == pytest.approx(math.log(PADDED / VOCAB_SIZE), rel=0.05)


@pytest.mark.parametrize(
    ("tp_rank", "expected"), [(0, 0), (1, 128 - 116), (2, 128)], ids=["tokens", "both", "padding alone"]
)
def test_each_rank_masks_its_own_columns(tp_rank: int, expected: int) -> None:
    """244 tokens padded to 384 on three ranks."""
    logits = torch.randn(SEQUENCE, BATCH, 128, dtype=torch.bfloat16)
    before = logits.clone()
    mask_padding_logits(logits, num_tokens=244, tp_rank=tp_rank)
    assert torch.equal(logits[..., : 128 - expected], before[..., : 128 - expected])
    assert (logits[..., 128 - expected :] == torch.finfo(torch.bfloat16).min).all()
    assert torch.isfinite(logits).all()


def test_nothing_is_copied_or_recorded() -> None:
    weight = torch.randn(7, 128, requires_grad=True)
    logits = torch.nn.functional.linear(torch.randn(SEQUENCE, BATCH, 128), weight)
    history, address = logits.grad_fn, logits.data_ptr()
    mask_padding_logits(logits, num_tokens=5, tp_rank=0)
    assert logits.grad_fn is history
    assert logits.data_ptr() == address
