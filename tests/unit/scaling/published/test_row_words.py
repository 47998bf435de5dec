"""Words of published tables: every cell here is of a publication, or a variant of one."""

import pytest

from megatron_hammer.scaling.published.row_words import (
    list_formats,
    name_precision,
    name_recompute,
    name_sharding,
    read_shard_size,
)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("none (8k stages fit without)", "none"),
        ("None; full at 128k", "none"),
        ("no", "none"),
        ("without recomputation", "none"),
        ("full (use_checkpoint=true in validation configs)", "full"),
        ("full (uniform)", "full"),
        ("selective: mlp+mla_up_proj (App. B.2); full elsewhere", "selective"),
        ("per-op SAC", "selective"),
        ("sometimes", None),
    ],
)
def test_the_first_words_say_what_is_recomputed(cell: str, expected: str | None) -> None:
    assert name_recompute(cell) == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("bf16 (fp8 all-gather)", "bf16"),
        ("FP8 with bf16 attention", "fp8"),
        ("mixed fp16", "fp16"),
        ("amp_bf16", "bf16"),
        ("BF-16", "bf16"),
        ("FP8-MX / fine-grained", "mxfp8"),
        ("fp8 tensorwise", "fp8"),
        ("NVFP4", "nvfp4"),
        ("TF32", "fp32"),
        ("(bf16)", "bf16"),
        ("int8", None),
    ],
)
def test_the_first_format_is_that_of_the_matrix_products(cell: str, expected: str | None) -> None:
    assert name_precision(cell) == expected


def test_formats_of_a_note() -> None:
    assert list_formats("bf16 implied by the MFU; BF16 weights") == ["bf16"]
    assert list_formats("fp8 forward, bf16 backward") == ["fp8", "bf16"]
    assert list_formats("16 nodes of 8") == []


@pytest.mark.parametrize(
    ("cell", "sharding", "size"),
    [
        ("ZeRO-1 within 8 GPUs", "distributed_optimizer", 8),
        ("zero stage 2", "distributed_optimizer", None),
        ("DDP/dist-opt", "distributed_optimizer", None),
        ("FSDP SHARD_GRAD_OP", "distributed_optimizer", None),
        ("distributed data parallel", "none", None),
        ("ZeRO-0", "none", None),
        ("FSDP=128+DP", "fsdp", 128),
        ("FSDP2=64", "fsdp", 64),
        ("zero_3", "fsdp", None),
        ("Megatron-FSDP optim_grads_params (HSDP: shard within 64-GPU NVLink domain)", "fsdp", 64),
        ("something", None, None),
    ],
)
def test_sharding(cell: str, sharding: str | None, size: int | None) -> None:
    assert (name_sharding(cell), read_shard_size(cell)) == (sharding, size)
