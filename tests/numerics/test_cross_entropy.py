"""The loss over a padded, divided vocabulary against PyTorch's cross entropy in fp64 over the vocabulary itself."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.model import chunked_cross_entropy, cross_entropy, cross_entropy_torch
from megatron_hammer.model.cross_entropy import vocab_parallel_cross_entropy
from tests.helpers import cross_entropy_ranks
from tests.helpers.repository import ROOT
from tests.helpers.toy_model import LLAMA
from tests.helpers.training_runs import environment
from tests.helpers.whole_model import read_arguments, single_rank

SEQUENCE, BATCH, PADDED = 13, 3, 64
VOCAB_SIZE = LLAMA.vocab_size  # 53
TOLERANCE = 1e-6  # relative; measured 1e-7


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


# --- the model's loss -----------------------------------------------------------------------------------------------


def build_training_model():
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_hammer.model.provider import HammerModelBuilder, build_model_config

    config = build_model_config(
        gpt_config_from_args(read_arguments(LLAMA, ("--make-vocab-size-divisible-by", "16"))),
        backend="torch",
        has_embedding_norm=False,
        residual_multiplier=1.0,
        num_tokens=VOCAB_SIZE,
    )
    return HammerModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def sample_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and labels [b, s]; the last token of the vocabulary is among the labels."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE + 1), generator=generator)
    tokens[1, -1] = VOCAB_SIZE - 1
    return tokens[:, :-1], torch.arange(SEQUENCE).expand(BATCH, -1), tokens[:, 1:].contiguous()


def test_loss_and_gradients_are_those_of_the_vocabulary_alone() -> None:
    tokens, positions, labels = sample_batch()
    model = build_training_model()
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
    torch.testing.assert_close(gradient, head.grad, rtol=0, atol=1e-8)


def test_counting_the_padding_would_show() -> None:
    """The twin: the same weights with a probability for each of the 11 padding rows."""
    tokens, positions, labels = sample_batch()
    model = build_training_model()
    losses = model(tokens, positions, None, labels=labels).mean().item()
    model.num_tokens = None
    counted = model(tokens, positions, None, labels=labels).mean().item()
    assert counted - losses == pytest.approx(math.log(PADDED / VOCAB_SIZE), rel=0.05)


# --- in chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [5 * BATCH, 1, 10_000])
def test_chunks_compute_the_same(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """13 positions in chunks of 5, 5 and 3; of 1; of all."""
    tokens, positions, labels = sample_batch()
    scales = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    model = build_training_model()
    sizes = []
    model.output_layer.register_forward_hook(lambda layer, inputs, outputs: sizes.append(len(inputs[0])))

    def train(**processor: object) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        losses = model(tokens, positions, None, labels=labels, **processor)
        (losses * scales).sum().backward()
        return losses.detach(), {name: weight.grad for name, weight in model.named_parameters()}

    losses, gradients = train()
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK_TOKENS", chunk_tokens)
    chunked_losses, chunked_gradients = train(output_processor=chunked_cross_entropy.compute_loss_in_chunks)
    # in fp32, measured: losses equal, gradients to 3e-8
    torch.testing.assert_close(chunked_losses, losses, rtol=TOLERANCE, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-5, atol=1e-6)
    size = max(1, chunk_tokens // BATCH)
    assert max(sizes[1:]) == min(size, SEQUENCE)
    assert sum(sizes[1:]) == 2 * SEQUENCE  # once forward, once in the backward pass


def test_sixteen_chunks_lose_half_a_digit_of_a_16_bit_weight_gradient() -> None:
    """Errors relative to fp64, of bf16 numbers; benchmarks/cross_entropy.py has the other ways to compute a loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 1, 128, generator=generator).bfloat16()
    weight = (torch.randn(2048, 128, generator=generator) / 128**0.5).bfloat16()
    labels = torch.randint(0, len(weight), (1, 1024), generator=generator)

    def find_errors(num_chunks: int) -> tuple[float, float]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        losses = chunked_cross_entropy.compute_loss_in_chunks(
            hidden_states=leaves[0], labels=labels, output_weight=leaves[1], scale_logits=lambda logits: logits,
            output_layer=lambda hidden, weight: (hidden @ weight.t(), None),
            compute_language_model_loss=lambda labels, logits: vocab_parallel_cross_entropy(
                logits, labels.t(), num_tokens=None, group=get_group()
            ).t(),
        )  # fmt: skip
        losses.sum().backward()
        return tuple(((leaf.grad.double() - g).norm() / g.norm()).item() for leaf, g in zip(leaves, exact, strict=True))

    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits = leaves[0][:, 0] @ leaves[1].t()
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum"), leaves)
    # The hidden states' gradient is rounded once. Of 16 sums of weight gradients each is, in bf16.
    assert find_errors(1) == pytest.approx((1.7e-3, 1.7e-3), rel=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_cross_entropy, "CHUNK_TOKENS", 64)
        assert find_errors(16) == pytest.approx((1.7e-3, 4.7e-3), rel=0.1)


