"""Launch scripts of planned runs: torchrun on every node, SLURM, or Kubernetes (Indexed Job, JobSet, TrainJob).

The model and its layout are those of a projection's row. The paths of data and outputs are environment variables with
defaults, for the user to set. The *.j2 templates beside this file contain what the launchers need.
"""

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.launch.training_flags import find_recipe, list_plan_flags
from megatron_hammer.scaling.plan import LOW_PRECISIONS, Plan

Launcher = Literal["torchrun", "slurm", "slurm-array", "kubernetes", "jobset", "trainjob"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)
# "kubernetes" is the plain Indexed Job.
KUBERNETES_LAUNCHERS: tuple[Launcher, ...] = ("kubernetes", "jobset", "trainjob")
TEMPLATES: Mapping[Launcher, str] = {
    "torchrun": "launch_torchrun.sh.j2",
    "slurm": "launch_slurm.sbatch.j2",
    "slurm-array": "launch_slurm.sbatch.j2",
    "kubernetes": "launch_kubernetes.yaml.j2",
    "jobset": "launch_jobset.yaml.j2",
    "trainjob": "launch_trainjob.yaml.j2",
}
# What follows the launch's name in the name of its file.
SUFFIXES: Mapping[Launcher, str] = {
    "torchrun": ".sh",
    "slurm": ".sbatch",
    "slurm-array": "-sweep.sbatch",
    "kubernetes": ".yaml",
    "jobset": "-jobset.yaml",
    "trainjob": "-trainjob.yaml",
}
TEMPLATE_DIR = Path(__file__).resolve().parent
CPU_GPU_NAME = "cpu-core"
_DNS_LABEL = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
# JobSet names its pods NAME-node-0-1234-abcde, and Kubernetes allows 63 characters.
MAX_NAME_LENGTH = 45
GRACE_S = 600  # for one step, one evaluation and a checkpoint; SLURM and Kubernetes then kill
MAX_RESTARTS = 100  # more than a month of restarts once a day and the failures between them
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
    """Names that only the user of the cluster knows. Raises ConfigError for a name that Kubernetes would refuse."""

    image: str = "megatron_hammer:latest"
    volume_claim: str = "training"  # checkpoints and logs, mounted at /workspace
    data_claim: str | None = None  # mounted at /data, read-only
    queue: str | None = None  # a LocalQueue of Kueue
    rdma: tuple[str, int] | None = None  # (resource of the network cards, how many of it one pod asks for)

    def __post_init__(self) -> None:
        # The queue's name is the value of a label, which Kubernetes limits further.
        names = {
            "volume-claim": (self.volume_claim, 253),
            "data-claim": (self.data_claim, 253),
            "queue": (self.queue, 63),
        }
        problems = [
            f"{flag}: must be a name of lower-case letters, digits, '-' and '.', at most {most} long, got {name!r}. "
            "See kubectl get pvc and kubectl get localqueue."
            for flag, (name, most) in names.items()
            if name is not None and (len(name) > most or not re.fullmatch(rf"{_DNS_LABEL}(\.{_DNS_LABEL})*", name))
        ]
        if not re.fullmatch(r"[!-~]+", self.image):
            problems.append(
                f"image: must be a name without spaces, got {self.image!r}. Write it as for docker pull: HOST/NAME:TAG."
            )
        if problems:
            raise ConfigError(*problems)


def read_rdma(text: str) -> tuple[str, int]:
    """`rdma/shared_device_a=1` as (resource, number). Raises ConfigError for anything else."""
    match = re.fullmatch(r"([a-z0-9.-]+/[A-Za-z0-9._-]+)=([1-9][0-9]*)", text)
    if match is None:
        raise ConfigError(
            f"rdma: must be RESOURCE=COUNT, got {text!r}. kubectl describe node lists the resources of a node, such as "
            "rdma/rdma_shared_device_a."
        )
    return match[1], int(match[2])


