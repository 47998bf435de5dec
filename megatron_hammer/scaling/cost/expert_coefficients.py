"""The coefficients of mixtures of experts. They are fitted on runs with experts, with all other coefficients held."""

from dataclasses import dataclass, fields

from megatron_hammer.scaling.cost.prior import Prior
from megatron_hammer.scaling.plan import PositiveFloat

EXPERT_PRIORS: dict[str, Prior] = {
    # Published grouped products of experts reach 70 to 90% of one large product of the same size.
    "grouped_gemm_ratio": Prior(0.85, 0.4, 1.1, 0.15),
    "low_grouped_gemm_ratio": Prior(0.75, 0.25, 1.1, 0.2),
    "permute_ratio": Prior(0.7, 0.2, 1.0, 0.3),
    "all_to_all_ratio": Prior(0.7, 0.2, 1.0, 0.3),
    # DeepEP's README: 153 of about 160 GB/s of NVLink on H800, 43 to 58 of 50 GB/s of a network card.
    "fused_dispatch_ratio": Prior(0.9, 0.3, 1.2, 0.2),
    "exposed_ratio": Prior(0.25, 0.02, 1.0, 0.5),
    "host_s": Prior(2.6e-5, 5e-6, 1e-4, 0.5),
    "expert_launch_s": Prior(8e-6, 1e-6, 6e-5, 0.7),
    # A learned score in the softmax, and windows, need kernels of their own.
    "sink_attention_ratio": Prior(0.5, 0.1, 1.0, 0.5),
    "sync_s": Prior(6e-5, 5e-6, 5e-4, 0.7),
}
EXPERT_TABLE = "experts"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCoefficients:
    """What a mixture of experts adds to the cost of a layer."""

    grouped_gemm_ratio: PositiveFloat  # speed of the experts' products over one product of the same size; 16 bits
    low_grouped_gemm_ratio: PositiveFloat  # in 8 and 4 bits
    permute_ratio: PositiveFloat  # of the memory's speed in other kernels, while tokens are permuted
    all_to_all_ratio: PositiveFloat  # speed of NCCL's all-to-all over that of its rings
    fused_dispatch_ratio: PositiveFloat  # the same of the kernels of DeepEP and HybridEP
    exposed_ratio: PositiveFloat  # of the exchange at least, where it runs beside another micro-batch
    host_s: PositiveFloat  # of the host to launch one kernel of a mixture
    expert_launch_s: PositiveFloat  # of the host for one product of one expert, or for casting one operand of it
    sink_attention_ratio: PositiveFloat  # speed of attention with learned sinks over that without
    sync_s: PositiveFloat  # of the device, while the host waits for the number of tokens of each expert


def build_prior_expert_coefficients() -> ExpertCoefficients:
    return ExpertCoefficients(**{name: prior.value for name, prior in EXPERT_PRIORS.items()})


EXPERT_NAMES = tuple(field.name for field in fields(ExpertCoefficients))
