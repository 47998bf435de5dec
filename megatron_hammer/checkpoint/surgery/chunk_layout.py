"""The boxes that a tensor is cut into, so that every rank of a layout loads whole chunks.

The boxes are those that megatron writes at that layout: one for each layer and expert, cut along the axis that tensor
parallelism shards. The first matrix of a gated MLP is also cut between gate and up. torch_dist reads any other cut
too, but with this one a rank reads only its own data.
"""

import itertools
import re
from dataclasses import dataclass

from megatron_hammer.checkpoint.surgery.training_checkpoint import parameter_key
from megatron_hammer.checkpoint_files.torch_dist.description import Box
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import split_stack

# The end of a parameter's name, and the axis (after layers and experts) that tensor parallelism cuts.
_ROWS_CUT = re.compile(
    r"(^embedding\.word_embeddings|^output_layer|\.self_attention\.linear_qkv|\.linear_fc1)\.(weight|bias)$"
)
_COLUMNS_CUT = re.compile(r"\.(self_attention\.linear_proj|linear_fc2)\.weight$")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """What decides the cuts. has_gated_mlp: linear_fc1 holds gate and up, one above the other."""

    tensor_model_parallel_size: int
    expert_tensor_parallel_size: int
    has_gated_mlp: bool

    def cut(self, key: str, shape: tuple[int, ...]) -> list[Box]:
        """(offsets, sizes) of every box, which together are the tensor; `key` may be the optimizer's."""
        name = parameter_key(key)
        _, num_stacked = split_stack(name)
        inner = shape[num_stacked:]
        boxes = []
        # One box for each layer and expert: pipeline and expert parallelism give a rank whole ones.
        for index in itertools.product(*map(range, shape[:num_stacked])):
            for offsets, sizes in self._cut_matrix(name, inner):
                boxes.append(((*index, *offsets), (*([1] * num_stacked), *sizes)))
        return boxes

    def _cut_matrix(self, name: str, shape: tuple[int, ...]) -> list[Box]:
        axis = 0 if _ROWS_CUT.search(name) else 1 if _COLUMNS_CUT.search(name) else None
        # Shared experts (.mlp.shared_experts.) are cut as dense layers are.
        is_expert = ".mlp.experts." in name
        num_parts = self.expert_tensor_parallel_size if is_expert else self.tensor_model_parallel_size
        if self.has_gated_mlp and ".linear_fc1." in name:
            # A rank holds its rows of the gate and its rows of up, which are not neighbours in the whole matrix.
            num_parts *= 2
        # Not cut: every rank holds all of it, or the sizes do not divide and the reader assembles its part.
        if axis is None or axis >= len(shape) or shape[axis] % num_parts:
            return [((0,) * len(shape), shape)]
        size = shape[axis] // num_parts
        sizes = (*shape[:axis], size, *shape[axis + 1 :])
        return [((*([0] * axis), part * size, *([0] * (len(shape) - axis - 1))), sizes) for part in range(num_parts)]


def layout_of(args: object) -> ShardLayout:
    """The layout in a checkpoint's saved arguments."""
    tp = getattr(args, "tensor_model_parallel_size", 1)
    return ShardLayout(
        tensor_model_parallel_size=tp,
        # megatron's default: the tensor-parallel size, if the argument is absent or None.
        expert_tensor_parallel_size=getattr(args, "expert_tensor_parallel_size", None) or tp,
        has_gated_mlp=bool(getattr(args, "swiglu", False)),
    )
