"""One micro-batch forward: fetch the batch, run the model, sum the loss over tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from torch import Tensor

from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.model.chunked_cross_entropy import compute_loss_in_chunks
from megatron_hammer.training.boundaries import Boundaries, select_on_cp_rank

BATCH_NAMES = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


class ForwardStep:
    """Megatron's forward_step_func for one run: called as (data_iterator, model).

    Called for every micro-batch of training: add_loss with [sum of losses, number of tokens], add_batch with the batch.

    return_schedule_plan: with --overlap-moe-expert-parallel-comm, megatron runs the parts of the forward pass itself.
    """

    def __init__(
        self,
        plan: RunPlan,
        add_loss: Callable[[Tensor], None] | None = None,
        add_batch: Callable[[dict[str, Tensor | None]], None] | None = None,
    ):
        self.plan, self.add_loss, self.add_batch = plan, add_loss, add_batch

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[..., Any]]:
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = self.read_batch(data_iterator, vp_stage, is_training=model.training)
        if self.add_batch is not None and model.training:
            self.add_batch({name: batch[name] for name in BATCH_NAMES})
        forward = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
        extra: dict[str, Any] = {"packed_seq_params": batch["packed_seq_params"]}
        if self.plan.memory.cross_entropy == "chunked":
            extra["output_processor"] = compute_loss_in_chunks
        output = forward(
            batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"], **extra
        )
        add_up = self.sum_loss if model.training else sum_loss
        return output, partial(add_up, batch["loss_mask"], num_padding=batch["num_padding"])

    def sum_loss(
        self, loss_mask: Tensor, token_losses: Tensor, *, num_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As the function below; the loss of training is also told to `add_loss`."""
        loss, num_tokens, report = sum_loss(loss_mask, token_losses, num_padding=num_padding)
        if self.add_loss is not None:
            self.add_loss(report["lm loss"])
        return loss, num_tokens, report

    def read_batch(
        self, data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None, *, is_training: bool
    ) -> dict[str, Any]:
        """The part of the next micro-batch that this rank needs: tokens on the first stage, labels on the last.

        Rank 0 of a tensor-parallel group reads the data and broadcasts it to the group.
        """
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        # A middle stage gets hidden states from the stage before it; of the batch it needs the boundaries, if any.
        rows = self.plan.rows
        if not (is_first or is_last or (rows is not None and rows.is_packed)):
            return dict.fromkeys((*BATCH_NAMES, "packed_seq_params", "num_padding"))
        sizes, layout = self.plan.batch, self.plan.layout
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        batch: dict[str, Any] = {}
        if tp_rank == 0:
            assert data_iterator is not None
            sample = next(data_iterator)
            # Not blocking: the copy from pinned memory overlaps with work that is already queued.
            batch = {name: tensor.cuda(non_blocking=True) for name, tensor in sample.items()}
            batch.setdefault("cu_seqlens_padded", None)
        batch = get_batch_on_this_tp_rank(
            batch,
            has_cu_seqlens=rows is not None,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=self.plan.has_attention_mask,
            broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
            broadcast_group=parallel_state.get_tensor_model_parallel_group(),
            cp_size=layout.context_parallel_size,
            tp_rank=tp_rank,
            micro_batch_size=sizes.micro_batch_size if is_training else sizes.eval_micro_batch_size,
            seq_length=self.plan.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            is_pipeline_first_stage=is_first,
            is_pipeline_last_stage=is_last,
        )
        # The backends make the causal mask themselves, but the model's call needs the key.
        batch = {"attention_mask": None, "packed_seq_params": None, "num_padding": None} | batch
        if rows is not None and rows.is_packed:
            batch = self._confine_attention(batch)
        elif layout.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            batch = get_batch_on_this_cp_rank(
                batch, is_hybrid_cp=False, cp_group=group, use_per_sequence_balancing=True
            )
        if rows is not None:
            # Every rank of a context-parallel group reports its share of the same sequences.
            num_padding = (self.plan.seq_length - batch["cu_seqlens"][:, -1]).sum()
            batch["num_padding"] = num_padding / layout.context_parallel_size
        return batch

    def _confine_attention(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with attention confined to each conversation and positions from 0, on every stage."""
        cp_size = self.plan.layout.context_parallel_size
        ends = batch["cu_seqlens"] if cp_size == 1 else batch["cu_seqlens_padded"]
        boundaries = Boundaries(ends, self.plan.seq_length)
        batch = batch | {"position_ids": boundaries.build_positions()}
        if self.plan.machine.backend == "torch":
            return batch | {"attention_mask": boundaries.build_mask()}
        batch |= {"packed_seq_params": boundaries.build_packed_params()}
        cp_rank = parallel_state.get_context_parallel_rank()
        return batch if cp_size == 1 else select_on_cp_rank(batch, boundaries, cp_size=cp_size, cp_rank=cp_rank)


def sum_loss(
    loss_mask: Tensor, token_losses: Tensor, *, num_padding: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses [b, s] of the tokens that count; Megatron divides by their number.

    Returns the sum, the number of tokens, and {"lm loss": [sum, number]} for reporting over the global batch. With
    conversations, num_padding of the micro-batch's positions are padding; shares of all positions are then reported
    too: {"learned share": [number, positions], "padding share": [padding, positions]}.
    """
    # fp32: a sum over thousands of 16-bit losses would lose their small differences.
    losses = token_losses.view(-1).float()
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses * mask)
    # Megatron reduces this count over the ranks and divides the gradients by it.
    num_tokens = mask.sum().detach().to(torch.int)
    count = num_tokens.to(loss.dtype)
    report = {"lm loss": torch.stack([loss.detach(), count])}
    if num_padding is not None:
        num_positions = torch.full_like(count, mask.numel())
        report["learned share"] = torch.stack([count, num_positions])
        report["padding share"] = torch.stack([num_padding.to(loss.dtype), num_positions])
    return loss, num_tokens, report
