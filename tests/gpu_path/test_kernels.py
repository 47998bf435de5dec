"""Our Triton kernels compile for a GPU that is not here; tests/numerics/test_cross_entropy.py interprets them."""

import re

import pytest

# Arguments of both kernels in their order, at a size whose strides and widths are multiples of 16.
ARGUMENTS = {
    "logits": "*bf16", "targets": "*i64", "maxima": "*fp32", "sums": "*fp32", "target_logits": "*fp32",
    "scales": "*fp32", "stride": "i32", "width": "i32",
}  # fmt: skip
UNALIGNED = {"num_columns": "i32"}  # 105,789 tokens


@pytest.mark.parametrize("kernel", ["_reduce_row", "_write_row_gradient"])
def test_kernels_of_the_loss_move_16_bytes_at_a_time(kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A mask that the compiler cannot see to be aligned makes it load each logit alone, at a part of the speed."""
    pytest.importorskip("triton", reason="triton has wheels for Linux alone")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hammer.model import cross_entropy_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(cross_entropy_triton, kernel)
    types = {name: {**ARGUMENTS, **UNALIGNED, "BLOCK": "constexpr"}[name] for name in function.arg_names}
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={"BLOCK": cross_entropy_triton.MAX_BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name in ARGUMENTS},
    )
    options = {"num_warps": cross_entropy_triton.NUM_WARPS}
    ptx = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert ("st.global.v4.b32" in ptx) == (kernel == "_write_row_gradient")
    # One target logit is all that is read alone, and no register is spilled.
    assert len(re.findall(r"ld\.global\.b16", ptx)) == (kernel == "_reduce_row")
    assert ".local" not in ptx
