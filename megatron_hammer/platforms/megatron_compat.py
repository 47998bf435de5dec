"""Every adjustment to megatron, in one place: what it changes, why, where upstream, and how to tell it is still needed.

`install(platform)` applies those of a platform once, before megatron builds anything. Nothing else in the package
changes what megatron or torch computes; `training_hooks.py` only has us called from megatron's loop. Each adjustment is
guarded by the version it was written against; tests/unit/platforms/test_megatron_compat.py fails when `is_needed` no
longer holds, so that no adjustment outlives its cause.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.errors import PlatformError
from megatron_hammer.platforms import checkpoint_verification, iteration_publishing, safe_loading

SUPPORTED_MEGATRON_VERSION = "0.19.2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Adjustment:
    """One change to megatron. `is_needed` looks at the untouched upstream and says whether the cause is still there."""

    name: str
    platforms: tuple[str, ...]
    backends: tuple[str, ...] = ("te", "torch")
    reason: str
    upstream: str  # module and function that make it necessary
    apply: Callable[[], None]
    is_needed: Callable[[], bool]


_installed: tuple[str, str] | None = None  # platform, backend


def check_megatron_version() -> None:
    """Raise PlatformError unless the installed megatron-core is the one these adjustments were written against."""
    installed = importlib.metadata.version("megatron-core")
    if installed != SUPPORTED_MEGATRON_VERSION:
        raise PlatformError(
            f"megatron-core: must be {SUPPORTED_MEGATRON_VERSION}, the version that megatron_hammer adjusts and tests, "
            f"got {installed}. Run pip install megatron-core=={SUPPORTED_MEGATRON_VERSION}."
        )


def install(platform: str, backend: str = "torch") -> None:
    """Apply the adjustments of `platform` ("cpu" or "cuda") and of `backend` ("te" or "torch").

    A second call with the same two does nothing. No adjustment is taken back, so PlatformError is raised for another
    platform, or a backend that lacks one of those that were applied.
    """
    global _installed
    adjustments = _select_adjustments(platform, backend)
    applied = [] if _installed is None else _select_adjustments(*_installed)
    if _installed is not None and (platform != _installed[0] or any(one not in adjustments for one in applied)):
        raise PlatformError(
            f"platform: one process has one platform and one backend, got {platform} and {backend} after "
            f"{' and '.join(_installed)}. Start a new process."
        )
    if _installed is None:
        _prepare_import(platform)
    for adjustment in adjustments:
        if adjustment not in applied:
            adjustment.apply()
    _installed = platform, backend


def _select_adjustments(platform: str, backend: str) -> list[Adjustment]:
    return [one for one in ADJUSTMENTS if platform in one.platforms and backend in one.backends]


def _prepare_import(platform: str) -> None:
    """What must be so before anything imports megatron."""
    check_megatron_version()
    if platform == "cpu":
        # Before megatron is imported: its @jit_fuser is torch.compile, which on a CUDA build without a driver fails.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    from megatron_hammer.platforms.select import find_te_failure

    # "No CUDA runtime is found": true on a login node and said by our own line.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Said once, by the backend that a run reports, instead of ten times at import.
    for cause in (
        ".*Transformer Engine and Apex",
        ".*Apex is not installed",
        ".*Only transformer-engine",
        "absl.logging is not",
    ):
        warnings.filterwarnings("ignore", message=cause)
    find_te_failure()  # hides a broken TransformerEngine, which would end megatron's import


def _has_text(upstream: str, text: str) -> Callable[[], bool]:
    """Whether the source of this module or function of megatron still has the text that makes an adjustment needed."""
    return lambda: text in inspect.getsource(inspect.unwrap(pkgutil.resolve_name(upstream)))


# --- torch.compile where it is off ----------------------------------------------------------------------------------


def _leave_functions_uncompiled() -> None:
    import torch

    def compile(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    if os.environ["TORCH_COMPILE_DISABLE"] == "1":  # else the user asked for it
        torch.compile = compile


# --- torch.cuda on a machine without one ---------------------------------------------------------------------------


def _substitute_cuda() -> None:
    from megatron_hammer.platforms import cpu_device

    cpu_device.substitute_cuda_runtime()
    cpu_device.substitute_cuda_tensors()


def _allow_no_cuda() -> None:
    from megatron.training import training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)


def _write_rng_state_on_cpu() -> None:
    import torch
    from megatron.core.tensor_parallel import random

    def set_state(new_state: Any, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._set_cuda_rng_state = set_state


def _keep_data_loaders_off_the_generator() -> None:
    import torch
    from megatron.training import training

    original = training.build_pretraining_data_loader

    @functools.wraps(original)
    def build_pretraining_data_loader(*args: Any, **kwargs: Any) -> Any:
        loader = original(*args, **kwargs)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator()
        return loader

    training.build_pretraining_data_loader = build_pretraining_data_loader


def _upstream_loader_draws_from_the_generator() -> bool:
    return not _has_text("megatron.training.datasets.data_samplers.build_pretraining_data_loader", "generator=")()


def _end_data_loader_workers_with_their_rank() -> None:
    from megatron.training import training

    from megatron_hammer.platforms.data_loader_workers import end_workers_with_rank

    training.build_pretraining_data_loader = end_workers_with_rank(training.build_pretraining_data_loader)


def _silence_rng_warning() -> None:
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


# --- things a wheel lacks -------------------------------------------------------------------------------------------


def _use_shipped_dataset_helpers() -> None:
    from megatron.core.datasets import utils

    def compile_helpers() -> None:
        from megatron.core.datasets import helpers_cpp  # noqa: F401  the wheel's compiled module, or ImportError

    utils.compile_helpers = compile_helpers


def _upstream_calls_make() -> bool:
    from megatron.core import datasets

    return not (Path(datasets.__file__).parent / "Makefile").exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _load_tensors_metadata_without_strides() -> None:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from megatron_hammer.platforms.checkpoint_loading import skip_strides

    strategy: Any = TorchDistLoadShardedStrategy
    strategy.load_tensors_metadata = skip_strides(strategy.load_tensors_metadata)


def _torch_records_strides() -> bool:
    import dataclasses

    from torch.distributed.checkpoint.metadata import TensorProperties

    has_strides = "strides" in {field.name for field in dataclasses.fields(TensorProperties)}
    text = "torch.empty(tp.size, **tp.properties.__dict__"
    strategy = "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy.load_tensors_metadata"
    return has_strides and _has_text(strategy, text)()


def _keep_missing_extra_states() -> None:
    from megatron.core import dist_checkpointing

    from megatron_hammer.platforms.checkpoint_loading import keep_missing_extra_states

    dist_checkpointing.load = keep_missing_extra_states(dist_checkpointing.load)


def _load_optimizers_under_other_rates() -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    from megatron_hammer.platforms.checkpoint_loading import load_under_own_rates, match_under_own_rates

    base: Any = optimizer.MegatronOptimizer
    base._filter_and_reorder_param_groups = staticmethod(match_under_own_rates(base._filter_and_reorder_param_groups))
    distributed: Any = distrib_optimizer.DistributedOptimizer
    distributed.load_state_dict = load_under_own_rates(distributed.load_state_dict)


def _keep_write_results_in_the_process() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_hammer.platforms.checkpoint_saving import make_results_queue, note_write_failures

    filesystem_async.get_write_results_queue = make_results_queue
    writer: Any = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data = staticmethod(note_write_failures(writer.write_preloaded_data))


def _lacks_verification() -> bool:
    return not _has_text("megatron.core.dist_checkpointing.serialization.load_common_state_dict", "integrity")()


def _write_checkpoints_in_a_thread() -> None:
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    from megatron_hammer.platforms.checkpoint_saving import WriterThread, stop_when_ending

    async_utils.PersistentAsyncCaller = WriterThread
    filesystem_async._write_item = stop_when_ending(filesystem_async._write_item)


# --- optimizer ------------------------------------------------------------------------------------------------------


def _use_group_step_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_hammer.platforms.group_step_adam import GroupStepAdam

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # GroupStepAdam keeps its state as the fused optimizers do, so megatron must take their branch to save and load it.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True


def _lacks_fused_gradient_kernels() -> bool:
    """Whether megatron has taken its own loops, as it does where neither TransformerEngine nor apex can be imported."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_applier

    return clip_grads.multi_tensor_applier is local_multi_tensor_applier


