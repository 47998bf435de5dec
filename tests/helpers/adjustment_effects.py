"""What each adjustment of megatron_compat changes, tried in a process of its own, with the adjustments or without.

    python tests/helpers/adjustment_effects.py untouched|adjusted

Its last line is a JSON object: what was `observed` of each adjustment and whether it `is_needed`. Run it without a GPU.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy
import torch

from megatron_hammer.platforms import megatron_compat

warnings.simplefilter("ignore")


def attempt(function: Callable[[], Any]) -> str:
    """`ok`, or the exception's name and the beginning of its text."""
    try:
        function()
    except BaseException as error:  # megatron exits, and torch.distributed.checkpoint raises no Exception
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "ok"


def observe_no_compiler_import() -> Any:
    import megatron.core.jit  # noqa: F401

    return "torch._dynamo" in sys.modules


def observe_meta_device() -> Any:
    with torch.device("meta"):
        return torch.zeros(3).device.type, torch.nn.Linear(2, 3).weight.device.type


def observe_cuda_substitution() -> Any:
    return {
        "factory": attempt(lambda: torch.zeros(1, device="cuda")),
        "current device": attempt(lambda: torch.ones(1, device=torch.cuda.current_device())),
        "tensor": attempt(lambda: torch.ones(1).cuda().to("cuda")),
        "event": attempt(lambda: torch.cuda.Event().record(torch.cuda.current_stream())),
    }


def observe_allow_no_cuda() -> Any:
    from megatron.training import training

    return attempt(training.initialize_megatron)  # with it, it gets as far as the arguments that nobody has set


def observe_cpu_rng_state() -> Any:
    from megatron.core.tensor_parallel import random

    state = torch.get_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    return torch.equal(torch.rand(3), first)


def observe_loader_generator() -> Any:
    from megatron.training import global_vars, training

    arguments = Namespace(
        micro_batch_size=2,
        global_batch_size=2,
        dataloader_type="single",
        hybrid_context_parallel=False,
        num_workers=0,
        full_validation=False,
    )
    global_vars.set_args(arguments)
    loader = training.build_pretraining_data_loader(list(range(8)), 0)
    before = torch.get_rng_state()
    assert next(iter(loader)).tolist() == [0, 1]
    return torch.equal(torch.get_rng_state(), before)


def observe_workers_end_with_rank() -> Any:
    """What becomes of a worker that gets SIGTERM, and of one whose rank is killed, seen by the parent of the rank."""
    from megatron.training import global_vars, training

    reader, writer = os.pipe()
    rank = os.fork()
    if rank == 0:
        arguments = {"micro_batch_size": 2, "global_batch_size": 2, "dataloader_type": "single", "num_workers": 1}
        arguments |= {"exit_signal_handler": True, "exit_signal": signal.SIGTERM}
        global_vars.set_args(Namespace(**arguments, hybrid_context_parallel=False, full_validation=False))
        workers = iter(training.build_pretraining_data_loader(list(range(8)), 0))
        next(workers)
        worker = workers._workers[0]
        worker.terminate()
        worker.join(timeout=1)
        is_up = worker.is_alive()
        os.write(writer, bytes([is_up]))
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    is_up_after_sigterm = os.read(reader, 1) == b"\1"
    os.waitpid(rank, 0)
    # The end of the pipe comes when no process holds it: a worker looks for its parent every 5 s.
    is_gone = bool(select.select([reader], [], [], 2)[0])
    return {"stays up": is_up_after_sigterm, "ends with its rank": is_gone}


def observe_rng_warning() -> Any:
    from megatron.core.tensor_parallel import random

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    tracker = random.CudaRNGStatesTracker()
    tracker.set_states({random._MODEL_PARALLEL_RNG_TRACKER_NAME: torch.get_rng_state()})
    # Without a GPU the untouched functions cannot read a state at all; what they would read and write is the CPU's.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    with tracker.fork():
        torch.rand(1)
    logging.getLogger().removeHandler(handler)
    return [record.getMessage() for record in records]


def observe_shipped_dataset_helpers() -> Any:
    from megatron.core.datasets import utils

    return attempt(utils.compile_helpers).split(":")[0]


