"""What the software of a source does with memory where a row of a memory table is blank: facts, each with its source.

First match wins, by a pattern of the row's source. `measured_memory.py` applies them and names every one it used.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_hammer.model.memory_options import WORKSPACE_BYTES, CrossEntropy, RecomputeModule
from megatron_hammer.scaling.plan import Precision, Recompute, Sharding

# Peaks of torch's allocator, or what it held from the driver, as nvidia-smi shows with the context on top of it.
PeakKind = Literal["allocated", "reserved"]
StageChoice = Literal["heaviest", "first", "last"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStack:
    """Defaults of one source's software for cells that are blank, and what no cell says."""

    name: str
    source_pattern: str  # searched in the row's source, lower case
    source: str
    peak: PeakKind = "allocated"
    stage: StageChoice = "heaviest"
    state: Literal["state", "layer_state"] = "state"  # what its figures of weights and optimizer count
    seq_length: int | None = None
    micro_batch_size: int | None = None
    vocab_size: int | None = None  # overrides what the model's name says; not a cell of the row
    data_parallel_size: int | None = None
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    selective_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # what "selective" means there
    sharding: Sharding = "distributed_optimizer"
    has_sequence_parallel: bool = True  # where tp > 1 and the cell is blank
    has_dropout: bool = False
    has_flash_attention: bool = True
    shard_size: int | None = None
    reshards_in_pipeline: bool = True
    has_fused_activation: bool = True
    has_fused_weight_gradients: bool = True
    has_fp8_parameters: bool = False
    keeps_quantized: bool = True  # False: casts to 8 bits and back are made anew wherever they are needed
    is_context_parallel_all_to_all: bool = False
    cross_entropy: CrossEntropy = "unfused"
    gradient_bytes: int = 4
    workspace_bytes: int = WORKSPACE_BYTES


STACKS: tuple[MemoryStack, ...] = (
    MemoryStack(
        name="Korthikanti et al. 2022",
        source_pattern=r"korthikanti",
        source="arXiv 2205.05198, sections 4 to 6: dropout, no flash attention, Adam not sharded; the states of its "
        "figure 1 are 18 bytes for each of 12 layers hidden^2 parameters, without the embedding",
        stage="first",
        state="layer_state",
        sharding="none",
        has_sequence_parallel=False,
        has_dropout=True,
        has_flash_attention=False,
        workspace_bytes=0,
    ),
    MemoryStack(
        name="Megatron-LM's functional tests",
        source_pattern=r"megatronlm_ci",
        source="NVIDIA/Megatron-LM tests/functional_tests/test_cases/gpt, model_config.yaml: GPT-2's vocabulary, "
        "deterministic mode (CUBLAS_WORKSPACE_CONFIG, no fused weight gradients); the last rank writes its memory",
        stage="last",
        vocab_size=50_257,
        data_parallel_size=32,
        has_sequence_parallel=False,
        has_dropout=True,
        has_fused_weight_gradients=False,
        workspace_bytes=107 * 2**20,  # state of 14 of these runs against their memory between steps
    ),
    MemoryStack(
        name="SimuMax's B200 runs",
        source_pattern=r"simumax",
        source="MooreThreads/SimuMax simu_tools/megatron_scripts: sequence 4096, micro-batch 1, NullTokenizer (one row "
        "more), --use-distributed-optimizer, --sequence-parallel, --cp-comm-type a2a",
        seq_length=4096,
        micro_batch_size=1,
        vocab_size=128_257,
        is_context_parallel_all_to_all=True,
        workspace_bytes=50 * 2**20,
    ),
    MemoryStack(
        name="Megatron-Bridge",
        source_pattern=r"megatronbridge",
        source="NVIDIA-NeMo/Megatron-Bridge training/mixed_precision.py (fp8 parameters) and scripts/performance "
        "(fused cross entropy, gradients reduced in bf16)",
        has_fp8_parameters=True,
        cross_entropy="te",
        gradient_bytes=2,
    ),
    MemoryStack(
        name="torchtitan",
        source_pattern=r"torchtitan",
        source="pytorch/torchtitan components/metrics.py (prints max_reserved), components/loss.py (fp32 logits) and "
        "the pipeline's FSDP2, which reshards after the backward pass only",
        peak="reserved",
        sharding="fsdp",
        recompute="selective",
        selective_modules=("every_other_matmul",),
        keeps_quantized=False,
        reshards_in_pipeline=False,
        has_fused_activation=False,
        has_fused_weight_gradients=False,
        cross_entropy="native",
    ),
    MemoryStack(
        name="nanotron",
        source_pattern=r"nanotron",
        source="huggingface/nanotron scripts/scaling_benchmarks.py: sequence 4096, no recomputation; 16-bit gradients "
        "beside their fp32 accumulator, SiLU and its product apart",
        peak="reserved",
        seq_length=4096,
        sharding="none",
        gradient_bytes=6,
        has_fused_activation=False,
        has_fused_weight_gradients=False,
        cross_entropy="native",
    ),
)
UNKNOWN_STACK = MemoryStack(
    name="Megatron-style software", source_pattern="", source="nothing is known of this source: Megatron's defaults"
)


