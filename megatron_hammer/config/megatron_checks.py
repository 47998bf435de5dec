"""Megatron's own refusals, asked of a copy: its validation and its model configuration, without their side effects.

The last check of preflight. It knows what our own checks do not list, but it stops at the first problem, and its
messages are those of asserts.
"""

import argparse
import contextlib
import copy
import io
import linecache
import logging
import os
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from packaging.version import Version

from megatron_hammer.config.connections import BLACKWELL, CONNECTIONS, needs_one_connection, read_run_capability
from megatron_hammer.errors import ConfigError
from megatron_hammer.platforms import cuda
from megatron_hammer.platforms.select import LEAST_TE_VERSION, find_te_failure

TE_MODULES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")


def find_megatron_refusal(namespace: argparse.Namespace) -> str | None:
    """What Megatron's validate_args or one of its configurations says about a copy of the namespace; None if it
    accepts.

    Where a run is planned for a GPU or a TransformerEngine that this machine lacks, Megatron's questions about them are
    answered for the planned machine.
    """
    with _without_side_effects() as output, _answers_of_planned_machine(namespace):
        try:
            _validate(_copy_for_trial(namespace))
        except SystemExit:  # deprecated flags: a printed sentence, then exit()
            return output.getvalue().strip().splitlines()[-1].rstrip(".")
        except Exception as error:  # whatever stops megatron here would stop the run: missing files, bad keys, asserts
            return _describe(error)
    return None


def build_trial_config(namespace: argparse.Namespace, **changes: Any) -> tuple[argparse.Namespace, Any]:
    """A validated copy of the namespace and megatron's GPTModelConfig for it, without setting Megatron's globals.

    changes: arguments of the copy to replace. Raises ConfigError with Megatron's words where it refuses.
    """
    namespace = argparse.Namespace(**vars(namespace) | changes)
    # Validated twice, each time on a fresh copy: validation changes its arguments, and the first pass keeps only words.
    refusal = find_megatron_refusal(namespace)
    if refusal is not None:
        raise ConfigError(describe_refusal(refusal))
    with _without_side_effects(), _answers_of_planned_machine(namespace):
        trial = _copy_for_trial(namespace)
        return trial, _validate(trial)


def _validate(trial: argparse.Namespace) -> Any:
    """Megatron's GPTModelConfig for a copy, which megatron's validation fills in and changes.

    The other configurations of a run (optimizer, data parallelism, checkpoints) are built too: each checks itself.
    """
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import validate_args

    validate_args(trial)
    if trial.step_batch_size_schedule is not None:
        _validate_batch_schedule(trial)
    config = gpt_config_from_args(trial)
    pretrain_cfg_container_from_args(trial, config)
    return config


def _validate_batch_schedule(trial: argparse.Namespace) -> None:
    """Megatron reads the schedule once all ranks are up, and compares each batch with the ranks when it is its turn."""
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    try:
        calculator = StepBatchsizeNumMicroBatchesCalculator(
            micro_batch_size=trial.micro_batch_size,
            data_parallel_size=trial.data_parallel_size * trial.gtp_weight_remat_size,
            decrease_batch_size_if_needed=trial.decrease_batch_size_if_needed,
            rank=trial.rank,
            schedule=trial.step_batch_size_schedule,
            seq_length=trial.seq_length,
        )
        # A run that continues may be beyond batches that were of another number of ranks.
        for threshold, _ in calculator.schedule if trial.load is None else ():
            calculator.update(threshold, consistency_check=True)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"step_batch_size_schedule={trial.step_batch_size_schedule}: {error}") from error


def build_trial_ddp_config(trial: argparse.Namespace) -> Any:
    """What decides how megatron-core's distributed optimizer lays out its buffers, for a validated copy."""
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=trial.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=trial.overlap_grad_reduce,
        use_distributed_optimizer=True,
        bucket_size=trial.ddp_bucket_size,
        pad_buckets_for_high_nccl_busbw=trial.ddp_pad_buckets_for_high_nccl_busbw,
    )


def describe_refusal(refusal: str) -> str:
    """Megatron's words as a problem."""
    return f"megatron: refuses this configuration: {refusal}. Change or drop the flag it names."