def observe_validation_sets_of_virtual_stages() -> Any:
    from megatron.training import training

    seen: list[Any] = []

    def evaluate(forward_step: Any, iterator: Any, *rest: Any, **options: Any) -> Any:
        seen.append(iterator)
        return {}, None, False

    arguments = Namespace(
        multiple_validation_sets=True, full_validation=False, eval_iters=[1, 1], validation_set_names=None
    )
    originals = training.get_args, training.evaluate
    training.get_args, training.evaluate = lambda: arguments, evaluate
    try:
        by_stage = [["prose of stage 0", "code of stage 0"], ["prose of stage 1", "code of stage 1"]]
        with contextlib.redirect_stdout(None):
            training.evaluate_and_print_results("step 1", None, by_stage, ["chunk 0", "chunk 1"], 1, None, None)
    finally:
        training.get_args, training.evaluate = originals
    return seen


def observe_group_step_adam() -> Any:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    is_torch = optimizer.USING_PYTORCH_OPTIMIZER
    adam = (torch.optim.AdamW if is_torch else optimizer.Adam)([torch.nn.Parameter(torch.ones(2))])
    adam.param_groups[0]["params"][0].grad = torch.ones(2)
    adam.step()
    return {
        "step in the group": adam.param_groups[0].get("step"),
        "expects it there": distrib_optimizer.HAVE_APEX_OR_TE,
    }


def observe_exact_gradient_norm() -> Any:
    from megatron.core.optimizer import clip_grads

    from megatron_hammer.platforms import cpu_device

    cpu_device.substitute_cuda_tensors()  # the untouched function too shall run here: its sum is in question
    gradients = [torch.randn(2**21, generator=torch.Generator().manual_seed(1)), torch.ones(3)]
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [gradients], False)
    exact = torch.cat(gradients).double().norm()
    return abs(float(norm / exact) - 1)


def observe_scale_in_place() -> Any:
    from megatron.core.optimizer import clip_grads, optimizer

    outcome = {}
    for module in (clip_grads, optimizer):
        gradient = WatchedTensor(torch.ones(3))
        WatchedTensor.seen.clear()
        tensors = [gradient]
        clip_grads.multi_tensor_applier(module.multi_tensor_scale_impl, None, [tensors, tensors], 0.5)
        outcome[module.__name__.split(".")[-1]] = [
            gradient.tolist(),
            sorted(set(WatchedTensor.seen) & {"mul", "copy_"}),
        ]
    return outcome


class WatchedTensor(torch.Tensor):
    """Remembers the functions that it is passed to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


def observe_clip_without_waiting() -> Any:
    from megatron.core.optimizer import clip_grads

    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)  # of norm 2
    with mock.patch.object(torch.Tensor, "type", return_value="torch.cuda.FloatTensor"):
        norm = clip_grads.get_grad_norm_fp32([parameter.grad], grad_stats_parallel_group=torch.distributed.group.WORLD)
        clip_grads.clip_grad_by_total_norm_fp32([parameter], 1.0, norm)
    return {"norm": type(norm).__name__, "clipped": float(parameter.grad[0])}


def observe_weight_gradient_fusion() -> Any:
    from megatron.core.tensor_parallel import layers

    main_grad = torch.ones(2, 3)
    outcome = attempt(
        lambda: layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(
            torch.ones(5, 3), torch.ones(5, 2), main_grad
        )
    )
    return {
        "outcome": outcome.split(":")[0],
        "main_grad": main_grad[0].tolist(),
        "is available": layers._grad_accum_fusion_available,
        "imports": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }


def observe_triton_rope() -> Any:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    functions = (rope_utils.fused_apply_rotary_pos_emb, getattr(attention, "apply_fused_qkv_rotary_pos_emb", None))
    modules = [function and function.__module__ for function in functions]
    return {"modules": modules, "split": attention.HAVE_FUSED_QKV_ROPE}


def observe_silu_kernels() -> Any:
    from megatron.core.fusions import fused_bias_swiglu

    gate_up = torch.randn(3, 5, 14, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradient = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
    gate, up = gate_up.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).backward(gradient)
    difference = fused_bias_swiglu.swiglu_back(gradient, gate_up.detach()) - gate_up.grad
    return {"module": fused_bias_swiglu.swiglu_back.__module__, "difference": float(difference.abs().max())}


def observe_no_gather_of_one_rank() -> Any:
    from megatron.core.distributed import param_and_grad_buffer

    gather = param_and_grad_buffer.dist_all_gather_func
    buffer, shard = torch.zeros(4), torch.arange(4.0)
    in_place = gather(buffer, buffer, group=torch.distributed.group.WORLD, async_op=True)
    elsewhere = gather(buffer, shard, group=torch.distributed.group.WORLD, async_op=True)
    elsewhere.wait()
    return {"gathers in place": in_place is not None, "gathered": buffer.tolist()}


def observe_all_to_all_lists() -> Any:
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    splits = maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
    output, values = torch.zeros(3), torch.arange(3.0)
    outcome = attempt(
        lambda: torch.distributed.all_to_all_single(
            output, values, output_split_sizes=splits, input_split_sizes=splits, group=torch.distributed.group.WORLD
        )
    )
    return outcome.split(":")[0], output.tolist()


def save_and_load(wanted: dict[str, Any], **options: Any) -> Any:
    """What a checkpoint that holds only {"weight": [0, 1, 2]} gives to a run that asks for `wanted`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_hammer.platforms import cpu_device

    cpu_device.substitute_cuda_runtime()  # the untouched functions too shall run here: what they load is in question
    cpu_device.substitute_cuda_tensors()
    with tempfile.TemporaryDirectory() as folder:
        weight = ShardedTensor.from_rank_offsets("weight", torch.arange(3.0))
        dist_checkpointing.save({"weight": weight}, folder)
        weight = ShardedTensor.from_rank_offsets("weight", torch.zeros(3))
        return dist_checkpointing.load({"weight": weight} | wanted, folder, **options)