def select_memory_stack(source: str) -> MemoryStack:
    """The facts about a source; Megatron's defaults where there are none."""
    return next((stack for stack in STACKS if re.search(stack.source_pattern, source.lower())), UNKNOWN_STACK)


@dataclass(frozen=True, kw_only=True, slots=True)
class NameRule:
    """What a word in a row's model name or quantity says about its run."""

    pattern: str
    source_pattern: str
    says: str
    changes: tuple[tuple[str, object], ...]  # of ModelShape, MemoryStack or ParallelLayout, by field name


_CI = r"megatronlm_ci"
NAME_RULES: tuple[NameRule, ...] = (
    NameRule(
        pattern=r"rope", source_pattern=_CI, says="rotary positions", changes=(("position_embedding_type", "rope"),)
    ),
    NameRule(pattern=r"untie", source_pattern=_CI, says="untied head", changes=(("has_tied_embeddings", False),)),
    NameRule(
        pattern=r"disable_bias_linear", source_pattern=_CI, says="no biases", changes=(("has_linear_bias", False),)
    ),
    NameRule(pattern=r"qk_layernorm", source_pattern=_CI, says="norms of q and k", changes=(("has_qk_norm", True),)),
    NameRule(
        pattern=r"uneven_pipeline", source_pattern=_CI, says="2 layers on the first and on the last stage",
        changes=(("num_layers_first_stage", 2), ("num_layers_last_stage", 2), ("has_tied_embeddings", False)),
    ),
    NameRule(
        pattern=r"account_for_embedding_loss", source_pattern=_CI, says="embedding and loss count as layers",
        changes=(("accounts_for_embedding", True), ("accounts_for_loss", True), ("has_tied_embeddings", False)),
    ),
    NameRule(
        pattern=r"cross_entropy_loss_fusion", source_pattern=_CI, says="--cross-entropy-loss-fusion (native)",
        changes=(("cross_entropy", "native"),),
    ),
    NameRule(
        pattern=r"multi_dist_optimizer_instances", source_pattern=_CI,
        says="--num-distributed-optimizer-instances 2: half of its 4 data ranks share", changes=(("shard_size", 2),),
    ),
    NameRule(pattern=r"z3|fsdp", source_pattern=_CI, says="Megatron-FSDP", changes=(("sharding", "fsdp"),)),
    NameRule(
        pattern=r"^gpt3_mcore_tp", source_pattern=_CI, says="--transformer-impl local: unfused attention",
        changes=(("has_flash_attention", False),),
    ),
    NameRule(
        # So say their model_config.yaml; those that resume from a checkpoint leave the choice to TransformerEngine.
        pattern=r"^gpt3_mcore_te_(?!.*(resume|cp2|cross_entropy|mla|memory_speed))", source_pattern=_CI,
        says="--attention-backend unfused, as the tests that do not resume", changes=(("has_flash_attention", False),),
    ),
    NameRule(
        pattern=r"golden_values_lts\S* gpt3_mcore_te_(?!.*(nondeterministic|cp2|reshard_1x4|reshard_8x1))",
        source_pattern=_CI, says="unfused attention: the lts image's fused attention is not deterministic",
        changes=(("has_flash_attention", False),),
    ),
    NameRule(
        pattern=r"^a100", source_pattern=_CI, says="40 MiB of workspaces: cuBLAS takes 8 MiB each before Hopper",
        changes=(("workspace_bytes", 40 * 2**20),),
    ),
    NameRule(
        pattern=r"\dexperts", source_pattern=_CI, says="one expert a token and no biases",
        changes=(("moe_topk", 1), ("has_linear_bias", False)),
    ),
    NameRule(
        pattern=r"top2router|etp1_ep4", source_pattern=_CI, says="two experts a token", changes=(("moe_topk", 2),)
    ),
    NameRule(
        pattern=r"etp1", source_pattern=_CI, says="experts not cut by tensor parallelism",
        changes=(("expert_tensor_parallel_size", 1),),
    ),
    NameRule(
        pattern=r"_cp\d", source_pattern=_CI, says="no dropout with context parallelism",
        changes=(("has_dropout", False),),
    ),
    NameRule(
        pattern=r"15b_8t", source_pattern=_CI,
        says="Nemotron-4 15B: rotary, untied, no biases, no dropout, 256,000 tokens, fused weight gradients",
        changes=(
            ("position_embedding_type", "rope"), ("has_tied_embeddings", False), ("has_linear_bias", False),
            ("has_dropout", False), ("vocab_size", 256_000), ("has_fused_weight_gradients", True),
            ("workspace_bytes", WORKSPACE_BYTES),
        ),
    ),
    NameRule(
        pattern=r"7b_tp\d_pp\d_memory_speed", source_pattern=_CI, says="untied, NullTokenizer of 131,073",
        changes=(("has_tied_embeddings", False), ("vocab_size", 131_073)),
    ),
    NameRule(
        pattern=r"_cef\b", source_pattern=r"simumax", says="--cross-entropy-fusion-impl te",
        changes=(("cross_entropy", "te"),),
    ),
    NameRule(
        pattern=r"llama3-405b", source_pattern=r"simumax", says="16 query groups, as SimuMax runs it",
        changes=(("num_query_groups", 16),),
    ),
)  # fmt: skip
