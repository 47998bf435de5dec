"""Launch scripts of planned runs: torchrun on every node, SLURM, or an Indexed Job of Kubernetes.

The model and its layout are those of a projection's row. The paths of data and outputs are environment variables with
defaults, for the user to set. The *.j2 templates beside this file contain what the launchers need.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.launch.training_flags import find_recipe, list_plan_flags
from megatron_hammer.scaling.plan import LOW_PRECISIONS, Plan

Launcher = Literal["torchrun", "slurm", "kubernetes"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)
SUFFIXES: Mapping[Launcher, str] = {"torchrun": ".sh", "slurm": ".sbatch", "kubernetes": ".yaml"}
TEMPLATE_DIR = Path(__file__).resolve().parent
CPU_GPU_NAME = "cpu-core"
MAX_NAME_LENGTH = 45  # Kubernetes appends the pod's number and allows 63 characters
# Defaults for a model that has no recipe here.
UNTUNED_SCHEDULE = {"LR": "3e-4", "MIN_LR": "3e-5", "LR_WARMUP_ITERS": "100", "TRAIN_ITERS": "1000"}
FLAGS_OF_KNOBS = {
    "TRAIN_ITERS": "--train-iters",
    "LR_WARMUP_ITERS": "--lr-warmup-iters",
    "LR": "--lr",
    "MIN_LR": "--min-lr",
}
FSDP_CONNECTIONS = "8"  # CUDA's own default
# Optimizer settings in common use for language models, where Megatron's defaults differ.
UNTUNED_FLAGS = (
    *("--weight-decay", "0.1", "--adam-beta1", "0.9", "--adam-beta2", "0.95", "--clip-grad", "1.0"),
    *("--hidden-dropout", "0", "--attention-dropout", "0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One run to be launched."""

    name: str  # of files, jobs and pods: letters, digits and hyphens
    plan: Plan
    model_arguments: Mapping[str, Any]  # see list_model_flags
    num_nodes: int
    processes_per_node: int
    train_tokens: int | None  # None: the recipe's
    comment: str  # a line with its origin and its predicted time

    @property
    def is_cpu(self) -> bool:
        return self.plan.gpu.name == CPU_GPU_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesOptions:
    """Names that only the user of the cluster knows."""

    image: str = "megatron-hammer:latest"
    volume_claim: str = "training"


def build_launch(
    plan: Plan, *, model_arguments: Mapping[str, Any], name: str, train_tokens: int | None, comment: str
) -> Launch:
    """A run of a plan. model_arguments: the plan's model, as build_model_arguments of config/ gives it.

    Raises ConfigError if the number of ranks does not fill its nodes."""
    world_size, per_node = plan.layout.world_size, plan.cluster.gpus_per_node
    processes = min(world_size, per_node)
    if world_size % processes:
        raise ConfigError(
            f"gpus: must fill whole nodes, got {world_size} GPUs on nodes of {per_node} ({plan.cluster.name}). "
            f"Choose a row of {world_size // processes * processes} GPUs."
        )
    return Launch(
        # Stripped twice: a shortened name may end in a hyphen, which Kubernetes refuses.
        name=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_NAME_LENGTH].strip("-"),
        plan=plan,
        model_arguments=model_arguments,
        num_nodes=world_size // processes,
        processes_per_node=processes,
        train_tokens=train_tokens,
        comment=comment,
    )


def list_environment(launch: Launch) -> dict[str, str]:
    """Environment variables that Megatron requires. A variable that is already set keeps its value.

    Before Blackwell, kernels of tensor and context parallelism keep their order only with one connection
    (CUDA_DEVICE_MAX_CONNECTIONS). FSDP must not have just one (megatron.training.arguments.validate_args), and this
    package sets one by default.
    """
    plan, environment = launch.plan, {"OMP_NUM_THREADS": "1"}
    is_ordered = max(plan.layout.tensor_model_parallel_size, plan.layout.context_parallel_size) > 1
    if plan.sharding == "fsdp":
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = FSDP_CONNECTIONS
    elif is_ordered and not launch.is_cpu and plan.gpu.fp4_tflops is None:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return environment


def select_backend(plan: Plan) -> str:
    """te if only TransformerEngine supports the plan, otherwise whatever is installed."""
    is_low = plan.precision in LOW_PRECISIONS
    needs_te = plan.layout.context_parallel_size > 1 or is_low or plan.overlaps_tensor_parallel
    return "te" if needs_te else "auto"


def build_schedule(launch: Launch) -> dict[str, str]:
    """The settings of the schedule: the recipe's tokens and warm-up, converted to steps of this batch."""
    plan = launch.plan
    recipe = find_recipe(plan.model)
    if recipe is None and launch.train_tokens is None:
        return dict(UNTUNED_SCHEDULE)
    train_tokens = launch.train_tokens or (recipe.train_tokens if recipe else 0)
    steps = max(1, -(-train_tokens // plan.tokens_per_step))
    if recipe is None:
        return {**UNTUNED_SCHEDULE, "TRAIN_ITERS": str(steps), "LR_WARMUP_ITERS": str(min(100, steps // 10))}
    warmup = round(recipe.lr_warmup_steps * recipe.tokens_per_step / plan.tokens_per_step)
    return {"TRAIN_ITERS": str(steps), "LR_WARMUP_ITERS": str(min(warmup, steps // 2))}


def list_launch_flags(launch: Launch) -> list[str]:
    """Training flags that are not set by an environment variable of the script."""
    flags = list_plan_flags(launch.plan, launch.model_arguments, is_cpu=launch.is_cpu)
    return [*flags, *UNTUNED_FLAGS] if find_recipe(launch.plan.model) is None else flags


def render(launch: Launch, launcher: Launcher, options: KubernetesOptions | None = None) -> str:
    """The text of the launcher's file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        # By default jinja2 renders an unknown name as nothing, and a script would lack a flag.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = _build_values(launch)
    if launcher == "kubernetes":
        script = environment.get_template("launch_torchrun.sh.j2").render(values)
        values |= {"script_lines": script.splitlines(), "options": options or KubernetesOptions()}
        return environment.get_template("launch_kubernetes.yaml.j2").render(values)
    template = {"torchrun": "launch_torchrun.sh.j2", "slurm": "launch_slurm.sbatch.j2"}[launcher]
    return environment.get_template(template).render(values)


def _build_values(launch: Launch) -> dict[str, Any]:
    schedule = build_schedule(launch)
    return {
        "launch": launch,
        "backend": select_backend(launch.plan),
        "environment": list_environment(launch),
        "argument_lines": join_in_pairs(list_launch_flags(launch)),
        "schedule": [(FLAGS_OF_KNOBS[knob], knob, value) for knob, value in schedule.items()],
    }


def join_in_pairs(flags: Sequence[str]) -> list[str]:
    """One line of shell per flag with its value."""
    lines: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return [" ".join(line) for line in lines]