def observe_no_strides() -> Any:
    return attempt(lambda: save_and_load({}, strict="raise_all"))


def observe_missing_extra_states() -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    loaded: dict[str, Any] = {}
    state = ShardedObject("norm._extra_state", "as built", (1,), (0,))
    outcome = attempt(lambda: loaded.update(save_and_load({"layers": [{"norm._extra_state": state}]})))
    other = ShardedObject("scheduler", None, (1,), (0,))
    return {
        "extra state": outcome.split(":")[0],
        "layers": loaded.get("layers"),
        "weight": None if "weight" not in loaded else loaded["weight"].tolist(),
        "another object": attempt(lambda: save_and_load({"scheduler": other})).split(":")[0],
    }


def observe_other_rates() -> Any:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    own = [{"params": [0], "wd_mult": factor, "max_lr": 2.0, "min_lr": 1.0} for factor in (0.0, 1.0)]
    saved = [{**group, "max_lr": 4.0, "step": 5} for group in reversed(own)]
    try:
        matched = MegatronOptimizer._filter_and_reorder_param_groups(own, saved)
    except ValueError:
        return "ValueError"
    return [[group[name] for name in ("wd_mult", "max_lr", "step")] for group in matched]


def observe_whole_iterations() -> Any:
    """What is seen under the final name while an iteration is written, and of the tracker while that is."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.training import checkpointing

    from megatron_hammer.platforms import cpu_device

    cpu_device.substitute_cuda_runtime()
    cpu_device.substitute_cuda_tensors()
    with tempfile.TemporaryDirectory() as folder:
        iteration, tracker = Path(folder, "iter_0000007"), Path(folder, "tracker")
        iteration.mkdir()
        tracker.write_text("6")
        weight = ShardedTensor.from_rank_offsets("weight", torch.arange(3.0))
        with mock.patch("megatron.core.dist_checkpointing.serialization.save_config", side_effect=KeyboardInterrupt):
            interrupted = attempt(lambda: dist_checkpointing.save({"weight": weight}, str(iteration)))
        after_interrupt = sorted(entry.name for entry in Path(folder).iterdir())
        dist_checkpointing.save({"weight": weight}, str(iteration))
        hashes = iteration / "integrity.json"
        digests = json.loads(hashes.read_text())["files"] if hashes.is_file() else {}
        with checkpointing.maybe_msc.open(str(tracker), "w") as file:
            before = tracker.read_text()
            file.write("7")
        return {
            "interrupted": [interrupted.split(":")[0], after_interrupt],
            "finished": sorted(entry.name for entry in Path(folder).iterdir()),
            "hashes": {name: digests.get(name) == sha256(iteration / name) for name in os.listdir(iteration)},
            "tracker": [before, tracker.read_text()],
        }


def observe_verified_loading() -> Any:
    """How a shard with a flipped bit is loaded, by the two functions that read one."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    with tempfile.TemporaryDirectory() as folder:
        iteration = Path(folder, "iter_0000007")
        iteration.mkdir()
        weight = ShardedTensor.from_rank_offsets("weight", torch.arange(999.0))
        dist_checkpointing.save({"weight": weight}, str(iteration))
        shard = iteration / "__0_0.distcp"
        content = bytearray(shard.read_bytes())
        content[content.index(torch.arange(999.0).numpy().tobytes()) + 17] ^= 1
        shard.write_bytes(content)
        wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(999))}
        return {
            "load": attempt(lambda: dist_checkpointing.load(wanted, str(iteration))).split(":")[0],
            "load_common_state_dict": attempt(lambda: dist_checkpointing.load_common_state_dict(str(iteration))).split(
                ":"
            )[0],
        }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Intruder:
    """Unpickled by Python, it makes a file; nothing else of it is left."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def observe_safe_loading() -> Any:
    """Whether the code of a file has run, by the way in which it was read; and what is still read."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    outcomes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def enter(way: str, read: Callable[[], Any]) -> None:
            error = attempt(read)
            outcomes[way] = [(folder / "ran").exists(), error.split(":")[0]]
            shutil.rmtree(folder / "ran", ignore_errors=True)

        intruder = _Intruder(folder / "ran")
        for metadata in (".metadata", "__0.metadata"):
            (folder / metadata).write_bytes(pickle.dumps(intruder))
        torch.save({"iteration": intruder}, folder / "common.pt")
        planner, item = DefaultLoadPlanner(flatten_state_dict=False), mock.Mock()
        planner.state_dict = {}
        enter(".metadata", FileSystemReader(folder).read_metadata)
        enter("__0.metadata", lambda: FileSystemReader(folder).read_metadata(rank=0))
        enter("object", lambda: planner.load_bytes(item, io.BytesIO((folder / "common.pt").read_bytes())))
        enter("torch.load", lambda: torch.load(folder / "common.pt", weights_only=False))
        with mock.patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"):
            enter("environment", lambda: torch.load(folder / "common.pt"))
        kept = {
            "args": Namespace(a=1),
            "mode": _find_megatron_enum(),
            "array": numpy.arange(3),
            "x": numpy.float64(0.5),
        }
        torch.save(kept, folder / "good.pt")
        loaded = torch.load(folder / "good.pt", weights_only=False)
        outcomes["values"] = [
            loaded["args"].a, loaded["mode"] is _find_megatron_enum(), loaded["array"].tolist(), float(loaded["x"])
        ]  # fmt: skip
    return outcomes