def _sum_gradient_norm_exactly() -> None:
    from megatron.core.optimizer import clip_grads

    from megatron_hammer.platforms.gradient_arithmetic import norm_of_all

    if _lacks_fused_gradient_kernels():
        clip_grads.l2_norm_impl = norm_of_all


def _scale_gradients_in_place() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as copies  # between fp16 and fp32 weights

    from megatron_hammer.platforms.gradient_arithmetic import scale_all

    if _lacks_fused_gradient_kernels():
        clip_grads.multi_tensor_scale_impl = copies.multi_tensor_scale_impl = scale_all


def _clip_without_waiting() -> None:
    from megatron.core.optimizer import clip_grads

    from megatron_hammer.platforms.gradient_arithmetic import scale_all

    if _lacks_fused_gradient_kernels():
        # With this function, megatron leaves norm and factor on the GPU.
        clip_grads.multi_tensor_scale_tensor_impl = scale_all


def _add_weight_gradients_in_the_product() -> None:
    from megatron_hammer.platforms import gradient_arithmetic

    if not _lacks_apex_weight_gradients():
        return
    # Both: a part of megatron imports the module where it is needed, another has tried to do so by now.
    sys.modules["fused_weight_gradient_mlp_cuda"] = gradient_arithmetic
    from megatron.core.tensor_parallel import layers

    vars(layers)["fused_weight_gradient_mlp_cuda"] = gradient_arithmetic  # a name that is not there yet
    layers._grad_accum_fusion_available = True


