"""The flags of a command line by Megatron's attribute names: a read-only view for the checks of single flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Attributes whose flag is not the attribute with dashes.
FLAG_NAMES = {
    "add_bias_linear": "disable-bias-linear",
    "bias_gelu_fusion": "no-bias-gelu-fusion",
    "cuda_graph_scope_deprecated": "cuda-graph-scope",
    "fp4": "fp4-format",
    "fp8": "fp8-format",
    "fp8_wgrad": "no-fp8-wgrad",
    "inference_dynamic_batching_enable_prefix_caching": "inference-dynamic-batching-prefix-caching",
    "layernorm_epsilon": "norm-epsilon",
    "layernorm_zero_centered_gamma": "apply-layernorm-1p",
    "microbatch_group_size_per_vp_stage": "microbatch-group-size-per-virtual-pipeline-stage",
    "muon_split_qkv": "muon-no-split-qkv",
    "strict_fsdp_dtensor_load": "no-strict-fsdp-dtensor-load",
    "torch_fsdp2_reshard_after_forward": "torch-fsdp2-no-reshard-after-forward",
    "tp_comm_bulk_dgrad": "disable-tp-comm-bulk-dgrad",
    "tp_comm_bulk_wgrad": "disable-tp-comm-bulk-wgrad",
    "tp_comm_overlap_ag": "disable-tp-comm-overlap-ag",
    "tp_comm_overlap_rs": "disable-tp-comm-overlap-rs",
    "tp_comm_split_ag": "disable-tp-comm-split-ag",
    "tp_comm_split_rs": "disable-tp-comm-split-rs",
    "requested_world_size": "world-size",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """values: of every flag, with the defaults of preset and platform. typed: names that are on the command line."""

    values: Mapping[str, Any]
    typed: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def list_loud(self, quiet_values: Mapping[str, tuple[object, ...]]) -> list[str]:
        """Names whose value is not one of its quiet ones. A flag that this Megatron does not have is quiet."""
        return [name for name, quiet in quiet_values.items() if self.values.get(name, quiet[0]) not in quiet]


def flag_of(name: str) -> str:
    """The flag of an attribute, without its leading dashes: num_layers -> num-layers."""
    return FLAG_NAMES.get(name, name.replace("_", "-"))


def show_value(value: object) -> str:
    """A flag's value in a message; of an enumeration, its name."""
    value = getattr(value, "name", value)
    return "on" if value is True else "off" if value is False else str(value)
