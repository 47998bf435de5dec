"""The torch backend's two modules against attention written out in fp64, LlamaRMSNorm of transformers and LayerNorm."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.options import MemoryOptions
from tests.helpers.layer_activations import count_layer_activation_bytes
from tests.helpers.toy_model import LLAMA
from tests.helpers.whole_model import build_whole_model, read_arguments, single_rank

SEQUENCE, BATCH, HEADS, HEAD_DIM = 13, 3, 6, 10
ATTENTION_TOLERANCE = 1e-13  # fp64; measured 4e-16


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def build_attention(*, num_query_groups: int = 2, **options):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_hammer.model.torch_modules import SdpaAttention

    layer_scaling = options.pop("apply_query_key_layer_scaling", False)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=num_query_groups,
        attention_dropout=options.pop("config_dropout", 0.0),
        apply_query_key_layer_scaling=layer_scaling,
        softmax_type=options.pop("softmax_type", "vanilla"),
        window_size=options.pop("window_size", None),
        window_attn_skip_freq=options.pop("window_attn_skip_freq", None),
        attention_softmax_in_fp32=True,
    )
    layer_number = options.pop("layer_number", 1)
    return SdpaAttention(config, layer_number, AttnMaskType.causal, "self", **options)


def make_inputs(num_query_groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(SEQUENCE, BATCH, heads, HEAD_DIM) for heads in (HEADS, num_query_groups, num_query_groups)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, forbidden: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale) v, head by head. forbidden: [b or 1, 1, s, s]; None means what comes later."""
    if forbidden is None:
        forbidden = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1).expand(1, 1, -1, -1)
    heads_per_group = HEADS // key.shape[2]
    outputs = []
    for head in range(HEADS):
        group = head // heads_per_group
        q, k, v = query[:, :, head], key[:, :, group], value[:, :, group]  # [s, b, d]
        scores = torch.einsum("ibd,jbd->bij", q, k) * scale
        weights = scores.masked_fill(forbidden[:, 0], -math.inf).softmax(dim=-1)
        outputs.append(torch.einsum("bij,jbd->ibd", weights, v))
    return torch.stack(outputs, dim=2).reshape(SEQUENCE, BATCH, HEADS * HEAD_DIM)


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_query_groups", [1, 2, 3, HEADS])
def test_causal_attention(num_query_groups: int) -> None:
    inputs = make_inputs(num_query_groups)
    output = build_attention(num_query_groups=num_query_groups)(*inputs)
    expected = attend(*inputs, scale=HEAD_DIM**-0.5)
    assert output.shape == (SEQUENCE, BATCH, HEADS * HEAD_DIM)
    torch.testing.assert_close(output, expected, rtol=0, atol=ATTENTION_TOLERANCE)
    # Twins: heads of another group, another scale, and a query that sees what comes later.
    if 1 < num_query_groups < HEADS:
        query, key, value = inputs
        assert differ(output, attend(query, key.flip(2), value.flip(2), scale=HEAD_DIM**-0.5))
    assert differ(output, attend(*inputs, scale=HEAD_DIM**-0.4))
    everything = torch.zeros(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    assert differ(output, attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=everything))


@pytest.mark.parametrize("mask_batch", [1, BATCH])
def test_an_explicit_mask_forbids_where_it_is_true(mask_batch: int) -> None:
    """Two documents in one sequence, cut in another place in each of the batch."""
    causal = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    masks = []
    for index in range(mask_batch):
        document = torch.arange(SEQUENCE) >= 4 + index
        masks.append(causal | (document[:, None] != document[None, :]))
    mask = torch.stack(masks)[:, None]
    inputs = make_inputs(2)
    output = build_attention()(*inputs, attention_mask=mask)
    torch.testing.assert_close(
        output, attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=mask), rtol=0, atol=ATTENTION_TOLERANCE
    )
    assert differ(output, attend(*inputs, scale=HEAD_DIM**-0.5))


def forbid(window: int) -> Tensor:
    """[1, 1, s, s]: what comes later, and all but the `window` positions before."""
    position = torch.arange(SEQUENCE)
    distance = position[:, None] - position[None, :]
    return ((distance < 0) | (distance > window))[None, None]


