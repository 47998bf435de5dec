"""What a platform, a backend or this machine cannot do, and what needs a package that is not installed."""

import importlib.util
import os
from typing import NamedTuple

from megatron_hammer.config.connections import (
    BLACKWELL,
    CONNECTIONS,
    is_for_elsewhere,
    needs_one_connection,
    read_run_capability,
)
from megatron_hammer.config.flags import Flags, flag_of, show_value
from megatron_hammer.config.fused_kernels import frees_norm_outputs
from megatron_hammer.config.preflight.idle_flags import Condition
from megatron_hammer.platforms import cpu

# What only TransformerEngine's modules do: (attribute, quiet values).
NEEDS_TE: dict[str, tuple[object, ...]] = {
    "window_size": (None,),
    "softmax_type": ("vanilla",),
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
}


class Refusal(NamedTuple):
    """A flag that Megatron accepts and that would crash or train something else, when `is_asked`."""

    name: str
    is_asked: Condition
    why: str
    remedy: str


def _lacks(module: str) -> bool:
    return importlib.util.find_spec(module) is None


# Optimizers of the package emerging-optimizers.
EMERGING = ("muon", "lion", "soap")
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "hybrid_context_parallel",
        lambda flags: flags["hybrid_context_parallel"],
        "splits packed documents, and here every sample is one sequence",
        "Pass --context-parallel-size alone",
    ),
    Refusal(
        "moe_use_upcycling",
        lambda flags: flags["moe_use_upcycling"],
        "would build the dense model with experts",
        "Convert the dense checkpoint with hammer checkpoint edit upcycle and pass --load",
    ),
    Refusal(
        "init_model_with_meta_device",
        lambda flags: flags["init_model_with_meta_device"] and not flags["use_megatron_fsdp"],
        "leaves the weights uninitialised: only --use-megatron-fsdp fills them",
        "Drop it",
    ),
    Refusal(
        "optimizer",
        lambda flags: flags["optimizer"] == "sgd" and flags["use_distributed_optimizer"],
        "has no state that the distributed optimizer can shard",
        "Pass --no-distributed-optimizer with it",
    ),
    Refusal(
        "optimizer",
        lambda flags: flags["optimizer"] == "sgd" and flags["use_megatron_fsdp"],
        "has no state that --use-megatron-fsdp can shard",
        "Pass --optimizer adam",
    ),
    Refusal(
        "optimizer",
        lambda flags: (
            any(name in flags["optimizer"] for name in EMERGING)
            and flags["use_distributed_optimizer"]
            and not flags["bf16"]
        ),
        "is distributed over ranks in bf16 alone (megatron.core.optimizer.layer_wise_optimizer)",
        "Pass --precision bf16, or --no-distributed-optimizer",
    ),
    *(
        Refusal(
            name,
            lambda flags, name=name: flags["save"] is not None and flags[name],  # type: ignore[misc]
            "leaves out what a run needs to resume",
            "Drop it; checkpoint_convert/megatron_to_hf.py exports the weights alone",
        )
        for name in ("no_save_optim", "no_save_rng")
    ),
    Refusal(
        "ckpt_format",
        # Megatron 0.19.2 writes it, and fails in DistributedOptimizer.load_parameter_state when it resumes.
        lambda flags: flags["save"] is not None and flags["ckpt_format"] == "torch",
        "saves an optimizer that Megatron cannot load again",
        "Drop it: checkpoints are then torch_dist; legacy checkpoints are still read by --load",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        lambda flags: flags["fused_residual_rmsnorm"] and flags["backend"] == "torch" and not flags["triton_kernels"],
        "is a Triton kernel on the torch backend",
        "Drop --no-triton-kernels, or drop it, or pass --backend te on a GPU",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        lambda flags: (
            flags["fused_residual_rmsnorm"] and flags["backend"] == "torch" and flags["layernorm_zero_centered_gamma"]
        ),
        "has no zero-centered weights on the torch backend",
        "Drop it, or drop --apply-layernorm-1p",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        lambda flags: flags["fused_residual_rmsnorm"] and frees_norm_outputs(flags.values),
        "returns the residual, which --recompute-modules layernorm would free with the norm's output",
        "Drop it, or drop layernorm from --recompute-modules",
    ),
    Refusal(
        "fp32_residual_connection",
        lambda flags: flags["fp32_residual_connection"],
        "gives fp32 activations to layers whose weights are 16-bit, which neither backend takes",
        "Drop it",
    ),
    Refusal(
        "attention_backend",
        lambda flags: (
            getattr(flags["attention_backend"], "name", "") in ("fused", "flash")
            and not (flags["bf16"] or flags["fp16"])
        ),
        "is a kernel of 16-bit numbers",
        "Pass --precision bf16, or drop it",
    ),
    Refusal(
        "fp8_param_gather",
        lambda flags: flags["fp8_param_gather"] and not (flags["bf16"] or flags["fp16"]),
        "needs the optimizer's master weights, which fp32 training has none of",
        "Pass --precision bf16",
    ),
    Refusal(
        "use_transformer_engine_op_fuser",
        lambda flags: flags["use_transformer_engine_op_fuser"] and flags["moe_grouped_gemm"],
        "has no fused grouped GEMM for experts",
        "Drop it, or drop --moe-grouped-gemm",
    ),
    Refusal(
        "dataloader_type",
        lambda flags: flags["dataloader_type"] == "external",
        "leaves loading to a program's own loader, and here is none",
        "Pass --dataloader-type single or cyclic, or drop it",
    ),
    Refusal(
        "adlr_autoresume",
        lambda flags: flags["adlr_autoresume"],
        "needs a library of one cluster, which nobody else has",
        "Drop it: the same command continues a stopped run",
    ),
    Refusal(
        "config_logger_dir",
        lambda flags: bool(flags["config_logger_dir"]),
        "pickles process groups, at which megatron-core 0.19 stops",
        "Drop it",
    ),
    Refusal(
        "dataloader_fast_cache_load",
        lambda flags: flags["dataloader_fast_cache_load"] and not flags["data_cache_path"],
        "needs the folder of the cache",
        "Pass --data-cache-path with it, or drop it",
    ),
    Refusal(
        "phase_transition_iterations",
        lambda flags: bool(flags["phase_transition_iterations"]) and flags["train_samples"] is None,
        "needs a run that is counted in samples",
        "Pass --train-samples instead of --train-iters",
    ),
    Refusal(
        "use_ring_exchange_p2p",
        lambda flags: flags["use_ring_exchange_p2p"],
        "calls torch.distributed.ring_exchange, which PyTorch does not have",
        "Drop it",
    ),
    Refusal(
        "use_sharp",
        lambda flags: flags["use_sharp"],
        "asks for a process group before megatron-core 0.19 has made it",
        "Drop it",
    ),
    Refusal(
        "cross_entropy",
        lambda flags: (
            flags["cross_entropy"] == "chunked"
            and flags["sequence_parallel"]
            and flags["tensor_model_parallel_size"] > 1
        ),
        "would cut the sequence, which --sequence-parallel has already divided over the ranks",
        "Pass --cross-entropy in-place",
    ),
    Refusal(
        "cross_entropy",
        lambda flags: flags["cross_entropy"] == "chunked" and (flags["use_torch_fsdp2"] or flags["use_megatron_fsdp"]),
        "would use the output layer several times in a pass, of which FSDP keeps one gradient",
        "Pass --cross-entropy in-place",
    ),
    Refusal(
        "cross_entropy",
        lambda flags: flags["cross_entropy"] == "chunked" and flags["defer_embedding_wgrad_compute"],
        "would run the output layer twice, and --defer-embedding-wgrad-compute keeps its input each time",
        "Pass --cross-entropy in-place",
    ),
    Refusal(
        "distributed_backend",
        lambda flags: flags["platform"] == "cuda" and flags["distributed_backend"] == "gloo",
        "gloo has no reduce-scatter between GPUs",
        "Drop it",
    ),
)
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
        lambda flags: flags["async_save"] and flags["use_persistent_ckpt_worker"] and flags["async_strategy"] == "nvrx",
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
    ("enable_msc", lambda flags: flags["enable_msc"], "multistorageclient", "multi-storage-client"),
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
    return [
        *_find_backend_problems(flags),
        *(
            f"{flag_of(name)}: {why}, got {name}={show_value(flags[name])}. {remedy}."
            for name, is_asked, why, remedy in REFUSALS
            if is_asked(flags)
        ),
        *_find_package_problems(flags),
        *(
            f"{flag_of(name)}: must be a file that exists, got {name}={flags[name]}. Check the path."
            for name in FILES
            if flags[name] is not None and not os.path.isfile(flags[name])
        ),
        *_find_format_problems(flags, capability),
        *_find_environment_problems(flags, capability),
    ]


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
