"""The size of a checkpoint against published ones."""

import pytest

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.checkpoint_size import estimate_checkpoint_bytes


def test_bloom_176b() -> None:
    """BigScience's model page: 329 GB of bf16 weights and 2.3 TB with optimizer states; du counts in powers of two."""
    num_parameters = 176_247_271_424
    weights = estimate_checkpoint_bytes(num_parameters, element_bytes=2, has_optimizer_state=False)
    assert weights / GIB == pytest.approx(329, abs=1)
    assert estimate_checkpoint_bytes(num_parameters, element_bytes=2) / 1024 / GIB == pytest.approx(2.3, abs=0.06)
