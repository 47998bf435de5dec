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
            self.add_batch(batch)
        forward = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
        extra = {"output_processor": compute_loss_in_chunks} if self.plan.memory.cross_entropy == "chunked" else {}
        output = forward(
            batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"], **extra
        )
        return output, partial(self.sum_loss if model.training else sum_loss, batch["loss_mask"])

    def sum_loss(self, loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As the function below; the loss of training is also told to `add_loss`."""
        loss, num_tokens, report = sum_loss(loss_mask, token_losses)
        if self.add_loss is not None:
            self.add_loss(report["lm loss"])
        return loss, num_tokens, report

    def read_batch(
        self, data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None, *, is_training: bool
    ) -> dict[str, Tensor | None]:
        """The part of the next micro-batch that this rank needs: tokens on the first stage, labels on the last.

        Rank 0 of a tensor-parallel group reads the data and broadcasts it to the group.
        """
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        # A middle stage gets hidden states from the stage before it and needs no part of the batch.
        if not (is_first or is_last):
            return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids", "attention_mask"))
        sizes, layout = self.plan.batch, self.plan.layout
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        batch: dict[str, Any] = {}
        if tp_rank == 0:
            assert data_iterator is not None
            sample = next(data_iterator)
            # Not blocking: the copy from pinned memory overlaps with work that is already queued.
            batch = {name: tensor.cuda(non_blocking=True) for name, tensor in sample.items()}
        batch = get_batch_on_this_tp_rank(
            batch,
            has_cu_seqlens=False,
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
        batch.setdefault("attention_mask", None)
        if layout.context_parallel_size == 1:
            return batch
        group = parallel_state.get_context_parallel_group()
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def sum_loss(loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses [b, s] of the tokens that count; Megatron divides by their number.

    Returns the sum, the number of tokens, and {"lm loss": [sum, number]} for reporting over the global batch.
    """
    # fp32: a sum over thousands of 16-bit losses would lose their small differences.
    losses = token_losses.view(-1).float()
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses * mask)
    # Megatron reduces this count over the ranks and divides the gradients by it.
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}
