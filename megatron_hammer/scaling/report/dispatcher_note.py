"""What a dispatcher of experts that the user did not name would do to the layout to start from."""

from dataclasses import replace

from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.plan import Dispatcher
from megatron_hammer.scaling.search.projection import StudyResult

USUAL_DOMAIN = 8  # GPUs of an NVLink domain; HybridEP is NVIDIA's for larger ones
LEAST_GAIN_RATIO = 0.03


def describe_faster_dispatcher(result: StudyResult) -> str:
    """A sentence about the largest size that fits, if DeepEP or HybridEP saves 3 % or more there.

    Empty otherwise, for dense models, and where another model of cost has predicted the steps.
    """
    starts = [size.best for size in result.sizes if size.best is not None]
    if not starts or result.coefficients is None or result.study.model.moe is None:
        return ""
    start = starts[-1]
    plan = start.plan
    if plan.layout.expert_model_parallel_size == 1 or plan.experts.dispatcher_type == "flex":
        return ""
    name: Dispatcher = "deepep" if plan.cluster.nvlink_domain_size <= USUAL_DOMAIN else "hybridep"
    other = replace(plan, experts=replace(plan.experts, dispatcher=name))
    gain_ratio = 1 - predict_step(other, result.coefficients).total_s / start.step.total_s
    if gain_ratio < LEAST_GAIN_RATIO:
        return ""
    return (
        f"Where its package is installed, --moe-dispatcher {name} makes the layout for {plan.layout.world_size:,} GPUs "
        f"{gain_ratio:.0%} faster than {plan.experts.dispatcher}, and may make another one the best."
    )
