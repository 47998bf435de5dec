"""Our Triton kernels beside fp64, or compiled for GPUs: run by tests/numerics/test_kernels.py.

    TRITON_INTERPRET=1 python tests/helpers/kernel_runs.py interpret
    TRITON_INTERPRET=0 python tests/helpers/kernel_runs.py compile

The last line is a JSON object.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.model.kernels import rms_norm, rope

# All different, and none a power of 2.
SEQUENCE, BATCH, GROUPS, HEADS_PER_GROUP, HEAD_DIM, ROTARY_DIM, WIDTH = 5, 3, 2, 3, 14, 10, 37
EPS = 1e-3  # so large that it counts
GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


# --- definitions in fp64 --------------------------------------------------------------------------------------------


def turn(tensor: Tensor, angles: Tensor, *, is_interleaved: bool = False, sign: float = 1.0) -> Tensor:
    """Pairs of the first elements of [s, b, n, d] as complex numbers, times exp(i angle); angles [s, b or 1, 1, r]."""
    size = angles.shape[-1]
    turned, rest = tensor[..., :size], tensor[..., size:]
    if is_interleaved:
        pairs, angles = torch.complex(turned[..., ::2], turned[..., 1::2]), angles[..., ::2]
    else:
        pairs, angles = torch.complex(*turned.chunk(2, dim=-1)), angles[..., : size // 2]
    pairs = pairs * torch.polar(torch.ones_like(angles), sign * angles)
    parts = (pairs.real, pairs.imag)
    turned = torch.stack(parts, -1).flatten(-2) if is_interleaved else torch.cat(parts, -1)
    return torch.cat((turned, rest), -1)


def split_and_turn(mixed: Tensor, query_angles: Tensor, key_angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries, key, value = mixed.split([HEADS_PER_GROUP * HEAD_DIM, HEAD_DIM, HEAD_DIM], dim=-1)
    return turn(queries.reshape(*mixed.shape[:2], -1, HEAD_DIM), query_angles), turn(key, key_angles), value


def normalize(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return hidden * (hidden.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight, hidden


# --- kernel and definition on the same inputs -----------------------------------------------------------------------


def compare(
    kernel: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Tensor], *, is_permuted: bool = False
) -> dict[str, Any]:
    """Largest differences of outputs and of the inputs' gradients, for one random gradient of each output."""
    ours = [tensor.detach().requires_grad_() for tensor in inputs]
    theirs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs, expected = (
        result if isinstance(result, tuple) else (result,) for result in (kernel(*ours), definition(*theirs))
    )
    # Attention's backward pass gives gradients in the order of [b, n, s, d].
    gradients = [
        draw(*output.permute(1, 2, 0, 3).shape, dtype=output.dtype).permute(2, 0, 1, 3)
        if is_permuted
        else draw(*output.shape, dtype=output.dtype)
        for output in outputs
    ]
    torch.autograd.backward(outputs, gradients)
    torch.autograd.backward([output.clone() for output in expected], [gradient.double() for gradient in gradients])
    pairs = {f"output {index}": pair for index, pair in enumerate(zip(outputs, expected, strict=True))}
    pairs |= {f"gradient {index}": (a.grad, b.grad) for index, (a, b) in enumerate(zip(ours, theirs, strict=True))}
    return {
        "differences": {name: float((a.double() - b).abs().max()) for name, (a, b) in pairs.items()},
        "dtypes": sorted({str(tensor.dtype) for tensor, _ in pairs.values()}),
    }


