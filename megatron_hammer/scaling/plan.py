"""The types of a projection: the machine, the run that is planned on it, and the predicted time of its step.

`hardware/catalogue.py` reads GPUs and clusters, `cost/step_time.py` predicts, `search/search.py` finds the best plan.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.memory.options import OffloadModule, RecomputeModule
from megatron_hammer.model.shape import ModelShape

# Limits of what a TOML file may hold (files/typed.py checks them); a file cannot say "infinite".
Text = Annotated[str, MinLen(1)]
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
AtLeastOne = Annotated[float, Ge(1), Lt(math.inf)]
# Of GPUs and clusters: wide enough for every machine, and too narrow for a number in another unit.
Tflops = Annotated[float, Gt(0), Le(1e6)]
BytesPerS = Annotated[float, Ge(1e6), Le(1e15)]
LatencyS = Annotated[float, Ge(0), Le(1)]
Watts = Annotated[float, Ge(0.1), Le(1e5)]
MemoryBytes = Annotated[int, Ge(2**20), Le(2**50)]

# Of the matrix products; the rest is 16-bit. fp8 has one scale per tensor (delayed or current), fp8_blockwise one per
# 128 elements or 128 x 128 of a weight, mxfp8 one per 32 elements, nvfp4 one per 16.
Precision = Literal["fp32", "fp16", "bf16", "fp8", "fp8_blockwise", "mxfp8", "nvfp4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LOW_PRECISIONS: tuple[Precision, ...] = ("fp8", "fp8_blockwise", "mxfp8", "nvfp4")
# The first compute capability whose tensor cores apply the scales of a format. TransformerEngine runs fp8_blockwise on
# later GPUs too, there as mxfp8.
SCALED_FORMATS = {"fp8_blockwise": 9.0, "mxfp8": 10.0, "nvfp4": 10.0}
Recompute = Literal["none", "selective", "full"]
Sharding = Literal["none", "distributed_optimizer", "fsdp"]
# How tokens reach their experts: NCCL's all-gather or all-to-all, or the kernels of DeepEP (deepseek-ai/DeepEP) and
# HybridEP, which send a token once to each node or NVLink domain and copy it there.
Dispatcher = Literal["allgather", "alltoall", "deepep", "hybridep"]
DISPATCHERS: tuple[Dispatcher, ...] = get_args(Dispatcher)
FUSED_DISPATCHERS: tuple[Dispatcher, ...] = ("deepep", "hybridep")  # need their packages, and GPUs
# What CUDA graphs launch instead of the host: nothing, the router of a mixture, that and attention, or the whole step.
CudaGraphs = Literal["none", "router", "attention", "step"]
# What "selective" recomputation repeats: Megatron's --recompute-modules.
RECOMPUTE_MODULES: tuple[RecomputeModule, ...] = get_args(RecomputeModule)[:-1]
# The newest software of which runs are published (Megatron Bridge 26.06): what a plan runs unless it says otherwise.
TODAY = 2026.5
ContextExchange = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]  # Megatron's --cp-comm-type
CONTEXT_EXCHANGES: tuple[ContextExchange, ...] = get_args(ContextExchange)
Routing = Literal["adaptive", "hashed"]  # of flows over equal paths: InfiniBand, or sprayed packets; RoCE with ECMP


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator as in its data sheet. Peaks are dense (no sparsity), and None for a format that it lacks."""

    name: str
    source: Text
    aliases: tuple[Text, ...] = ()  # other spellings, as published tables and torch.cuda write them
    fp32_tflops: Tflops  # TF32 if the GPU has it
    fp16_tflops: Tflops
    bf16_tflops: Tflops | None = None
    fp8_tflops: Tflops | None = None
    fp4_tflops: Tflops | None = None
    memory_bytes: MemoryBytes
    memory_bytes_per_s: BytesPerS
    power_w: Watts  # of the board at full load
    exponentials_per_s: PositiveFloat | None = None  # of the special function units, which attention's softmax needs
    compute_capability: PositiveFloat | None = None  # of CUDA; None: from the formats that it multiplies in

    def find_peak_tflops(self, precision: Precision) -> float | None:
        """The dense peak of matrix products in this precision. None if the GPU has no units for it."""
        if self._find_capability() < SCALED_FORMATS.get(precision, 0.0):
            return None
        # fp8 and its block-scaled forms run on the same units.
        formats = {"fp8_blockwise": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}
        peak: float | None = getattr(self, f"{formats.get(precision, precision)}_tflops")
        return peak

    def _find_capability(self) -> float:
        if self.compute_capability is not None:
            return self.compute_capability
        return 10.0 if self.fp4_tflops else 9.0 if self.fp8_tflops else 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """How GPUs are wired. Bandwidths are of one GPU in one direction, before any efficiency."""

    name: str
    source: Text
    gpu: Text  # name of what it is usually built of
    gpus_per_node: PositiveInt
    nvlink_domain_size: PositiveInt  # GPUs that are connected at nvlink_bytes_per_s; 72 in an NVL72 rack
    nvlink_bytes_per_s: BytesPerS
    nvlink_latency_s: LatencyS
    network_bytes_per_s: BytesPerS
    network_latency_s: LatencyS
    leaf_size: NonNegativeInt = 0  # GPUs under one leaf of the fat tree (a rail group); 0: one flat network
    spine_oversubscription_ratio: AtLeastOne = 1.0  # 2: half the bandwidth between leaves
    pod_size: NonNegativeInt = 0  # GPUs under one switch of the next level; 0: no such level
    pod_oversubscription_ratio: AtLeastOne = 1.0
    routing: Routing = "adaptive"
    has_nvlink_sums: bool = False  # NVSwitches of a domain that sum what passes them (NVLink SHARP)
    cpu_power_w_per_node: NonNegativeFloat = 0.0  # of everything in a node except its GPUs
    power_usage_effectiveness: AtLeastOne = 1.0
    usd_per_gpu_hour: NonNegativeFloat | None = None
    host_bytes_per_s: BytesPerS = 31.5e9  # from a GPU to its host and back: PCIe 4.0 x16
    host_memory_bytes_per_s: BytesPerS = 51e9  # a GPU's share of the host's memory bandwidth: DGX A100's
    # Processes of a node that compute at full speed at once; None: all. On CPU hosts it is the number of cores.
    full_speed_processes_per_node: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOptions:
    """How a run computes its mixtures of experts. It has no meaning for a dense model."""

    dispatcher: Dispatcher = "alltoall"
    overlaps_communication: bool = False  # --overlap-moe-expert-parallel-comm
    has_grouped_gemm: bool = True  # --moe-grouped-gemm; False: one product after the other
    pads_to_capacity: bool = False  # --moe-pad-expert-input-to-capacity: tokens beyond it are dropped
    imbalance_ratio: AtLeastOne = 1.0  # tokens of the busiest rank of experts over the mean

    @property
    def dispatcher_type(self) -> str:
        """--moe-token-dispatcher-type. The kernels of DeepEP and HybridEP are backends of one type, "flex"."""
        return "flex" if self.dispatcher in FUSED_DISPATCHERS else self.dispatcher


