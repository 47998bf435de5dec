"""Where the conversations of a micro-batch begin and end, in the forms that attention and position embeddings take.

Every pipeline stage derives them from the same ends, which all of them read: a stage without boundaries would let
conversations attend to each other in its layers, and nothing would fail.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Boundaries:
    """Boundaries in sequences of `size` positions.

    ends [b, size + 1] int32: 0, then where each conversation ends, the last end repeated. What follows is padding,
    which is treated as one more conversation.
    """

    ends: Tensor
    size: int

    def _number_conversations(self) -> Tensor:
        """[b, size]: the number of the conversation at each position, `size` in padding."""
        places = torch.arange(self.size, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(
            self.ends[:, 1:].contiguous(), places.expand(len(self.ends), -1).contiguous(), right=True
        )

    def build_positions(self) -> Tensor:
        """[b, size] int64: positions that begin at 0 with each conversation."""
        starts = self.ends.gather(1, self._number_conversations())
        return torch.arange(self.size, device=self.ends.device) - starts

    def build_mask(self) -> Tensor:
        """[b, 1, size, size], True where attention is forbidden: to later positions and to other conversations."""
        numbers = self._number_conversations()
        is_other = numbers[:, :, None] != numbers[:, None, :]
        is_later = torch.ones(self.size, self.size, dtype=torch.bool, device=numbers.device).triu(1)
        return (is_other | is_later).unsqueeze(1)

    def build_packed_params(self) -> PackedSeqParams:
        """For model/te_attention.py: boundaries in the b * size positions of all sequences, one after another."""
        offsets = self.size * torch.arange(len(self.ends), device=self.ends.device, dtype=self.ends.dtype)
        # Each sequence ends with its padding; ends that are repeated are one boundary.
        ends = torch.nn.functional.pad(self.ends, (0, 1), value=self.size) + offsets[:, None]
        ends = torch.unique_consecutive(ends.flatten())
        # An upper bound is enough for the kernels, and the true maximum would change from batch to batch.
        return PackedSeqParams(
            qkv_format="sbhd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=self.size, max_seqlen_kv=self.size
        )

    def select_positions_of_rank(self, cp_size: int, cp_rank: int) -> Tensor:
        """[b, size / cp] int64: the positions of a context-parallel rank, two equal parts of each conversation.

        Each conversation has a multiple of 2 * cp positions. Rank r has its parts r and 2 * cp - 1 - r, so that all
        ranks attend to as much. Source: thd_get_partitioned_indices of TransformerEngine.
        """
        numbers = self._number_conversations()
        starts = self.ends.gather(1, numbers)
        # The end of a conversation is the next entry; that of the padding is the end of the sequence.
        ends = torch.nn.functional.pad(self.ends, (0, 1), value=self.size).gather(1, numbers + 1)
        part = (self.build_positions() * 2 * cp_size) // (ends - starts)
        is_mine = (part == cp_rank) | (part == 2 * cp_size - 1 - cp_rank)
        return is_mine.nonzero()[:, 1].view(len(self.ends), self.size // cp_size)


def select_on_cp_rank(batch: dict[str, Any], boundaries: Boundaries, *, cp_size: int, cp_rank: int) -> dict[str, Any]:
    """The part of a batch of [b, s] tensors that a context-parallel rank has."""
    index = boundaries.select_positions_of_rank(cp_size, cp_rank)
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return batch | {name: batch[name].gather(1, index) for name in names if batch[name] is not None}
