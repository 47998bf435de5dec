"""What the memory of a run depends on besides model and layout: its batch, its number formats and what is recomputed.

`estimate.py` is the entry point; `state.py`, `activations.py` and `loss.py` do the counting.
"""

from dataclasses import dataclass
from typing import Literal, get_args

# Of the matrix products; everything else is 16-bit beside the 8- and 4-bit ones (bf16 stands for fp16 too).
Precision = Literal["fp32", "bf16", "fp8", "fp8_blockwise", "mxfp8", "nvfp4"]
Recompute = Literal["none", "selective", "full"]
# Megatron's --recompute-modules, and torchtitan's checkpointing of operators, which keeps every second product.
RecomputeModule = Literal[
    "core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts", "every_other_matmul"
]
Sharding = Literal["none", "distributed_optimizer", "fsdp"]
# Megatron's --offload-modules: each moves its input to the host between the forward and the backward pass.
OffloadModule = Literal[
    "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act", "fused_group_mlp"
]
OFFLOAD_MODULES: tuple[OffloadModule, ...] = get_args(OffloadModule)
EXPERT_OFFLOAD_MODULES: tuple[OffloadModule, ...] = OFFLOAD_MODULES[-3:]
# Two of this package (model/cross_entropy.py, chunked_cross_entropy.py), and five that only published runs have: three
# of Megatron (without --cross-entropy-loss-fusion, and its two implementations), and PyTorch's, compiled or not.
CrossEntropy = Literal["in-place", "chunked", "unfused", "native", "te", "eager", "compiled"]
# Tokens of which "chunked" has logits at a time. A product of the output layer with so many is still as fast as a whole
# one. With more and smaller chunks, the sum of their 16-bit weight gradients loses precision (benchmarks/RESULTS.md).
CHUNK_TOKENS = 4096

# Bytes of one element that a linear keeps as its input, and of one copy of its quantized weight, with their block
# scales: four bytes per 128 elements (blockwise), one per 32 (MXFP8), one per 16 (NVFP4). Per-tensor fp8 scales take no
# memory.
QUANTIZED_BYTES: dict[Precision, float] = {"fp8": 1.0, "fp8_blockwise": 33 / 32, "mxfp8": 33 / 32, "nvfp4": 9 / 16}

# cuBLAS takes its workspaces from torch's allocator (32 MiB each since Hopper), so they are part of a recorded peak.
# With what TransformerEngine and small tensors add, it is 50 MiB in each of SimuMax's 15 published B200 peaks of Llama
# models and 50 to 130 MiB in the H100 runs of Megatron-LM's own tests.
WORKSPACE_BYTES = 80 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOptions:
    """Flags of a run that change its memory; the defaults are Megatron's with TransformerEngine in bf16."""

    precision: Precision = "bf16"
    recompute: Recompute = "none"
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # of "selective"
    recompute_method: Literal["uniform", "block"] = "uniform"  # of "full"
    recompute_num_layers: int | None = None  # uniform: of a unit, 1 where None; block: of a chunk, all where None
    has_hidden_dropout: bool = False
    has_attention_dropout: bool = False
    has_flash_attention: bool = True  # False: scores and probabilities of every pair of positions are kept
    has_expanded_heads: bool = False  # attention keeps a copy of key and value for each query head
    has_separate_values: bool = True  # False: the values are a view of linear_qkv's output, which stays as a whole
    cross_entropy: CrossEntropy = "unfused"
    is_context_parallel_all_to_all: bool = False  # --cp-comm-type a2a: attention keeps an output of its own
    sharding: Sharding | None = None  # None: what the layout says of the distributed optimizer
    shard_size: int | None = None  # ranks that share one copy of what is sharded; None: all that hold the same
    gradient_bytes: int = 4  # of an element of the gradient buffer; 2 where gradients are accumulated in 16 bits
    moments_bytes: int = 8  # of an element in the optimizer, beside the fp32 master: Adam's two
    matrix_moments_bytes: int = 8  # the same in the matrices of a layer's linears: 4 with Muon
    reshards_after_forward: bool = True  # of FSDP; False: gathered weights and whole gradients stay for a step
    has_fused_activation: bool = True  # False: the output of SiLU is kept beside its product with the other half
    has_linear_offset: bool = False  # Megatron's own SwiGLU that is not fused keeps that other half plus an offset too
    has_fused_norms: bool = True  # False: a norm is not part of the MLP after it, which is recomputed from its output
    # Weight gradients are added to main_grad and TransformerEngine's placeholders stand for them. Megatron's own layers
    # pass an empty tensor of each gradient's size through autograd instead, which takes as much memory as the gradient.
    has_fused_weight_gradients: bool = True
    has_quantized_parameters: bool = False  # --fp8-param-gather and its fp4 form: the weights themselves are quantized
    # Products read a quantized copy of a weight forward and a transposed one backward. Blackwell multiplies per-tensor
    # fp8 in every layout and needs the first only (is_non_tn_fp8_gemm_supported of TransformerEngine).
    has_transposed_weights: bool = True
    master_bytes: int = 4  # of an element of 16-bit weights in the optimizer; 2 where it keeps only the lost bits
    optimizer_offload_ratio: float = 0.0  # --optimizer-cpu-offload: --optimizer-offload-fraction
    num_offloaded_layers: int = 0  # --cpu-offloading-num-layers
    offload_modules: tuple[OffloadModule, ...] = ()  # of --fine-grained-activation-offloading
    offload_ratio: float = 1.0  # --activation-offload-fraction, of these modules
    expert_imbalance_ratio: float = 1.0  # tokens of the rank with the most over the average, with dropless routing
    workspace_bytes: int = WORKSPACE_BYTES
    vocab_divisible_by: int = 128

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a weight, and of an activation outside the matrix products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def linear_input_bytes(self) -> float:
        """Bytes of an element that a linear keeps for its weight gradient: of its quantized copy, if it has one."""
        return QUANTIZED_BYTES.get(self.precision, float(self.element_bytes))

    @property
    def has_quantized_copies(self) -> bool:
        """Whether quantized copies of 16-bit weights last."""
        return self.precision in QUANTIZED_BYTES and not self.has_quantized_parameters

    def is_recomputed(self, module: RecomputeModule) -> bool:
        return self.recompute == "selective" and module in self.recompute_modules


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch."""

    micro_batch_size: int
    seq_length: int

    def count_tokens(self, context_parallel_size: int) -> int:
        """Tokens of one context-parallel rank."""
        return self.micro_batch_size * self.seq_length // context_parallel_size
