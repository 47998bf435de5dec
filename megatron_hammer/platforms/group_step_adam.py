"""Adam with the calling convention and the state layout of the fused optimizers that megatron expects.

TransformerEngine's and apex's FusedAdam keep one step count in each parameter group; torch.optim.AdamW keeps a tensor
for every parameter, and megatron's distributed optimizer cannot resume from that (it asserts one step value over the
parameters of a rank, which is false for a rank whose shard is empty). The arithmetic is torch's own fused kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (adam_w_mode=True) or Adam with L2, its `step` count in the parameter group.

    Equals torch.optim.AdamW(fused=True) bit for bit; tests/numerics/test_group_step_adam.py holds it to that.
    State of a parameter: exp_avg and exp_avg_sq, fp32, the parameter's shape.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if capturable:
            raise ValueError("GroupStepAdam cannot be captured in a CUDA graph; install TransformerEngine for that.")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; ValueError for a closure, which megatron never passes."""
        if closure is not None:
            raise ValueError("GroupStepAdam takes no closure.")
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            # megatron aligns the counts of all groups on load, so empty groups count too.
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            # The fused kernels take the step as a tensor on the parameters' device. torch.tensor would copy it there
            # from the host, which waits until the GPU has done everything before.
            step = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
            # Called directly: torch.optim.AdamW would keep a step tensor of its own for each parameter.
            update(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