@pytest.mark.parametrize("window", [0, 1, 5, SEQUENCE - 2, SEQUENCE - 1, 99])
def test_a_window_is_how_many_tokens_before_it_a_position_sees(window: int) -> None:
    inputs = make_inputs(2)
    output = build_attention(window_size=(window, 0))(*inputs)
    expected = attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=forbid(window))
    torch.testing.assert_close(output, expected, rtol=0, atol=ATTENTION_TOLERANCE)
    if window < SEQUENCE - 2:
        assert differ(output, attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=forbid(window + 1)))


def test_documents_end_within_a_window() -> None:
    """In another place in each sequence of the batch."""
    document = torch.arange(SEQUENCE) >= torch.arange(5, 5 + BATCH)[:, None]  # [b, s]
    documents = forbid(SEQUENCE) | (document[:, None, :, None] != document[:, None, None, :])
    inputs = make_inputs(3)
    output = build_attention(num_query_groups=3, window_size=(4, 0))(*inputs, attention_mask=documents)
    expected = attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=documents | forbid(4))
    torch.testing.assert_close(output, expected, rtol=0, atol=ATTENTION_TOLERANCE)
    assert differ(output, attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=forbid(4)))


@pytest.mark.parametrize(("frequency", "windowed"), [(None, {1, 2, 3, 4}), (2, {1, 3}), ([0, 1, 1, 0], {2, 3})])
def test_the_pattern_says_which_layers_have_the_window(frequency, windowed: set[int]) -> None:
    inputs = make_inputs(2)
    for layer in (1, 2, 3, 4):
        attention = build_attention(window_size=(3, 0), window_attn_skip_freq=frequency, layer_number=layer)
        forbidden = forbid(3 if layer in windowed else SEQUENCE)
        expected = attend(*inputs, scale=HEAD_DIM**-0.5, forbidden=forbidden)
        torch.testing.assert_close(attention(*inputs), expected, rtol=0, atol=ATTENTION_TOLERANCE)


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_a_softmax_off_by_one_is_megatrons(window: int | None, has_documents: bool) -> None:
    from megatron.core.fusions.fused_softmax import SoftmaxOne

    forbidden = forbid(SEQUENCE if window is None else window)
    documents = None
    if has_documents:
        document = torch.arange(SEQUENCE) >= 6
        documents = forbid(SEQUENCE) | (document[:, None] != document[None, :])
        forbidden = forbidden | documents
    inputs = [tensor.requires_grad_() for tensor in make_inputs(HEADS)]
    window_size = None if window is None else (window, 0)
    attention = build_attention(num_query_groups=HEADS, softmax_type="off-by-one", window_size=window_size)
    output = attention(*inputs, attention_mask=documents)
    query, key, value = inputs
    scores = torch.einsum("ibnd,jbnd->bnij", query, key) * HEAD_DIM**-0.5
    softmax = SoftmaxOne(-1, torch.zeros(HEADS, dtype=scores.dtype))
    weights = softmax(scores.masked_fill(forbidden, -math.inf))
    expected = torch.einsum("bnij,jbnd->ibnd", weights, value).reshape(output.shape)
    torch.testing.assert_close(output, expected, rtol=0, atol=ATTENTION_TOLERANCE)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    gradients = (torch.autograd.grad((result * direction).sum(), inputs) for result in (output, expected))
    for ours, megatrons in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, megatrons, rtol=0, atol=1e-12)
    plain = build_attention(num_query_groups=HEADS, window_size=window_size)
    assert differ(output, plain(*inputs, attention_mask=documents))


def test_learned_sinks_are_left_out() -> None:
    with pytest.raises(ValueError, match="no learned sinks"):
        build_attention(softmax_type="learnable")