def draw_angles(size: int, *, batch: int = 1, is_interleaved: bool = False) -> Tensor:
    half = 9 * draw(SEQUENCE, batch, 1, size // 2)
    return half.repeat_interleave(2, -1) if is_interleaved else torch.cat((half, half), -1)


def compare_rotary(dtype: torch.dtype, angles: Tensor, *, is_interleaved: bool = False) -> dict[str, Any]:
    tensor = draw(BATCH, SEQUENCE, 6, HEAD_DIM, dtype=dtype).transpose(0, 1)
    return compare(
        lambda tensor: rope.apply_rotary(tensor, angles, interleaved=is_interleaved),
        lambda tensor: turn(tensor, angles.double(), is_interleaved=is_interleaved),
        [tensor],
        is_permuted=True,
    )


def split(mixed: Tensor, query_angles: Tensor, key_angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    widths = [HEADS_PER_GROUP * HEAD_DIM, HEAD_DIM, HEAD_DIM]
    return rope.split_and_apply_rotary(mixed, query_angles, key_angles, widths)


def draw_mixed(dtype: torch.dtype = torch.float32, *, groups: int = GROUPS) -> Tensor:
    return draw(SEQUENCE, BATCH, groups, (HEADS_PER_GROUP + 2) * HEAD_DIM, dtype=dtype)


def compare_split(dtype: torch.dtype, rotary_dim: int, mixed: Tensor | None = None) -> dict[str, Any]:
    angles = draw_angles(rotary_dim), draw_angles(rotary_dim)
    return compare(
        lambda mixed: split(mixed, *angles),
        lambda mixed: split_and_turn(mixed, *(tensor.double() for tensor in angles)),
        [draw_mixed(dtype) if mixed is None else mixed],
        is_permuted=True,
    )


def build_norm(weight: Tensor) -> rms_norm.RmsNormWithResidual:
    norm = rms_norm.RmsNormWithResidual(weight.shape[0], eps=EPS, dtype=weight.dtype)
    norm.weight = torch.nn.Parameter(weight.detach())
    return norm


def compare_norm(hidden: Tensor) -> dict[str, Any]:
    """The module, and its weight's gradient, which `compare` would not see in a Parameter of its own."""
    weight = draw(hidden.shape[-1], dtype=hidden.dtype)
    return compare(
        lambda hidden, weight: rms_norm._NormWithResidual.apply(hidden, weight, EPS), normalize, [hidden, weight]
    )


def list_cases(dtype: torch.dtype) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "rotary-halves": lambda: compare_rotary(dtype, draw_angles(ROTARY_DIM)),
        "rotary-interleaved": lambda: compare_rotary(
            dtype, draw_angles(ROTARY_DIM, is_interleaved=True), is_interleaved=True
        ),
        "rotary-whole-head": lambda: compare_rotary(dtype, draw_angles(HEAD_DIM)),
        "rotary-own-angles": lambda: compare_rotary(dtype, draw_angles(ROTARY_DIM, batch=BATCH)),
        "rotary-split": lambda: compare_split(dtype, ROTARY_DIM),
        "rotary-split-whole-head": lambda: compare_split(dtype, HEAD_DIM),
        # A tensor-parallel rank's share of gathered groups.
        "rotary-split-of-a-slice": lambda: compare_split(
            dtype, ROTARY_DIM, draw_mixed(dtype, groups=GROUPS + 1)[:, :, 1:]
        ),
        "norm": lambda: compare_norm(draw(SEQUENCE, BATCH, WIDTH, dtype=dtype)),
        "norm-of-permuted": lambda: compare_norm(draw(BATCH, SEQUENCE, WIDTH, dtype=dtype).transpose(0, 1)),
        "norm-many-rows": lambda: compare_norm(draw(13, WIDTH, dtype=dtype)),
    }


# --- modes ----------------------------------------------------------------------------------------------------------


def interpret() -> dict[str, Any]:
    rms_norm.NUM_WEIGHT_SUMS = 4  # so that a program has several rows
    results: dict[str, Any] = {
        f"{name} {str(dtype).removeprefix('torch.')}": case()
        for dtype in (torch.float32, torch.bfloat16)
        for name, case in list_cases(dtype).items()
    }
    angles, mixed = draw_angles(ROTARY_DIM), draw_mixed()
    tensor = draw(SEQUENCE, BATCH, 6, HEAD_DIM)
    parts = split(mixed, angles, angles)
    turned = rope.apply_rotary(tensor, angles)
    twisted = split_and_turn(mixed.double(), *(2 * [angles.double()]))
    hidden = draw(SEQUENCE, BATCH, WIDTH).requires_grad_()
    norm = build_norm(draw(WIDTH))
    output, residual = norm(hidden)
    both, alone = (
        torch.autograd.grad(parts, hidden, [torch.ones_like(part) for part in parts], retain_graph=True)[0]
        for parts in ([output, residual], [output])
    )
    results["twins"] = {
        "rotary pairs": differ(turned, turn(tensor.double(), angles.double(), is_interleaved=True)),
        "rotary direction": differ(turned, turn(tensor.double(), angles.double(), sign=-1.0)),
        "query and key swapped": differ(parts[0][:, :, :GROUPS], twisted[1]),
        "norm without residual": differ(both, alone.double()),
    }
    results["facts"] = {
        "residual shares memory": residual.data_ptr() == hidden.data_ptr(),
        "parts share memory": any(
            part.untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr() for part in parts
        ),
        "parts are contiguous": all(part.is_contiguous() for part in parts),
    }
    try:
        rope.split_and_apply_rotary(mixed, angles, angles, [HEAD_DIM, HEAD_DIM, HEAD_DIM])
    except ValueError as error:
        results["refusal"] = str(error)
    return results


def differ(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).abs().max())


def compile_kernels() -> dict[str, dict[str, int]]:
    """{compute capability: {kernel: bytes of its machine code}}, at the sizes of hammer-1b4."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    strides = ("i32",) * 3
    of_one = {"source": "*bf16", "target": "*bf16", "table": "*fp32", "batch": "i32"}
    of_one |= {"source_strides": strides, "target_strides": strides, "table_strides": strides}
    of_three = dict.fromkeys(("mixed", "query", "key", "value"), "*bf16")
    of_three |= {"query_table": "*fp32", "key_table": "*fp32", "batch": "i32"}
    of_three |= {f"{name}_strides": strides for name in ("mixed", "query", "key", "value")}
    of_three |= {f"{name}_table_strides": strides for name in ("query", "key")}
    heads = {"head_dim": 64, "rotary_dim": 64, "is_interleaved": False}
    rows = {"source": "*bf16", "weight": "*bf16", "inverse_rms": "*fp32"}
    gradients = {"gradient": "*bf16", "residual_gradient": "*bf16", "source_gradient": "*bf16", "weight_sums": "*fp32"}
    width = {"width": 2048, "block": 2048}
    kernels: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (rope._rope_tensor, of_one, heads | {"num_heads": 32, "is_backward": False}),
        (rope._rope_qkv, of_three, heads | {"num_groups": 4, "heads_per_group": 8, "is_backward": True}),
        (rms_norm._rms_norm_forward, rows | {"output": "*bf16", "eps": "fp32"}, width),
        (rms_norm._rms_norm_backward, rows | gradients | {"num_rows": "i32"}, width),
    ]
    return {
        str(capability): {
            kernel.__name__: len(
                triton.compile(
                    ASTSource(fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants),
                    target=GPUTarget("cuda", capability, 32),
                ).asm["cubin"]
            )
            for kernel, types, constants in kernels
        }
        for capability in (80, 90, 100)
    }


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_kernels()))
