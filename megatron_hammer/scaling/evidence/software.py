"""What each published source left unsaid of its software and machines, with where that is known from.

A stack is chosen by the row's `source`, and where no pattern fits, by its era. A recipe fills a layout that the table
left blank, from the very recipe that the source ran. Nothing here was chosen to make an error small.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from megatron_hammer.model.accounting import FlopConvention
from megatron_hammer.scaling.evidence.run_table import PublishedRow
from megatron_hammer.scaling.plan import Precision, Recompute, Sharding


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Defaults of one source's software for cells that are blank, and what no cell says.

    source_pattern is searched in the row's source, lower case.
    """

    name: str
    source_pattern: str
    source: str
    is_megatron_style: bool = True
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    sharding: Sharding = "distributed_optimizer"
    has_flash_attention: bool = True
    has_sequence_parallel: bool = True  # where tp > 1
    recomputes_without_sequence_parallel: bool = False  # its runs with full recomputation are the baseline without it
    overlaps_data_parallel: bool = True
    overlaps_tensor_parallel: bool = True
    gradient_bytes: int = 4
    # How it counts FLOPs where mfu_definition is blank. "hardware": B, and the layers' forward once more if recomputed.
    flop_convention: FlopConvention | Literal["hardware"] = "B"
    seq_length: int | None = None
    is_interleaved: bool = False  # a blank vpp is a chunk a layer: "set to maximum" in NeMo's recipes
    accumulates_gradients: bool = True  # False: a blank micro_batch is global_batch / dp
    cluster_of_gpu: tuple[tuple[str, str], ...] = ()  # where it is not the GPU's default
    gpu_of_gpu: tuple[tuple[str, str], ...] = ()  # which variant a bare name meant


_OLD_MEGATRON = Stack(
    name="Megatron-LM of 2021",
    source_pattern=r"narayanan|sc21|megatronlm_readme_gpt3",
    source="arXiv 2104.04473, sections 2 and 5: fp16, activations recomputed, interleaved 1F1B, plain data parallelism",
    precision="fp16",
    recompute="full",
    sharding="none",
    has_flash_attention=False,
    has_sequence_parallel=False,
    overlaps_data_parallel=False,
    overlaps_tensor_parallel=False,
    gradient_bytes=2,
    flop_convention="hardware",
)
_NVIDIA = "NVIDIA's published recipes: distributed optimizer, communication overlapped, attention fused"

