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
import re
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.platforms.select import find_te_failure


def find_megatron_refusal(namespace: argparse.Namespace) -> str | None:
    """What Megatron's validate_args or its TransformerConfig says about a copy of the namespace; None if it accepts.

    Also None where it cannot answer because it asks a GPU or TransformerEngine, which this machine lacks (a run
    planned for another one).
    """
    with _without_side_effects() as output:
        trial = _copy_for_trial(namespace)
        try:
            _validate(trial)
        except SystemExit:  # deprecated flags: a printed sentence, then exit()
            return output.getvalue().strip().splitlines()[-1].rstrip(".")
        except Exception as error:  # whatever stops megatron here would stop the run: missing files, bad keys, asserts
            is_answer = not _asks_missing_gpu(error.__traceback__) and not _asks_missing_te(trial, error)
            return _describe(error) if is_answer else None
    return None


def build_trial_config(namespace: argparse.Namespace, **changes: Any) -> tuple[argparse.Namespace, Any]:
    """A validated copy of the namespace and megatron's GPTModelConfig for it, without setting Megatron's globals.

    changes: arguments of the copy to replace. Raises ConfigError with Megatron's words where it refuses.
    """
    namespace = argparse.Namespace(**vars(namespace) | changes)
    refusal = find_megatron_refusal(namespace)
    if refusal is not None:
        raise ConfigError(describe_refusal(refusal))
    with _without_side_effects():
        trial = _copy_for_trial(namespace)
        return trial, _validate(trial)


def _validate(trial: argparse.Namespace) -> Any:
    """Megatron's GPTModelConfig for a copy, which megatron's validation fills in and changes."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    validate_args(trial)
    return gpt_config_from_args(trial)


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


@contextlib.contextmanager
def _without_side_effects() -> Iterator[io.StringIO]:
    """No output (what was printed is yielded), and the environment as it was: deterministic mode sets variables."""
    environment = dict(os.environ)
    disabled_level = logging.root.manager.disable
    output = io.StringIO()
    try:
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
        os.environ.clear()
        os.environ.update(environment)


def _copy_for_trial(namespace: argparse.Namespace) -> argparse.Namespace:
    """A copy that megatron may change; of a run planned for TransformerEngine, without the kernel that it looks for."""
    trial = copy.deepcopy(namespace)
    if trial.transformer_impl == "transformer_engine" and find_te_failure() is not None:
        trial.apply_rope_fusion = False
    return trial


def _asks_missing_te(trial: argparse.Namespace, error: Exception) -> bool:
    """Whether the error is about TransformerEngine's version, on a machine that has none."""
    is_about_te = re.search(r"\bTE\b|transformer[-_ ]engine", str(error), re.IGNORECASE) is not None
    return is_about_te and trial.transformer_impl == "transformer_engine" and find_te_failure() is not None


def _asks_missing_gpu(trace: TracebackType | None) -> bool:
    """Whether the error was raised inside torch.cuda."""
    frames = traceback.extract_tb(trace)
    return bool(frames) and f"torch{os.sep}cuda{os.sep}" in frames[-1].filename


def _describe(error: Exception) -> str:
    """The error's words in one line, or where it has none the condition that failed."""
    text = " ".join(str(error).split())
    if text:
        return text.rstrip(".")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    source = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{source.removeprefix('assert ').rstrip(chr(92)).strip()} does not hold ({frame.name})"