def read_sweep(path: Path) -> list[str]:
    """The flags of each task of a sweep, one per line and quoted for a shell. Blank lines and # comments are left out.

    Raises ConfigError for a file that cannot be read or has no line, for a line that is no list of flags, and for
    --save, because each task has a folder of its own.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"sweep: must be a readable text file, got {path}: {error}. Pass one line per task."
        ) from None
    tasks, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            words = _split_words(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: must be flags as a shell reads them, got {line!r}: {error}.")
            continue
        if words and not words[0].startswith("--"):
            problems.append(f"{path}:{number}: must begin with a flag, got {words[0]!r}. Write lines like --lr 3e-4.")
        elif any(word.split("=")[0] == "--save" for word in words):
            problems.append(
                f"{path}:{number}: must not have --save, got {line.strip()!r}. Set OUTPUT_DIR for all tasks."
            )
        elif words:
            tasks.append(shlex.join(words))
    if not tasks and not problems:
        problems.append(f"{path}: must have a line for each task, got none. Write lines like --lr 3e-4 --seed 1.")
    if problems:
        raise ConfigError(*problems)
    return tasks


def _split_words(line: str) -> list[str]:
    """The words as a shell splits them; a comment begins with a # at the start of a word.

    shlex.split(comments=True) would cut `--name run#3` to `--name run`.
    """
    source = io.StringIO(line)
    lexer = shlex.shlex(source, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    while not line[source.tell() :].lstrip().startswith("#") and (word := lexer.get_token()) is not None:
        words.append(word)
    return words


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
        name=shorten_name(name),
        plan=plan,
        model_arguments=model_arguments,
        num_nodes=world_size // processes,
        processes_per_node=processes,
        train_tokens=train_tokens,
        # A second line would not be a comment of the script, and YAML refuses control characters.
        comment=" ".join("".join(char if char.isprintable() else " " for char in comment).split()),
    )


def shorten_name(name: str) -> str:
    """A name that Kubernetes takes for every object: lower-case letters, digits and hyphens, first a letter.

    A long one loses its middle, because its end has the number of the row.
    """
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}".strip("-")
    if len(name) <= MAX_NAME_LENGTH:
        return name
    end = name[-15:].lstrip("-")
    return f"{name[: MAX_NAME_LENGTH - len(end) - 1].rstrip('-')}-{end}"


def list_environment(launch: Launch) -> list[tuple[str, str, str]]:
    """(name, value, reason) of each environment variable that the scripts set unless it is set already.

    Before Blackwell, kernels of tensor and context parallelism keep their order only with one connection
    (CUDA_DEVICE_MAX_CONNECTIONS). FSDP must not have just one (megatron.training.arguments.validate_args), and this
    package sets one by default.
    """
    plan = launch.plan
    variables = [("OMP_NUM_THREADS", "1", "torchrun's default: every process of the node has its own threads.")]
    if launch.is_cpu:
        return variables
    is_ordered = max(plan.layout.tensor_model_parallel_size, plan.layout.context_parallel_size) > 1
    if plan.sharding == "fsdp":
        reason = "CUDA's default. FSDP needs more than one connection to overlap, and Megatron refuses one."
        variables.append(("CUDA_DEVICE_MAX_CONNECTIONS", FSDP_CONNECTIONS, reason))
    elif is_ordered and plan.gpu.fp4_tflops is None:
        reason = "With one connection, kernels of tensor and context parallelism start in the order that overlaps them."
        variables.append(("CUDA_DEVICE_MAX_CONNECTIONS", "1", reason))
    reason = "The allocator then reuses freed memory for tensors of any size; the plan's memory is estimated so."
    variables.append(("PYTORCH_ALLOC_CONF", "expandable_segments:True", reason))
    if plan.offload_modules:
        reason = "TransformerEngine would offload weights too, and Megatron refuses to start without it."
        variables.append(("NVTE_CPU_OFFLOAD_V1", "1", reason))
    variables.append(("NCCL_DEBUG", "WARN", "NCCL then prints why it fails, and nothing else. Its default is silence."))
    return variables


def select_backend(plan: Plan) -> str:
    """te if only TransformerEngine supports the plan, otherwise whatever is installed."""
    is_low = plan.precision in LOW_PRECISIONS
    is_cpu = plan.cluster.full_speed_processes_per_node is not None
    is_grouped = plan.model.moe is not None and plan.experts.has_grouped_gemm and not is_cpu
    is_offloaded = bool(plan.offload_modules or plan.num_offloaded_layers)
    has_cp = plan.layout.context_parallel_size > 1
    needs_te = has_cp or is_low or plan.overlaps_tensor_parallel or is_grouped or is_offloaded
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


def render(
    launch: Launch,
    launcher: Launcher,
    options: KubernetesOptions | None = None,
    *,
    sweep: Sequence[str] = (),
    file_name: str | None = None,
) -> str:
    """The text of the launcher's file. sweep: the flags of each task (see read_sweep); only slurm-array reads it.

    file_name: in the commands of the file's head (default: the launch's name and the launcher's suffix).
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        # By default jinja2 renders an unknown name as nothing, and a script would lack a flag.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = _build_values(launch, sweep if launcher == "slurm-array" else ())
    values["file_name"] = file_name or f"{launch.name}{SUFFIXES[launcher]}"
    if launcher in KUBERNETES_LAUNCHERS:
        script = environment.get_template(TEMPLATES["torchrun"]).render(values)
        values |= {"script": script.rstrip("\n"), "options": options or KubernetesOptions()}
    return environment.get_template(TEMPLATES[launcher]).render(values)


def _build_values(launch: Launch, sweep: Sequence[str]) -> dict[str, Any]:
    schedule = build_schedule(launch)
    return {
        "launch": launch,
        "backend": select_backend(launch.plan),
        "environment": list_environment(launch),
        "argument_lines": join_in_pairs(list_launch_flags(launch)),
        "schedule": [(FLAGS_OF_KNOBS[knob], knob, value) for knob, value in schedule.items()],
        "task_flags": sweep,
        "grace_s": GRACE_S,
        "max_restarts": MAX_RESTARTS,
    }


def join_in_pairs(flags: Sequence[str]) -> list[str]:
    """One line of shell per flag with its value."""
    lines: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return [" ".join(line) for line in lines]
