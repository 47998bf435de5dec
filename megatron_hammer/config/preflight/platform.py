"""What a platform, a backend or this machine cannot do, and what needs a package that is not installed."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from megatron_hammer.config.connections import (
    BLACKWELL,
    CONNECTIONS,
    is_for_elsewhere,
    needs_one_connection,
    read_run_capability,
)
from megatron_hammer.config.flag_tables.refused import ALWAYS_REFUSED, EMERGING, REFUSALS
from megatron_hammer.config.flag_tables.row import Condition
from megatron_hammer.config.flags import Flags, flag_of, show_value
from megatron_hammer.platforms import cpu

# What only TransformerEngine's modules do: (attribute, quiet values).
NEEDS_TE: dict[str, tuple[object, ...]] = {
    "qk_clip": (False,),
    "log_max_attention_logit": (False,),
    "delay_wgrad_compute": (False,),
    "tp_comm_overlap": (False,),
    "use_precision_aware_optimizer": (False,),
    "te_rng_tracker": (False,),
    "use_te_activation_func": (False,),
    "use_transformer_engine_op_fuser": (False,),
    "moe_grouped_gemm": (False,),
    "optimizer_cuda_graph": (False,),
    "cpu_offloading_num_layers": (0,),
    "external_cuda_graph": (False,),
    "save_activations_interval": (None,),
    "save_dgrads_interval": (None,),
    "cuda_graph_impl": (None, "none", "local", "full_iteration"),
    "fp8": (None,),
    "fp4": (None,),
    "batch_invariant_mode": (False,),
    "symmetric_ar_type": (None,),
    "te_precision_config_file": (None,),
}


def _lacks(module: str) -> bool:
    return importlib.util.find_spec(module) is None


# What needs a package: (flag, whether it is asked for, module, how to get it).
PACKAGES: tuple[tuple[str, Condition, str, str], ...] = (
    (
        "optimizer",
        lambda flags: any(name in flags["optimizer"] for name in EMERGING),
        "emerging_optimizers",
        "emerging-optimizers",
    ),
    (
        "async_save",
        lambda flags: flags["async_save"] and flags["async_strategy"] == "nvrx",
        "nvidia_resiliency_ext",
        "nvidia-resiliency-ext, or pass --async-strategy mcore",
    ),
    ("enable_ft_package", lambda flags: flags["enable_ft_package"], "nvidia_resiliency_ext", "nvidia-resiliency-ext"),
    ("use_megatron_fsdp", lambda flags: flags["use_megatron_fsdp"], "einops", "einops"),
    (
        "attention_backend",
        lambda flags: getattr(flags["attention_backend"], "name", "") == "flash" and _lacks("flash_attn_interface"),
        "flash_attn",  # 2; version 3 is the other module
        "--no-build-isolation flash-attn, or drop it: the fused kernels of cuDNN are as fast on Hopper",
    ),
    # PyTorch's wheels for CUDA bring it.
    ("cross_entropy", lambda flags: flags["platform"] == "cuda", "triton", "triton"),
    ("log_straggler", lambda flags: flags["log_straggler"], "pynvml", "nvidia-ml-py"),
    ("log_energy", lambda flags: flags["log_energy"], "pynvml", "nvidia-ml-py"),
    (
        "non_persistent_ckpt_type",
        lambda flags: flags["non_persistent_ckpt_type"] == "local",
        "nvidia_resiliency_ext",
        "nvidia-resiliency-ext",
    ),
    (
        "run_workload_inspector_server",
        lambda flags: flags["run_workload_inspector_server"],
        "workload_inspector",
        "workload-inspector, which NVIDIA does not publish, or drop it",
    ),
    ("enable_msc", lambda flags: flags["enable_msc"], "multistorageclient", "multi-storage-client"),
    ("evaluate_every", lambda flags: bool(flags["evaluate_every"]), "lm_eval", "lm-eval"),
    ("wandb_project", lambda flags: bool(flags["wandb_project"]), "wandb", "wandb"),
    ("tensorboard_dir", lambda flags: bool(flags["tensorboard_dir"]), "tensorboard", "tensorboard"),
)
# The least compute capability of the fp8 recipes that need more than 8.9 (transformer_engine.pytorch.quantization).
FP8_CAPABILITY = {"blockwise": (9, 0), "mxfp8": (10, 0)}
FP4_CAPABILITY = (10, 0)


# Files that Megatron reads only once all ranks are up.
FILES = ("nccl_communicator_config_path", "tp_comm_overlap_cfg", "te_precision_config_file")


def find_platform_problems(flags: Flags) -> list[str]:
    """Everything that this platform, this backend, this GPU or this installation cannot do."""
    capability = read_run_capability(flags.values)
    refused = [(name, why, remedy) for name, (why, remedy) in ALWAYS_REFUSED.items() if flags[name]]
    refused += [(name, why, remedy) for name, is_asked, why, remedy in REFUSALS if is_asked(flags)]
    return [
        *_find_backend_problems(flags),
        *(f"{flag_of(name)}: {why}, got {name}={show_value(flags[name])}. {remedy}." for name, why, remedy in refused),
        *_find_package_problems(flags),
        *_find_compiler_problems(flags),
        *(
            f"{flag_of(name)}: must be a file that exists, got {name}={flags[name]}. Check the path."
            for name in FILES
            # Where the backend refuses the flag, one sentence is enough.
            if flags[name] is not None and not os.path.isfile(flags[name]) and not _needs_other_backend(flags, name)
        ),
        *_find_format_problems(flags, capability),
        *_find_environment_problems(flags, capability),
    ]


def _needs_other_backend(flags: Flags, name: str) -> bool:
    return flags["backend"] == "torch" and name in NEEDS_TE


def _find_package_problems(flags: Flags) -> list[str]:
    """Packages that a run imports only once all ranks are up. A plan for another machine has them there."""
    if is_for_elsewhere(flags.values):
        return []
    return [
        f"{flag_of(name)}: needs the package {module}, which is not installed, got {name}={show_value(flags[name])}. "
        f"Run pip install {package}."
        for name, is_asked, module, package in PACKAGES
        if is_asked(flags) and _lacks(module)
    ]


def _find_compiler_problems(flags: Flags) -> list[str]:
    """What Triton compiles its driver with, in the first step; torch.compile's kernels for GPUs are Triton's too."""
    if flags["platform"] != "cuda" or is_for_elsewhere(flags.values):
        return []
    problems = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        problems.append("PATH: must have gcc or clang, which Triton needs, got neither. Install gcc, or set CC.")
    # As triton.runtime.build does: Debian's own scheme has the headers elsewhere than Python.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").is_file():
        problems.append(
            f"Python.h: must be there for Triton, got no such file in {headers}. Install Python's headers "
            "(python3-dev on Debian and Ubuntu)."
        )
    return problems


def _find_format_problems(flags: Flags, capability: tuple[int, int] | None) -> list[str]:
    """Number formats that this machine's GPU does not have; TransformerEngine says so only in the first step."""
    least = {}
    if flags["fp8"]:
        # 8.9 is Ada, the first generation with fp8 matrix products.
        least["fp8_recipe"] = FP8_CAPABILITY.get(flags["fp8_recipe"], (8, 9))
    if flags["fp4"]:
        least["fp4_recipe"] = FP4_CAPABILITY
    return [
        f"{flag_of(name)}: needs a GPU of compute capability {needed[0]}.{needed[1]} or later, got "
        f"{name}={flags[name]} on a GPU of {capability[0]}.{capability[1]}. Pass --fp8-format hybrid "
        "--fp8-recipe tensorwise on Hopper or Ada, or train in bf16."
        for name, needed in least.items()
        if capability is not None and capability < needed
    ]