# Of training with natural routing and a balancing loss or bias. NVIDIA's Megatron-Bridge trains Nemotron 3 Super with
# room for 1.1 times the mean of tokens (model card: 29.4 s per step, against 27.6 s with tokens spread by force).
NATURAL_IMBALANCE_RATIO = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One training run to be predicted. The data-parallel size and the other parallel sizes are in `layout`."""

    model: ModelShape
    layout: ParallelLayout
    gpu: Gpu
    cluster: Cluster
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # of "selective"
    recompute_num_layers: int | None = None  # of "full", of each model chunk; None: all
    has_quantized_parameters: bool = False  # --fp8-param-gather: no 16-bit weights of the linears
    keeps_quantized_copies: bool = True  # of 16-bit weights; False: software that quantizes each time it multiplies
    num_offloaded_layers: int = 0  # --cpu-offloading-num-layers: their activations wait on the host
    offload_modules: tuple[OffloadModule, ...] = ()  # of --fine-grained-activation-offloading
    optimizer_offload_ratio: float = 0.0  # --optimizer-cpu-offload
    master_bytes: int = 4  # of an element in the optimizer
    moments_bytes: int = 8  # the same of Adam's two
    sharding: Sharding = "distributed_optimizer"
    shard_size: int | None = None  # ranks that share one copy of what is sharded; None: all data and context ranks
    has_flash_attention: bool = True
    overlaps_grad_reduce: bool = True
    overlaps_param_gather: bool = True
    overlaps_tensor_parallel: bool = False  # --tp-comm-overlap
    context_exchange: ContextExchange = "p2p"
    gradient_bytes: int = 4  # of one element in the reduction
    vocab_divisible_by: int = 128
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    cuda_graphs: CudaGraphs = "none"
    software_year: float = TODAY  # when the software was released: kernels of a new generation become faster for years

    @property
    def num_microbatches(self) -> int:
        return max(1, self.global_batch_size // (self.micro_batch_size * self.layout.data_parallel_size))

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step on its critical path; of communication only the part that is not hidden."""

    matmul_s: float
    attention_s: float
    pointwise_s: float  # norms, activations, rotary, dropout, residuals: bound by memory
    embedding_and_loss_s: float
    recompute_s: float
    overhead_s: float  # kernel launches and host work that the device waits for
    tensor_parallel_s: float
    context_parallel_s: float
    expert_parallel_s: float
    pipeline_p2p_s: float
    bubble_s: float
    data_parallel_s: float
    optimizer_s: float
    jitter_s: float
    low_s: float  # low_s to high_s: the band around total_s that contains 80 % of measured steps
    high_s: float

    @property
    def total_s(self) -> float:
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(field.name for field in fields(StepTime) if field.name not in ("low_s", "high_s"))