# --- several ranks, both kinds of kernels ---------------------------------------------------------------------------

# Three ranks of 131 columns: the second one holds tokens and padding, the third one padding alone.
WIDTH, NUM_TOKENS = 3 * 131, 244
ROWS = (5, 3)  # few, because the interpreter takes 3 ms for each


class Case(NamedTuple):
    """tolerance: of a gradient, relative to its scale; a 16-bit gradient is rounded once."""

    dtype: torch.dtype
    size: float  # standard deviation of the logits
    num_tokens: int | None
    tolerance: float


CASES = {
    # measured 4e-7
    "fp32": Case(torch.float32, 3.0, NUM_TOKENS, 1e-6),
    # Rounding to nearest is off by up to 2^-8. Triton's interpreter cuts off instead, as no GPU does: up to 2^-7.
    "bf16": Case(torch.bfloat16, 3.0, NUM_TOKENS, 2**-7),
    "fp16": Case(torch.float16, 3.0, NUM_TOKENS, 2**-11),
    "padding counted": Case(torch.float32, 3.0, None, 1e-6),
    # fp32 has logits of 1e4 to 1e-3, so log-sum-exp as one number would be wrong in the third digit.
    "extreme": Case(torch.float32, 1e4, NUM_TOKENS, 1e-6),
    # A rank whose tokens are all impossible must not turn the others' loss into NaN.
    "rank of -inf": Case(torch.float32, 3.0, NUM_TOKENS, 1e-6),
}


def build_case(name: str) -> dict[str, object]:
    """Logits [s, b, p] and targets [s, b] that lie on every rank with tokens; a fifth is ignored: -100, scale 0."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(*ROWS, WIDTH, generator=generator) * case.size
    targets = torch.randint(0, case.num_tokens or WIDTH, ROWS, generator=generator)
    targets[0, 0] = (case.num_tokens or WIDTH) - 1
    scales = torch.randn(ROWS, generator=generator)
    if name == "rank of -inf":
        logits[..., :131] = -torch.inf
        targets.clamp_(min=131)
    if name != "fp32":  # whose padding the twin below counts
        logits[..., case.num_tokens or WIDTH :] = torch.nan  # which must reach nothing
    if name == "extreme":
        scales = torch.tensor(0.5).expand(ROWS)  # one number in memory, as the gradient of a sum is
    else:
        ignored = torch.rand(ROWS, generator=generator) < 0.2
        targets[ignored], scales[ignored] = -100, 0.0
    return {
        "logits": logits.to(case.dtype), "targets": targets, "scales": scales, "num_tokens": case.num_tokens,
    }  # fmt: skip


def compute_expected(case: dict) -> tuple[Tensor, Tensor]:
    """Losses [s, b] (0 where ignored) and the gradient of the logits, in fp64."""
    logits = case["logits"].double().requires_grad_()
    real = logits[..., : case["num_tokens"]].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(real, case["targets"].flatten(), reduction="none")
    losses = losses.view(case["targets"].shape)
    (losses * case["scales"]).sum().backward()
    return losses.detach(), logits.grad


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of each rank; see tests/helpers/cross_entropy_ranks.py."""
    pytest.importorskip("triton", reason="triton has wheels for Linux alone")
    directory = tmp_path_factory.mktemp("ranks")
    torch.save([build_case(name) for name in CASES], directory / "cases.pt")
    subprocess.run(
        [sys.executable, str(Path(cross_entropy_ranks.__file__)), str(directory)],
        env={**environment(), "TRITON_INTERPRET": "1"}, cwd=ROOT, check=True, timeout=200,
    )  # fmt: skip
    return [torch.load(directory / f"results-{rank}.pt") for rank in range(cross_entropy_ranks.NUM_RANKS)]