# First match wins.
STACKS: tuple[Stack, ...] = (
    replace(
        _OLD_MEGATRON,
        name="Megatron-LM of 2020",
        source_pattern=r"megatronlm_readme_2020",
        source="NVIDIA/Megatron-LM README of September 2020; seq 1024 and recomputation reproduce time x TFLOP/s",
        seq_length=1024,
        accumulates_gradients=False,
        gpu_of_gpu=(("a100-sxm-80gb", "a100-sxm-40gb"),),
    ),
    _OLD_MEGATRON,
    Stack(
        name="Megatron-LM of 2022",
        source_pattern=r"korthikanti",
        source="arXiv 2205.05198, section 6: fp16, selective recomputation, sequence parallelism",
        recomputes_without_sequence_parallel=True,
        precision="fp16",
        recompute="selective",
        sharding="none",
        has_flash_attention=False,
        overlaps_data_parallel=False,
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
        seq_length=2048,
    ),
    Stack(
        name="Megatron-DeepSpeed of 2021",
        source_pattern=r"mt-?nlg",
        source="arXiv 2201.11990, section 3: DeepSpeed's 1F1B over Megatron's tensor parallelism, bf16, recomputation",
        recompute="full",
        sharding="none",
        has_flash_attention=False,
        has_sequence_parallel=False,
        overlaps_data_parallel=False,
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
        flop_convention="hardware",
    ),
    replace(
        _OLD_MEGATRON,
        name="Megatron-DeepSpeed of vTrain",
        source_pattern=r"vtrain",
        source="VIA-Research/vTrain src/ and config/validation: fp16, vocabulary 50,257, recomputed, unfused attention",
        cluster_of_gpu=(("a100-sxm-80gb", "vtrain-a100"),),
    ),
    Stack(
        name="Megatron-DeepSpeed of BigScience",
        source_pattern=r"bloom|bigscience|megatron-?deepspeed|neox",
        source="arXiv 2211.05100, section 3.4 and 2204.06745: 1F1B, ZeRO-1, unfused attention, recomputed",
        recompute="full",
        has_flash_attention=False,
        has_sequence_parallel=False,
        overlaps_data_parallel=False,
        overlaps_tensor_parallel=False,
        flop_convention="hardware",
    ),
    Stack(
        name="metaseq",
        source_pattern=r"metaseq|opt-?175",
        source="arXiv 2205.01068, section 2.4: FSDP over Megatron's tensor parallelism, fp16, recomputed",
        precision="fp16",
        recompute="full",
        sharding="fsdp",
        has_flash_attention=False,
        has_sequence_parallel=False,
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
        flop_convention="hardware",
    ),
    Stack(
        name="MegaScale",
        source_pattern=r"megascale",
        source="arXiv 2402.15627, sections 3 and 6.1: Megatron-LM with all communication overlapped, interleaved",
        is_interleaved=True,
    ),
    Stack(
        name="Llama 3",
        source_pattern=r"llama-?_?3.*paper|llama3_herd|2407\.21783",
        source="arXiv 2407.21783, section 3.3: interleaved pipeline, sharded optimizer, MFU as PaLM counts it",
        is_interleaved=True,
        overlaps_tensor_parallel=False,
        flop_convention="D",
    ),
    Stack(
        name="MaxText",
        source_pattern=r"maxtext",
        source="NVIDIA/dgxc-benchmarking maxtext/configure.sh: remat_policy=save_qkv_proj, FSDP",
        is_megatron_style=False,
        recompute="full",
        sharding="fsdp",
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
    ),
    Stack(
        name="PaxML",
        source_pattern=r"paxml",
        source="NVIDIA/dgxc-benchmarking paxml: FSDP; its checkpoint policy is not stated",
        is_megatron_style=False,
        recompute="full",
        sharding="fsdp",
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
    ),
    Stack(
        name="Megatron Bridge",
        source_pattern=r"bridge|nemo_?2|nemo_fw",
        source=f"{_NVIDIA}; gradients reduced in 16 bits (grad_reduce_in_fp32=False)",
        flop_convention="A",
        gradient_bytes=2,
        is_interleaved=True,
    ),
    Stack(
        name="NeMo Launcher",
        source_pattern=r"nemo_?launcher",
        source=f"{_NVIDIA}; NeMo-Framework-Launcher examples/training: grad_sync_dtype=bf16",
        gradient_bytes=2,
        is_interleaved=True,
    ),
    Stack(
        name="NeMo 2 recipes",
        source_pattern=r"dgxc.*v(25\.(0[4-9]|1)|2[6-9])",
        source=f"{_NVIDIA}; NVIDIA/NeMo scripts/performance: grad_reduce_in_fp32=False",
        gradient_bytes=2,
        is_interleaved=True,
    ),
    Stack(name="NeMo recipes", source_pattern=r"dgxc|nemo|mlperf|mlcommons", source=_NVIDIA, is_interleaved=True),
    Stack(
        name="Megatron-LM CI",
        source_pattern=r"megatronlm_ci",
        source="NVIDIA/Megatron-LM tests/functional_tests, model_config.yaml of the test: no --tp-comm-overlap",
        overlaps_tensor_parallel=False,
    ),
    Stack(
        name="Megatron-Core of the README",
        source_pattern=r"megatronlm_readme_h100",
        source=(
            "NVIDIA/Megatron-LM README: data-, tensor- and pipeline-parallel communication overlapped, the last of "
            "which needs an interleaved schedule"
        ),
        is_interleaved=True,
    ),
    Stack(name="Megatron-LM", source_pattern=r"megatron", source=_NVIDIA),
    Stack(
        name="MosaicML",
        source_pattern=r"mosaic|llm-foundry",
        source="mosaicml/llm-foundry scripts/train/benchmarking/README.md: FSDP in pure bf16, flash attention",
        is_megatron_style=False,
        sharding="fsdp",
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
        flop_convention="D",
        cluster_of_gpu=(("a100-sxm-40gb", "oci-gpu4-a100-40gb"),),
    ),
    Stack(
        name="InternEvo",
        source_pattern=r"internevo",
        source="InternLM/InternEvo doc/en/train_performance.md, configs/7B_sft.py: bf16, flash attention, 4 x 100 Gb/s",
        is_megatron_style=False,
        has_sequence_parallel=False,
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
        flop_convention="hardware",
        cluster_of_gpu=(("a100-sxm-80gb", "internevo-a100-roce"),),
    ),
    Stack(
        name="torchtitan",
        source_pattern=r"torchtitan",
        source="pytorch/torchtitan benchmarks and llama3 train configs: FSDP2, gradients reduced in fp32, seq 8192",
        is_megatron_style=False,
        sharding="fsdp",
        overlaps_tensor_parallel=False,
        seq_length=8192,
    ),
    Stack(
        name="nanotron",
        source_pattern=r"nanotron",
        source="huggingface/nanotron scripts/scaling_benchmarks.py: seq 4096, vocabulary 131,072; H100 of AWS p5",
        is_megatron_style=False,
        overlaps_data_parallel=False,
        overlaps_tensor_parallel=False,
        seq_length=4096,
        cluster_of_gpu=(("h100-sxm", "aws-p5"),),
    ),
    Stack(
        name="fms-fsdp",
        source_pattern=r"ibm|fms-fsdp",
        source="foundation-model-stack/fms-fsdp README.md: FSDP2 in bf16, torch.compile, 4k context",
        is_megatron_style=False,
        sharding="fsdp",
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
        flop_convention="D",
        seq_length=4096,
    ),
    Stack(
        name="Modalities",
        source_pattern=r"modalities",
        source="Modalities/modalities README.md: PyTorch FSDP, flash attention",
        is_megatron_style=False,
        sharding="fsdp",
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
    ),
    Stack(
        name="Hugging Face Trainer",
        source_pattern=r"hammerllm",
        source="Academic-Hammer/HammerLLM REPRODUCE.md: transformers' Trainer, DeepSpeed ZeRO-1, only attention fused",
        is_megatron_style=False,
        overlaps_tensor_parallel=False,
        gradient_bytes=2,
    ),
    Stack(
        name="llm.c",
        source_pattern=r"llm\.c",
        source="karpathy/llm.c scripts/run_gpt2_1558M.sh: one process a GPU, ZeRO-1",
        is_megatron_style=False,
        overlaps_tensor_parallel=False,
    ),
)
_MODERN = Stack(
    name="Megatron-style of today",
    source_pattern="",
    source="no stack of this source is known: flash attention, overlap and a distributed optimizer are taken",
)
_CPU = Stack(
    name="processes over gloo",
    source_pattern="",
    source="this package's cpu platform: nothing overlaps",
    overlaps_data_parallel=False,
    overlaps_tensor_parallel=False,
    precision="fp32",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A layout that a source ran and its table left out. Cells of the row go first."""

    source_pattern: str
    model_pattern: str
    gpu: str  # name in gpus.toml
    source: str
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    vpp: int | None = None
    micro_batch: int | None = None
    samples_per_gpu: float | None = None  # of the global batch
    seq: int | None = None
    recompute: Recompute | None = None
    gradient_bytes: int | None = None


_DGXC_2505 = "NVIDIA/dgxc-benchmarking v25.05.05 llama3.1/README.md"
_LAUNCHER_405B = r"llama-?3(\.1)?-?405b"
RECIPES: tuple[Recipe, ...] = (
    Recipe(
        source_pattern=r"dgxc.*25\.0[5-9]", model_pattern=_LAUNCHER_405B, gpu="h100-sxm", source=_DGXC_2505,
        tp=8, pp=8, cp=2, vpp=8, micro_batch=1, samples_per_gpu=0.5, seq=8192,
    ),
    Recipe(
        source_pattern=r"dgxc.*25\.0[5-9]", model_pattern=_LAUNCHER_405B, gpu="gb200", source=_DGXC_2505,
        tp=4, pp=8, cp=2, vpp=8, micro_batch=1, samples_per_gpu=0.5, seq=8192,
    ),
    Recipe(
        source_pattern=r"megatronlm_readme_gpt3", model_pattern=r"175b", gpu="a100-sxm-80gb",
        source="NVIDIA/Megatron-LM examples/pretrain_gpt3_175B.sh", tp=8, pp=16, cp=1, micro_batch=1, seq=2048,
    ),
    Recipe(
        source_pattern=r"nemo_?launcher", model_pattern=r"gpt-?3-?175b", gpu="h100-sxm",
        source="NeMo-Framework-Launcher examples/training/gpt/h100/175b_fp8_16node.sh", vpp=12,
    ),
    Recipe(
        source_pattern=r"nemo_?launcher", model_pattern=r"llama-?[23](\.1)?-?70b", gpu="h100-sxm",
        source="NeMo-Framework-Launcher conf/training/llama/llama{2,3}_70b.yaml", vpp=5,
    ),
    Recipe(
        source_pattern=r"nemo_?launcher", model_pattern=r"llama-?2-?13b|nemotron-?22b", gpu="h100-sxm",
        source="NeMo-Framework-Launcher conf/training/llama/llama2_13b.yaml, nemotron/nemotron_22b.yaml", vpp=10,
    ),
    Recipe(
        source_pattern=r"dgxc.*v2(4|5\.0[0-4])", model_pattern=r"nemotron-?4-?340b", gpu="h100-sxm",
        source="NVIDIA/dgxc-benchmarking nemotron/nemotron4-340b-synth.yaml", recompute="selective", gradient_bytes=2,
    ),
)  # fmt: skip


def select_stack(row: PublishedRow, gpu_name: str) -> tuple[Stack, tuple[str, ...]]:
    """The stack of a row's source, or of its era where the source is unknown, and that as an assumption."""
    source = row.source.lower()
    for stack in STACKS:
        if source and re.search(stack.source_pattern, source):
            return stack, (f"software of {stack.name}: {stack.source}",)
    if gpu_name == "cpu-core":
        return _CPU, (f"software: {_CPU.source}",)
    if _is_old(row, gpu_name):
        reason = (
            f"a {gpu_name} in fp16 or an unnamed precision with full recomputation is taken as {_OLD_MEGATRON.name}"
        )
        return _OLD_MEGATRON, (f"software: {reason}",)
    return _MODERN, (f"software: {_MODERN.source}",)


def select_recipe(row: PublishedRow, gpu_name: str) -> Recipe | None:
    """The recipe that a row's source ran, or None where none is known."""
    source, model = row.source.lower(), row.model.lower()
    for recipe in RECIPES:
        is_same_run = re.search(recipe.source_pattern, source) and re.search(recipe.model_pattern, model)
        if is_same_run and recipe.gpu == gpu_name:
            return recipe
    return None


def _is_old(row: PublishedRow, gpu_name: str) -> bool:
    is_half = "fp16" in row.precision.lower() or not row.precision.strip()
    return gpu_name.startswith(("v100", "a100")) and is_half and "full" in row.recompute.lower()
