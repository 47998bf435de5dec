"""Losses and gradients of one training step: recorded in a real run, and compared with another run's.

The reference is a run on the CPU in fp32 with a learning rate of zero, which also writes its weights as the checkpoint
that every other run loads. A gradient is what the optimizer gets: summed over the micro-batches, divided by the tokens,
before clipping.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from on_gpu.processes import adjust_megatron, run_python
from on_gpu.setting import Check, Setting

RECORDER = str(Path(__file__).resolve().parents[1] / "gpu.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """The first step of a run. gradients: by checkpoint name, fp32 on the CPU."""

    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]


def record(platform: str, output: Path, flags: Sequence[str]) -> None:
    """Run training with `flags`, and save every parameter's gradient of the first step."""
    adjust_megatron(platform, flags)

    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_hammer.checkpoint_files.checkpoint_reader import use_fused_norm_names
    from megatron_hammer.training import pretrain

    train_step = training.train_step

    def record_step(forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **options: Any) -> Any:
        step = optimizer.step

        def save_and_step() -> Any:
            parameters = unwrap_model(model)[0].named_parameters()
            gradients = {name: parameter.main_grad.float().cpu() for name, parameter in parameters}
            torch.save(use_fused_norm_names(gradients), output)
            return step()

        optimizer.step = save_and_step
        return train_step(forward_step, data, model, optimizer, *rest, **options)

    training.train_step = record_step
    pretrain.main(flags)


def run_recorder(platform: str, output_dir: Path, flags: Sequence[str], timeout_s: float) -> str | None:
    """`record` in a process of its own, with its metrics beside the gradients; returns why it failed, or None."""
    output_dir.mkdir()
    flags = [*flags, "--metrics-path", str(output_dir / "metrics.jsonl")]
    variables = {"CUDA_VISIBLE_DEVICES": ""} if platform == "cpu" else {}
    arguments = [RECORDER, "--side", "gradients", "--output", str(output_dir / "gradients.pt"), platform, *flags]
    return run_python(arguments, timeout_s=timeout_s, variables=variables).reason


def read(output_dir: Path) -> Recorded:
    metrics = json.loads((output_dir / "metrics.jsonl").read_text(encoding="utf8").splitlines()[0])
    gradients = torch.load(output_dir / "gradients.pt", weights_only=True)
    return Recorded(loss=metrics["loss"], grad_norm=metrics["grad_norm"], gradients=gradients)


def list_check_flags(setting: Setting, data_prefix: Path) -> list[str]:
    """One step of two micro-batches that changes no weight."""
    return [
        *setting.list_flags(data_prefix)[:2],  # the preset
        *setting.list_flags(data_prefix)[4:],  # all but its platform
        *setting.check_flags,
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "1", "--lr-warmup-iters", "0"),
        *("--lr", "0", "--min-lr", "0"),
    ]


def record_reference(setting: Setting, work_dir: Path, timeout_s: float) -> str | None:
    """The CPU's run in fp32, and the checkpoint of its weights; returns why it failed, or None."""
    return run_recorder("cpu", work_dir / "reference", list_reference_flags(setting, work_dir), timeout_s)


def list_reference_flags(setting: Setting, work_dir: Path) -> list[str]:
    precision = ("--platform", "cpu", "--precision", "fp32")
    return [*list_check_flags(setting, work_dir / "data"), *precision, "--save", str(work_dir / "start")]


def run_check(setting: Setting, check: Check, work_dir: Path, timeout_s: float) -> dict[str, Any]:
    """One backend and precision against the reference: what differs by how much, and whether all bounds hold."""
    flags = [*list_check_flags(setting, work_dir / "data"), "--platform", setting.platform]
    flags += ["--precision", check.precision, "--backend", check.backend]
    flags += ["--load", str(work_dir / "start"), "--finetune"]
    output_dir = work_dir / f"{check.backend}-{check.precision}"
    result: dict[str, Any] = {"backend": check.backend, "precision": check.precision}
    reason = run_recorder(setting.platform, output_dir, flags, timeout_s)
    if reason is not None:
        return result | {"passed": False, "reason": reason}
    return result | compare(read(output_dir), read(work_dir / "reference"), check)


def compare(recorded: Recorded, reference: Recorded, check: Check) -> dict[str, Any]:
    """Relative differences of loss, gradient norm and each parameter's gradient, the largest of these with its name."""
    if recorded.gradients.keys() != reference.gradients.keys():
        names = sorted(recorded.gradients.keys() ^ reference.gradients.keys())
        return {"passed": False, "reason": f"not the same parameters: {', '.join(names[:4])}"}
    differences = {
        name: float((recorded.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in reference.gradients.items()
    }
    worst = max(differences, key=differences.__getitem__)
    measured = {
        "loss": abs(recorded.loss - reference.loss) / reference.loss,
        "grad_norm": abs(recorded.grad_norm - reference.grad_norm) / reference.grad_norm,
        "gradient": differences[worst],
    }
    bounds = {name: getattr(check, name) for name in measured}
    # A NaN is above no bound, so each must be at most its bound.
    exceeded = [name for name in measured if not measured[name] <= bounds[name]]
    return {
        "passed": not exceeded,
        "reason": f"{', '.join(exceeded)} beyond the bound" if exceeded else None,
        "differences": measured,
        "bounds": bounds,
        "worst_parameter": worst,
    }