@pytest.mark.parametrize("group", ["one", "ranks"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_and_kernels_agree_with_fp64(name: str, kernels: str, group: str, results: list[dict]) -> None:
    case = build_case(name)
    losses, gradient = compute_expected(case)
    key = (kernels, group, list(CASES).index(name))
    parts = [result[key] for result in results if key in result]
    counts = case["targets"] >= 0
    for part, _ in parts:
        assert part.dtype == torch.float32
        assert torch.isfinite(part).all()
        # relative; measured 3e-7
        torch.testing.assert_close(part[counts].double(), losses[counts], rtol=TOLERANCE, atol=TOLERANCE)
    computed = torch.cat([part for _, part in parts], dim=-1)
    assert computed.dtype == CASES[name].dtype
    # 6e-8 is the least number that fp16 has
    difference = (computed.double() - gradient).abs()
    allowed = CASES[name].tolerance * (gradient.abs() if computed.itemsize == 2 else 1) + 6e-8
    assert (difference <= allowed).all(), difference.max()
    assert not computed[~counts].any()
    assert case["num_tokens"] is None or not computed[..., NUM_TOKENS:].any()


@pytest.mark.parametrize(
    ("device", "dtype", "module"),
    [
        ("cuda", torch.bfloat16, "cross_entropy_triton"),
        ("cuda", torch.float64, "cross_entropy_torch"),
        ("cpu", torch.bfloat16, "cross_entropy_torch"),
    ],
)
def test_a_gpu_has_kernels(device: str, dtype: torch.dtype, module: str) -> None:
    logits = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert cross_entropy._select_kernels(logits).__name__ == f"megatron_hammer.model.{module}"


@pytest.mark.parametrize("shift", [1, -1])
def test_another_number_of_tokens_would_show(shift: int, results: list[dict]) -> None:
    """The twin: a column more or fewer."""
    case = build_case("fp32")
    losses, gradient = compute_expected({**case, "num_tokens": NUM_TOKENS + shift, "targets": case["targets"] % 200})
    for kernels in ("torch", "triton"):
        computed, part = results[0][kernels, "one", 0]
        assert (part.double() - gradient).abs().max() > 1e-3
        assert not torch.allclose(computed.double(), losses, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatrons_loss_is_the_same(dtype: torch.dtype) -> None:
    """Without padding; also what it makes of labels that stand for no token, which a loss mask leaves out."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as megatron_loss

    generator = torch.Generator().manual_seed(5)
    values = (torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator) * 3).to(dtype)
    targets = torch.randint(0, WIDTH, (SEQUENCE, BATCH), generator=generator)
    targets[2:4], targets[4] = -100, WIDTH

    def compute(loss) -> tuple[Tensor, Tensor]:
        logits = values.clone().requires_grad_()
        losses = loss(logits * 1)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    expected, expected_gradient = compute(lambda logits: megatron_loss(logits, targets, tp_group=get_group()))
    losses, gradient = compute(
        lambda logits: vocab_parallel_cross_entropy(logits, targets, num_tokens=None, group=get_group())
    )
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
    # measured: 1.2e-7 in fp32, equal in bf16, where a last digit of fp32 may yet decide a rounding
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)


# --- in place -------------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """num_bytes: of the largest new tensor that an operation made."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_takes_the_place_of_the_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_torch, "BLOCK_ELEMENTS", 2 * WIDTH)
    leaf = torch.randn(SEQUENCE, BATCH, WIDTH, dtype=dtype, requires_grad=True)
    logits = leaf * 1
    addresses = []
    logits.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    with LargestResult() as largest:
        losses = vocab_parallel_cross_entropy(
            logits, torch.randint(0, NUM_TOKENS, (SEQUENCE, BATCH)), num_tokens=NUM_TOKENS, group=get_group()
        )
        torch.autograd.backward(losses, torch.ones_like(losses), retain_graph=True)
    # Beside the gradient of the leaf, which this test's own product makes: no more than a block of 2 rows in fp32.
    assert addresses == [logits.data_ptr()]
    assert largest.num_bytes <= max(2 * WIDTH * 4, leaf.nbytes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def get_group():
    return torch.distributed.group.WORLD


def test_labels_among_the_padding_are_noticed() -> None:
    """They stand for no token: Megatron's loss over masked logits was as large."""
    logits = torch.randn(2, 1, 8)
    losses = vocab_parallel_cross_entropy(logits, torch.tensor([[6], [4]]), num_tokens=5, group=get_group())
    assert losses[0].item() > 1e38
    assert losses[1].item() < 20