def _find_backend_problems(flags: Flags) -> list[str]:
    problems = []
    refused = set()
    if flags["platform"] == "cpu":
        for name, is_asked, why in cpu.UNSUPPORTED:
            if is_asked(flags[name]):
                refused.add(name)
                problems.append(
                    f"{flag_of(name)}: does not work on the cpu platform, got "
                    f"{name}={show_value(flags[name])}: {why}. Drop it, or run on a GPU."
                )
    if flags["backend"] != "torch":
        return problems
    names = flags.list_loud(NEEDS_TE)
    # Not in NEEDS_TE: its loud values are a range and not everything but a few quiet values.
    names += ["context_parallel_size"] if flags["context_parallel_size"] > 1 else []
    return problems + [
        f"{flag_of(name)}: needs the te backend (TransformerEngine), got {name}={show_value(flags[name])}, "
        "backend=torch. Drop it, or pass --backend te on a GPU."
        for name in names
        if name not in refused
    ]


def _find_environment_problems(flags: Flags, capability: tuple[int, int] | None) -> list[str]:
    """What Megatron asks of the environment on GPUs before Blackwell, so that kernels keep their order."""
    value = os.environ.get(CONNECTIONS)
    has_fsdp = flags["use_torch_fsdp2"] or flags["use_megatron_fsdp"]
    # A planned GPU is not here; the environment of this machine says nothing about it.
    if capability is None:
        return []
    # On every GPU, also since Blackwell: with FSDP one connection delays the gathers.
    if has_fsdp and value == "1":
        return [
            f"{CONNECTIONS}: must not be 1 with FSDP, whose gathers would wait behind the matrix products, got "
            f"{CONNECTIONS}={value}. Run unset {CONNECTIONS} before the launch."
        ]
    is_needed = needs_one_connection(flags.values) and capability[0] < BLACKWELL
    if not is_needed or value == "1":
        return []
    return [
        f"{CONNECTIONS}: must be 1 with tensor or context parallelism on this GPU, got {CONNECTIONS}={value}. "
        f"Run export {CONNECTIONS}=1 before the launch."
    ]
