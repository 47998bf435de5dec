"""Which layers have experts and which experts a token gets: values that Megatron takes and that no router can use."""

from typing import Any

from megatron_hammer.config.flags import Flags


def find_expert_problems(flags: Flags) -> list[str]:
    """Problems of --moe-layer-freq and of group-limited routing; none in a dense model, which reads neither."""
    if not flags["num_experts"]:
        return []
    return [
        *_find_frequency_problems(flags["moe_layer_freq"], flags["num_layers"]),
        *_find_group_problems(flags),
        *_find_scaling_problems(flags["moe_router_topk_scaling_factor"]),
    ]


def _find_frequency_problems(frequency: Any, num_layers: int | None) -> list[str]:
    got = f"got moe_layer_freq={frequency}, num_layers={num_layers}"
    if isinstance(frequency, int):
        return [] if frequency >= 1 else [f"moe-layer-freq: must be at least 1, {got}. Pass 1 for every layer."]
    if any(is_moe not in (0, 1) for is_moe in frequency) or not any(frequency):
        return [f"moe-layer-freq: must be 0 or 1 for each layer, and 1 for some, {got}. Pass for example [0]+[1]*23."]
    if num_layers is not None and len(frequency) != num_layers:
        return [f"moe-layer-freq: must have a number for each layer, {got}. Pass {num_layers} of them."]
    return []


def _find_group_problems(flags: Flags) -> list[str]:
    """Megatron scores a group by the sum of its router_topk // group_topk best experts."""
    experts, topk = flags["num_experts"], flags["moe_router_topk"]
    num_groups, group_topk = flags["moe_router_num_groups"], flags["moe_router_group_topk"]
    if not num_groups or not group_topk:
        return []
    got = (
        f"got num_experts={experts}, moe_router_topk={topk}, moe_router_num_groups={num_groups}, "
        f"moe_router_group_topk={group_topk}"
    )
    if num_groups < 1 or experts % num_groups:
        return [f"moe-router-num-groups: must divide num_experts, {got}. Change one of the two."]
    if not 1 <= group_topk <= min(num_groups, topk):
        return [
            "moe-router-group-topk: must be at least 1, and at most the groups and the experts of a token, "
            f"{got}. Pass a smaller one."
        ]
    if topk > group_topk * (experts // num_groups):
        return [f"moe-router-topk: must fit in the chosen groups, {got}. Choose more groups, or fewer experts."]
    return []


def _find_scaling_problems(factor: float | None) -> list[str]:
    # Megatron takes 0 for no factor.
    if factor is None or 0 < factor < float("inf"):
        return []
    return [
        "moe-router-topk-scaling-factor: must be finite and above 0, got "
        f"moe_router_topk_scaling_factor={factor}. Drop it for 1."
    ]