def _lacks_apex_weight_gradients() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None


# --- model ----------------------------------------------------------------------------------------------------------


def _use_silu_kernels() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    from megatron_hammer.platforms.cpu_arithmetic import swiglu_back

    fused_bias_swiglu.swiglu_back = swiglu_back


def _use_triton_rope() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    if importlib.util.find_spec("triton") is None:
        return  # preflight has refused a run that wants the kernels
    from megatron_hammer.model.kernels import rope

    rope_utils.fused_apply_rotary_pos_emb = rope.apply_rotary
    # Not there where TransformerEngine is not.
    vars(attention)["apply_fused_qkv_rotary_pos_emb"] = rope.split_and_apply_rotary
    attention.HAVE_FUSED_QKV_ROPE = True


# --- gloo -----------------------------------------------------------------------------------------------------------


def _pass_all_to_all_splits_as_lists() -> None:
    import torch

    original = torch.distributed.all_to_all_single

    @functools.wraps(original)
    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        return original(output, input, _as_list(output_split_sizes), _as_list(input_split_sizes), **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single


def _as_list(split_sizes: Any) -> list[int] | None:
    return None if split_sizes is None else [int(size) for size in split_sizes]


def _skip_gather_of_one_rank() -> None:
    from megatron.core.distributed import param_and_grad_buffer

    from megatron_hammer.platforms.cpu_arithmetic import skip_gather_of_one_rank

    param_and_grad_buffer.dist_all_gather_func = skip_gather_of_one_rank(param_and_grad_buffer.dist_all_gather_func)


# --- validation -----------------------------------------------------------------------------------------------------


def _sort_validation_iterators_by_set() -> None:
    from megatron.training import training

    original = training.evaluate_and_print_results

    @functools.wraps(original)
    def evaluate_and_print_results(
        prefix: str, forward_step: Any, data_iterator: Any, model: Any, *rest: Any, **options: Any
    ) -> Any:
        # Only an interleaved pipeline has several chunks, and only several sets come as lists.
        if len(model) > 1 and data_iterator and all(isinstance(of_stage, list) for of_stage in data_iterator):
            data_iterator = [list(of_set) for of_set in zip(*data_iterator, strict=True)]
        return original(prefix, forward_step, data_iterator, model, *rest, **options)

    training.evaluate_and_print_results = evaluate_and_print_results


ADJUSTMENTS: tuple[Adjustment, ...] = (
    Adjustment(
        name="no-compiler-import",  # first: it must precede the import of megatron
        platforms=("cpu",),
        reason="decorating with torch.compile imports its compiler, 2 s per process, even where it is disabled",
        upstream="megatron.core.jit.enable_jit_fuser",
        apply=_leave_functions_uncompiled,
        is_needed=_has_text("megatron.core.jit", "jit_fuser = torch.compile"),
    ),
    Adjustment(
        name="cuda-substitution",
        platforms=("cpu",),
        reason="megatron makes its tensors on 'cuda' and orders work by CUDA streams; see cpu_device.py",
        upstream="megatron.core.pipeline_parallel.schedules and some 200 other places",
        apply=_substitute_cuda,
        is_needed=_has_text(
            "megatron.core.pipeline_parallel.schedules.forward_backward_no_pipelining", 'device="cuda"'
        ),
    ),
    Adjustment(
        name="allow-no-cuda",
        platforms=("cpu",),
        reason="pretrain() calls initialize_megatron() without allow_no_cuda and stops at 'Megatron requires CUDA.'",
        upstream="megatron.training.initialize.initialize_megatron",
        apply=_allow_no_cuda,
        is_needed=_has_text("megatron.training.initialize.initialize_megatron", "Megatron requires CUDA"),
    ),
    Adjustment(
        name="cpu-rng-state",
        platforms=("cpu",),
        reason="the RNG tracker writes to torch.cuda.default_generators, which is empty without a GPU",
        upstream="megatron.core.tensor_parallel.random._set_cuda_rng_state",
        apply=_write_rng_state_on_cpu,
        is_needed=_has_text("megatron.core.tensor_parallel.random", "torch.cuda.default_generators"),
    ),
    Adjustment(
        name="loader-generator",
        platforms=("cpu",),
        reason="starting a DataLoader draws a seed from the CPU generator, which here is the dropout's too: only the "
        "first tensor-parallel rank reads data, so the ranks would drop different entries, and a resumed run others",
        upstream="megatron.training.datasets.data_samplers.build_pretraining_data_loader",
        apply=_keep_data_loaders_off_the_generator,
        is_needed=_upstream_loader_draws_from_the_generator,
    ),
    Adjustment(
        name="workers-end-with-rank",
        platforms=("cpu", "cuda"),
        reason="workers of the data loader ignore the SIGTERM with which Python ends them: a rank that fails waits for "
        "them without end, and those of a killed rank hold its connections for 5 s",
        upstream="megatron.training.datasets.data_samplers.build_pretraining_data_loader",
        apply=_end_data_loader_workers_with_their_rank,
        is_needed=_has_text(
            "megatron.training.datasets.data_samplers.build_pretraining_data_loader",
            "DistributedSignalHandler(args.exit_signal).__enter__()",
        ),
    ),
    Adjustment(
        name="rng-warning",
        platforms=("cpu",),
        reason="with one generator for both devices, every fork of the tracker would warn that the CPU's has moved",
        upstream="megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
        apply=_silence_rng_warning,
        is_needed=_has_text(
            "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
            "CPU RNG state changed within GPU RNG context",
        ),
    ),
    Adjustment(
        name="shipped-dataset-helpers",
        platforms=("cpu", "cuda"),
        reason="compile_helpers() runs make, but the wheel ships the compiled module and no Makefile, so it exits",
        upstream="megatron.core.datasets.utils.compile_helpers",
        apply=_use_shipped_dataset_helpers,
        is_needed=_upstream_calls_make,
    ),
    Adjustment(
        name="validation-sets-of-virtual-stages",
        platforms=("cpu", "cuda"),
        reason="with an interleaved pipeline the validation iterators come as [virtual stage][set] and are read as "
        "[set][virtual stage]: as many sets as stages are then mixed without a word, any other number fails",
        upstream="megatron.training.training.evaluate_and_print_results",
        apply=_sort_validation_iterators_by_set,
        is_needed=_has_text(
            "megatron.training.training.evaluate_and_print_results",
            "data_iterators = data_iterator if args.multiple_validation_sets else [data_iterator]",
        ),
    ),
    Adjustment(
        name="no-strides",
        platforms=("cpu", "cuda"),
        reason="torch 2.15 records the strides of a tensor in a checkpoint, and megatron passes them to torch.empty: "
        "every --dist-ckpt-strictness but the default fails",
        upstream="megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy.load_tensors_metadata",
        apply=_load_tensors_metadata_without_strides,
        is_needed=_torch_records_strides,
    ),
    Adjustment(
        name="missing-extra-states",
        platforms=("cpu", "cuda"),
        reason="a checkpoint of the torch backend, or converted from Hugging Face, has no extra states of "
        "TransformerEngine's modules, and the te backend could not load it",
        upstream="megatron.training.checkpointing._load_global_dist_base_checkpoint",
        apply=_keep_missing_extra_states,
        is_needed=_has_text(
            "megatron.training.checkpointing._load_global_dist_base_checkpoint", "strict=args.dist_ckpt_strictness"
        ),
    ),
    Adjustment(
        name="other-rates",
        platforms=("cpu", "cuda"),
        reason="megatron finds the groups of an optimizer by their learning rates too, so that no run could continue "
        "with another --lr or --min-lr, whatever --override-opt-param-scheduler says; and a group's own rates of the "
        "checkpoint would come before those of the schedule",
        upstream="megatron.core.optimizer.optimizer.MegatronOptimizer._filter_and_reorder_param_groups",
        apply=_load_optimizers_under_other_rates,
        is_needed=_has_text(
            "megatron.core.optimizer.optimizer._param_group_override_keys", "_ParamGroupOverride.__annotations__"
        ),
    ),
    Adjustment(
        name="safe-loading",
        platforms=("cpu", "cuda"),
        reason="torch reads .metadata, __0.metadata and every object of a checkpoint with Python's unpickler, which "
        "runs whatever code the file names",
        upstream="torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata",
        apply=safe_loading.apply,
        is_needed=_has_text(
            "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata", "pickle.load(metadata_file)"
        ),
    ),
    Adjustment(
        name="verified-loading",
        platforms=("cpu", "cuda"),
        reason="a flipped bit, or a file of another iteration, is loaded without a word; megatron's own hashes are all "
        "read by rank 0, and compared after the first objects were unpickled",
        upstream="megatron.core.dist_checkpointing.serialization.load_common_state_dict",
        apply=checkpoint_verification.apply,
        is_needed=_lacks_verification,
    ),
    Adjustment(
        name="whole-iterations",
        platforms=("cpu", "cuda"),
        reason="a save writes into the iteration's own folder, over what is there, and truncates the tracker before it "
        "writes it: a kill leaves half a checkpoint that looks whole, and nothing notices a flipped bit afterwards",
        upstream="megatron.training.checkpointing.save_checkpoint",
        apply=iteration_publishing.apply,
        is_needed=_has_text("megatron.training.checkpointing.save_checkpoint", "maybe_msc.open(tracker_filename, 'w')"),
    ),
    Adjustment(
        name="results-in-the-process",
        platforms=("cpu", "cuda"),
        reason="every save passes its results through a multiprocessing.Manager in the rank's process group: SIGTERM "
        "to the group ends it before the rank saves, and it outlives a rank that is killed, holding its stdout",
        upstream="megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        apply=_keep_write_results_in_the_process,
        is_needed=_has_text(
            "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue", "ctx.Manager()"
        ),
    ),
    Adjustment(
        name="writer-thread",
        platforms=("cpu", "cuda"),
        reason="the worker process of --async-save gets the live tensors of a CPU, which it writes as they are later, "
        "needs a CUDA context of its own on a GPU, and a run waits without end for one that has died",
        upstream="megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller",
        apply=_write_checkpoints_in_a_thread,
        is_needed=_has_text(
            "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.preload_tensors",
            'tensor.to("cpu", non_blocking=non_blocking)',
        ),
    ),
    Adjustment(
        name="group-step-adam",
        platforms=("cpu", "cuda"),
        reason="without TransformerEngine megatron falls back to torch's AdamW, whose state it cannot resume from",
        upstream="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
        apply=_use_group_step_adam,
        is_needed=_has_text(
            "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
            'steps = list(set([s["step"].item()',
        ),
    ),
    Adjustment(
        name="exact-gradient-norm",
        platforms=("cpu", "cuda"),
        reason="the fallback norm loses 4e-5 to fp32 summation on a CPU, so the gradient norm differs between layouts, "
        "and waits for a GPU at every tensor",
        upstream="megatron.core.utils.local_multi_tensor_l2_norm",
        apply=_sum_gradient_norm_exactly,
        is_needed=_has_text("megatron.core.utils.local_multi_tensor_l2_norm", "torch.norm(tensor)"),
    ),
    Adjustment(
        name="scale-in-place",
        platforms=("cpu", "cuda"),
        reason="the fallback of clipping makes a second copy of every gradient, with two kernels for each",
        upstream="megatron.core.utils.local_multi_tensor_scale",
        apply=_scale_gradients_in_place,
        is_needed=_has_text("megatron.core.utils.local_multi_tensor_scale", "dst.copy_(src * scale)"),
    ),
    Adjustment(
        name="clip-without-waiting",
        platforms=("cuda",),
        reason="without TransformerEngine the host reads the gradient norm before it launches the optimizer",
        upstream="megatron.core.optimizer.clip_grads.get_grad_norm_fp32",
        apply=_clip_without_waiting,
        is_needed=_has_text("megatron.core.optimizer.clip_grads", "multi_tensor_scale_tensor_impl = None"),
    ),
    Adjustment(
        name="weight-gradient-fusion",
        platforms=("cuda",),
        reason="adding weight gradients to fp32 main_grad within the matrix product needs a module of apex, which "
        "torch.addmm replaces since torch 2.11",
        upstream="megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication.backward",
        apply=_add_weight_gradients_in_the_product,
        is_needed=_has_text("megatron.core.tensor_parallel.layers", "import fused_weight_gradient_mlp_cuda"),
    ),
    Adjustment(
        name="silu-kernels",
        platforms=("cpu",),
        reason="the backward pass of SwiGLU is written for torch.compile; without it it takes 6 times as long",
        upstream="megatron.core.fusions.fused_bias_swiglu.swiglu_back",
        apply=_use_silu_kernels,
        is_needed=_has_text("megatron.core.fusions.fused_bias_swiglu", "g * torch.sigmoid(y_1) * (1 + y_1 * "),
    ),
    Adjustment(
        name="triton-rope",
        platforms=("cuda",),
        backends=("torch",),
        reason="megatron's fused rotary embedding and split of query, key and value are TransformerEngine's kernels",
        upstream="megatron.core.models.common.embeddings.rope_utils.apply_rotary_pos_emb",
        apply=_use_triton_rope,
        is_needed=_has_text(
            "megatron.core.models.common.embeddings.rope_utils", "extensions.transformer_engine import fused_apply_rot"
        ),
    ),
    Adjustment(
        name="no-gather-of-one-rank",
        platforms=("cpu",),
        reason="gloo copies all parameters through a scratch buffer at every step, even for a group of one rank",
        upstream="megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_param_sync",
        apply=_skip_gather_of_one_rank,
        is_needed=_has_text(
            "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_param_sync",
            "dist_all_gather_func(",
        ),
    ),
    Adjustment(
        name="all-to-all-lists",
        platforms=("cpu",),
        reason="the MoE dispatcher turns split sizes into arrays only where they are on a GPU; torch refuses tensors",
        upstream="megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
        apply=_pass_all_to_all_splits_as_lists,
        is_needed=_has_text(
            "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
            "torch.is_tensor(tensor) and tensor.is_cuda",
        ),
    ),
)