def test_all_layers_keep_one_mask() -> None:
    """Autograd keeps the mask of each layer for the backward pass."""
    kept: dict[int, tuple[int, ...]] = {}
    layers = [build_attention(window_size=(3, 0), layer_number=layer) for layer in (1, 2, 3)]
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, torch.float32)]

    def remember(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (SEQUENCE, SEQUENCE):
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        sum(layer(*inputs).sum() for layer in layers).backward()
    assert len(kept) == 1


def test_softmax_scale() -> None:
    inputs = make_inputs(2)
    given = build_attention(softmax_scale=0.7)(*inputs)
    torch.testing.assert_close(given, attend(*inputs, scale=0.7), rtol=0, atol=ATTENTION_TOLERANCE)
    layer_scaled = build_attention(layer_number=3, apply_query_key_layer_scaling=True)(*inputs)
    # megatron's own softmax multiplies the layer number back: the flag moves a rounding, not the result
    torch.testing.assert_close(layer_scaled, attend(*inputs, scale=HEAD_DIM**-0.5), rtol=0, atol=ATTENTION_TOLERANCE)


def test_dropout_only_while_training() -> None:
    inputs = make_inputs(2, torch.float32)
    attention = build_attention(config_dropout=0.3)
    plain = build_attention()(*inputs)
    attention.eval()
    assert torch.equal(attention(*inputs), plain)
    attention.train()
    assert differ(attention(*inputs), plain)
    assert torch.equal(build_attention(config_dropout=0.3, attention_dropout=0.0).train()(*inputs), plain)


def test_dropout_draws_from_the_model_parallel_generator() -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    inputs = make_inputs(2, torch.float32)
    attention = build_attention(attention_dropout=0.3).train()

    def run(seed: int, tp_rank: int = 0) -> Tensor:
        model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
        before = torch.get_rng_state()
        outputs = torch.stack([attention(*inputs), attention(*inputs)])
        assert torch.equal(torch.get_rng_state(), before)  # the ranks of a group share it for hidden dropout
        return outputs

    first = run(1)
    assert torch.equal(first, run(1))
    assert differ(first[0], first[1])  # the second call draws on
    assert differ(first, run(2))
    assert differ(first, run(1, tp_rank=1))  # other heads, other entries


def test_dropout_keeps_the_mean() -> None:
    attention = build_attention(attention_dropout=0.25).train()
    inputs = make_inputs(2, torch.float32)
    mean = torch.stack([attention(*inputs) for _ in range(2000)]).mean(0)
    # measured 0.064, the noise of 2,000 draws; without the factor 1 / (1 - p) it would be 0.71
    torch.testing.assert_close(mean, build_attention()(*inputs), rtol=0, atol=0.1)


def test_unsupported_options_are_refused() -> None:
    inputs = make_inputs(2)
    with pytest.raises(ValueError, match="no attention bias and no packed sequences; use the te backend"):
        build_attention()(*inputs, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="no attention bias and no packed sequences; use the te backend"):
        build_attention()(*inputs, packed_seq_params=object())


def norm_config(normalization: str, **values) -> SimpleNamespace:
    return SimpleNamespace(
        **{"normalization": normalization, "params_dtype": torch.float32, "sequence_parallel": False}
        | {"layernorm_zero_centered_gamma": False}
        | values
    )


def randomize(norm: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_rms_norm_is_transformers(eps: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from megatron_hammer.model.torch_modules import TorchNorm

    norm, reference = TorchNorm(norm_config("RMSNorm"), 37, eps=eps), LlamaRMSNorm(37, eps=eps)
    randomize(norm)
    reference.load_state_dict(norm.state_dict())
    hidden = 1e-3 * torch.randn(5, 3, 37, generator=torch.Generator().manual_seed(1))  # so small that eps counts
    assert torch.equal(norm(hidden), reference(hidden))
    assert differ(norm(hidden), TorchNorm(norm_config("RMSNorm"), 37, eps=eps)(hidden))
    assert differ(norm(hidden), LlamaRMSNorm(37, eps=1e-8)(hidden) * norm.weight)


def test_layer_norm_is_torchs_and_can_be_asked_for() -> None:
    from megatron_hammer.model.torch_modules import TorchNorm

    norms = [
        TorchNorm(norm_config("LayerNorm"), 37, eps=1e-6),
        TorchNorm(norm_config("RMSNorm"), 37, eps=1e-6, normalization="LayerNorm"),
    ]
    hidden = torch.randn(5, 3, 37, generator=torch.Generator().manual_seed(1))
    for norm in norms:
        randomize(norm)
        expected = torch.nn.functional.layer_norm(hidden, (37,), norm.weight, norm.bias, 1e-6)
        assert torch.equal(norm(hidden), expected)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm_parameters_say_whether_the_sequence_is_split(normalization: str, sequence_parallel: bool) -> None:
    from megatron_hammer.model.torch_modules import TorchNorm

    config = norm_config(normalization, sequence_parallel=sequence_parallel, params_dtype=torch.bfloat16)
    parameters = list(TorchNorm(config, 8).parameters())
    assert len(parameters) == {"RMSNorm": 1, "LayerNorm": 2}[normalization]
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in parameters)
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters)


def test_fp32_on_a_gpu_attends_the_same_without_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of PyTorch's takes grouped heads in fp32 on a GPU, so key and value are copied there."""
    query, key, value = make_inputs(2, torch.float32)
    attention = build_attention(num_query_groups=2)
    grouped = attention(query, key, value)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *tensors, **options: seen.append((tensors[1].shape[1], options)) or original(*tensors, **options),
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    torch.testing.assert_close(attention(query, key, value), grouped, rtol=1e-6, atol=1e-6)
    assert [(heads, options["enable_gqa"]) for heads, options in seen] == [(HEADS, False)]
    seen.clear()
    attention(*make_inputs(2, torch.bfloat16))
    assert [(heads, options["enable_gqa"]) for heads, options in seen] == [(2, True)]
    seen.clear()  # nor with a mask in 16 bits
    build_attention(window_size=(3, 0))(*make_inputs(2, torch.bfloat16))
    assert [(heads, options["enable_gqa"]) for heads, options in seen] == [(HEADS, False)]


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_zero_centered_norm_stores_its_weight_less_1(normalization):
    """In bf16 too: the sum is made in fp32, as TransformerEngine makes it."""
    from megatron_hammer.model.torch_modules import TorchNorm

    def build(**changes):
        values = {"normalization": normalization, "params_dtype": torch.bfloat16, "sequence_parallel": False}
        return TorchNorm(SimpleNamespace(**values | {"layernorm_zero_centered_gamma": False} | changes), 24)

    zero_centered, plain = build(layernorm_zero_centered_gamma=True), build(params_dtype=torch.float32)
    x = torch.randn(7, 24, dtype=torch.bfloat16)
    assert torch.equal(zero_centered(x), plain(x.float()).bfloat16())  # at the start both multiply by 1
    stored = torch.randn(24, dtype=torch.bfloat16) * 0.1
    with torch.no_grad():
        zero_centered.weight.copy_(stored)
        plain.weight.copy_(stored.float() + 1)
    assert torch.equal(zero_centered(x), plain(x.float()).bfloat16())
    with torch.no_grad():
        assert not torch.equal(zero_centered(x), build(layernorm_zero_centered_gamma=True)(x))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 1},
        {"position_embedding_type": "none"},
        {"position_embedding_type": "none", "num_query_groups": HEADS},
    ],
    ids=str,
)
def test_attention_keeps_what_the_memory_model_counts(changes: dict[str, Any]) -> None:
    """The memory that autograd holds on to in self-attention without fused rotary embeddings, each storage once."""
    model = dataclasses.replace(LLAMA, **changes)
    layer = build_whole_model(read_arguments(model)).train().decoder.layers[0]
    tokens, width, kv_width = 29, model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        # Sines and cosines [s, 1, 1, d] are the whole model's.
        if tensor.dim() > 2 and tensor.shape[1:3] != (1, 1) and tensor.untyped_storage().data_ptr() not in own:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    angles = torch.randn(tokens, 1, 1, model.head_dim) if model.position_embedding_type == "rope" else None
    hidden = torch.randn(tokens, 1, model.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output, _ = layer.self_attention(hidden, None, rotary_pos_emb=angles)
    whole, separate = (
        count_layer_activation_bytes(
            model, ParallelLayout(), num_tokens=tokens, options=MemoryOptions(precision="fp32", has_separate_values=own)
        )
        for own in (False, True)
    )
    elements = model.hidden_size + width + 2 * kv_width + width + model.num_attention_heads
    assert output.requires_grad
    assert sum(kept.values()) == 4 * tokens * elements + whole - separate
