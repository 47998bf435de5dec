"""The size of a checkpoint: what Megatron writes of a model and its optimizer, whatever the layout.

Megatron writes every weight once, however many ranks hold a copy. Quantized weights are written as 16-bit ones
(megatron.core.dist_checkpointing.utils.force_all_tensors_to_non_fp8). Adam adds the fp32 weight and two fp32 moments.
BLOOM-176B published both sizes, 329 GiB and 2.3 TiB; tests/unit/model/test_checkpoint_size.py holds the estimate
against them.
"""

ADAM_BYTES_PER_PARAMETER = 12  # the fp32 weight and two moments


def estimate_checkpoint_bytes(num_parameters: int, *, element_bytes: int, has_optimizer_state: bool = True) -> int:
    """Bytes of one iteration. element_bytes: of a weight, 4 in fp32 and 2 in every other precision."""
    return num_parameters * (element_bytes + (ADAM_BYTES_PER_PARAMETER if has_optimizer_state else 0))