def _find_megatron_enum() -> Any:
    """A member of an enum that Megatron's own list of safe types lacks."""
    from megatron.core.transformer.enums import LayerType

    return LayerType.decoder


def observe_results_in_the_process() -> Any:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results = filesystem_async.get_write_results_queue()
    results.put("written")
    return {"process": bool(multiprocessing.active_children()), "result": results.get_nowait()}


def observe_writer_thread() -> Any:
    """Who writes an asynchronous save, and whether a tensor that changes meanwhile is written as it was."""
    from megatron.core.dist_checkpointing.strategies import async_utils
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    live, written = torch.zeros(3), []
    buckets = [("path", "key", ([], [("item", live)]))]
    if async_utils.PersistentAsyncCaller.__module__.startswith("megatron."):
        # What its worker calls; as another process, it would get the tensor in shared memory.
        staged = FileSystemWriterAsync.preload_tensors(buckets)
        live.fill_(1.0)
        return {"writer": "process", "written": staged[0][2][1][0][1].tolist()}

    def write(rank: int, buckets: Any, results: Any) -> None:
        may_write.wait()
        written.append((threading.current_thread().name, buckets[0][2][1][0][1].tolist()))

    may_write, calls = threading.Event(), async_utils.AsyncCallsQueue(persistent=True)
    calls.schedule_async_request(async_utils.AsyncRequest(write, (0, buckets, None), []))
    assert calls.maybe_finalize_async_calls() == []
    live.fill_(1.0)
    may_write.set()
    calls.close()
    ((writer, values),) = written
    return {"writer": writer, "written": values}


@contextlib.contextmanager
def single_rank() -> Any:
    from megatron.core import parallel_state

    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        parallel_state.initialize_model_parallel()
        yield
        torch.distributed.destroy_process_group()


def main() -> None:
    if sys.argv[1] == "adjusted":
        megatron_compat.install("cpu")
        for adjustment in megatron_compat.ADJUSTMENTS:
            if "cpu" not in adjustment.platforms:  # none of them needs a GPU to be applied
                adjustment.apply()
    else:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    observed = {
        name.removeprefix("observe_").replace("_", "-"): observe
        for name, observe in globals().items()
        if name.startswith("observe_")
    }
    results = {"no-compiler-import": observed.pop("no-compiler-import")()}  # first, before anything else is imported
    with single_rank():
        results |= {name: observe() for name, observe in observed.items()}
    is_needed = {adjustment.name: adjustment.is_needed() for adjustment in megatron_compat.ADJUSTMENTS}
    print(json.dumps({"observed": results, "is_needed": is_needed}))


if __name__ == "__main__":
    main()