def read_megatron_defaults() -> dict[str, Any]:
    """Every attribute of Megatron's namespace with the value it has when no flag is given."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    # Where two flags share an attribute, argparse takes the first one's default.
    return {action.dest: action.default for action in reversed(parser._actions)}


def list_model_arguments(namespace: argparse.Namespace) -> set[str]:
    """The names of the arguments that Megatron reads while it makes the configuration of a GPT model."""
    from megatron.training.argument_utils import gpt_config_from_args

    # Any sizes do. params_dtype is set by validate_args, which does not run here.
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 1, "vocab_size": 1}
    recorded = _RecordedArguments(**vars(namespace) | sizes | {"params_dtype": torch.float32, "names_read": set()})
    gpt_config_from_args(recorded)
    return set(vars(recorded)["names_read"])


class _RecordedArguments(argparse.Namespace):
    """Megatron's arguments, with the names that were read of them."""

    def __getattribute__(self, name: str) -> Any:
        values = super().__getattribute__("__dict__")
        if name in values:
            values["names_read"].add(name)
        return super().__getattribute__(name)


@contextlib.contextmanager
def _without_side_effects() -> Iterator[io.StringIO]:
    """No output (what was printed is yielded); environment and PyTorch as they were, which deterministic mode sets."""
    environment, deterministic_mode = dict(os.environ), torch.get_deterministic_debug_mode()
    disabled_level = logging.root.manager.disable
    output = io.StringIO()
    try:
        # Restored below: a later check or the run itself still logs.
        logging.disable(logging.WARNING)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            warnings.simplefilter("ignore")
            yield output
    finally:
        logging.disable(disabled_level)
        torch.set_deterministic_debug_mode(deterministic_mode)
        # Cleared first, because update() would keep the variables that Megatron added.
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def _answers_of_planned_machine(namespace: argparse.Namespace) -> Iterator[None]:
    """Answer what Megatron asks of a GPU and of TransformerEngine's version where this machine has none of them.

    The planned GPU is of the first generation that has the run's number formats, Hopper at least, and its environment
    is the one that `connections.py` sets there.
    """
    from megatron.core import utils

    te_version = utils._te_version
    with contextlib.ExitStack() as stack:
        if namespace.platform == "cuda" and read_run_capability(vars(namespace)) is None:
            needs_blackwell = namespace.fp4 or (namespace.fp8 and namespace.fp8_recipe == "mxfp8")
            stack.enter_context(cuda.pretend_capability((BLACKWELL, 0) if needs_blackwell else (9, 0)))
            os.environ.pop(CONNECTIONS, None)  # of this machine; it is restored with the rest of the environment
            if needs_one_connection(vars(namespace)):
                os.environ[CONNECTIONS] = "1"
        if _lacks_te(namespace):
            # megatron.core.utils.get_te_version caches the version in this variable and reads it from there.
            utils._te_version = Version(LEAST_TE_VERSION)
            stack.enter_context(_pretend_te_optimizer())
        try:
            yield
        finally:
            utils._te_version = te_version


def _lacks_te(namespace: argparse.Namespace) -> bool:
    """Whether the run is planned for a TransformerEngine that this machine does not have."""
    return namespace.transformer_impl == "transformer_engine" and find_te_failure() is not None


@contextlib.contextmanager
def _pretend_te_optimizer() -> Iterator[None]:
    """What megatron.core.optimizer.OptimizerConfig looks at for --use-precision-aware-optimizer: Adam's arguments."""

    def adam(
        params: Any,
        master_weight_dtype: Any,
        exp_avg_dtype: Any,
        exp_avg_sq_dtype: Any,
        use_decoupled_grad: Any,
        store_param_remainders: Any,
    ) -> None: ...

    modules = {name: types.ModuleType(name) for name in TE_MODULES}
    vars(modules[TE_MODULES[-1]])["FusedAdam"] = adam
    with mock.patch.dict(sys.modules, modules):
        yield


def _copy_for_trial(namespace: argparse.Namespace) -> argparse.Namespace:
    """A copy that megatron may change; of a run planned for a GPU, without kernels that it would look for here."""
    trial = copy.deepcopy(namespace)
    if _lacks_te(trial) or trial.triton_kernels:
        trial.apply_rope_fusion = trial.moe_permute_fusion = False
    return trial


def _describe(error: Exception) -> str:
    """The error's words in one line, or where it has none the condition that failed."""
    text = " ".join(str(error).split())
    if text:
        return text.rstrip(".")
    # A bare assert has no words; the last frame's source line is its condition. chr(92) is a backslash.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    source = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{source.removeprefix('assert ').rstrip(chr(92)).strip()} does not hold ({frame.name})"
