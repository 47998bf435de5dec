"""What a run that was killed leaves beside its output, SAVE.partial, and whether this run continues it.

job.json          what was begun; another job is not continued
checkpoint-N/     transformers' own checkpoints; one without the file `complete` was cut off and is removed
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from accelerate import PartialState
from transformers import TrainerCallback

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import bring_to_disk, publish_files
from megatron_hammer.files.typed import read_json
from megatron_hammer.post_training.trl.recipe import Stage

JOB_NAME, COMPLETE_NAME = "job.json", "complete"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that decides what a run computes. recipe: its fields, the values of `auto` replaced.

    base: name, size and time of every file of weights. examples_sha256: of all token ids, in their order.
    """

    stage: Stage
    recipe: dict[str, Any]
    is_lora: bool
    base_dir: str
    base: dict[str, tuple[int, int]]
    examples_sha256: str
    platform: str
    num_processes: int


def begin_or_continue(work_dir: Path, job: Job, *, restart: bool) -> Path | None:
    """The newest complete checkpoint of the same job; None where this run begins. Called by one process.

    restart: throw an unfinished run away. Raises ConfigError naming every difference to the job that was begun.
    """
    job_path = work_dir / JOB_NAME
    if restart and work_dir.exists():
        shutil.rmtree(work_dir)
    if job_path.exists():
        remedy = "It is no record of an unfinished run; pass --restart to throw that run away and begin again."
        _refuse_other_job(job_path, read_json(job_path, Job, remedy=remedy, raises=ConfigError), job)
    else:
        publish_files({job_path: orjson.dumps(job, option=orjson.OPT_INDENT_2)})
    return _find_newest(work_dir)


def _refuse_other_job(path: Path, begun: Job, asked: Job) -> None:
    old, new = (dataclasses.asdict(job) for job in (begun, asked))
    old |= {f"recipe.{name}": value for name, value in old.pop("recipe").items()}
    # By way of JSON, as the old one: tuples are lists there.
    new_recipe = orjson.loads(orjson.dumps(new.pop("recipe")))
    new |= {f"recipe.{name}": value for name, value in new_recipe.items()}
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        raise ConfigError(
            *(f"{name}: was {old.get(name)}, is {new.get(name)} now." for name in changed),
            f"{path}: an unfinished run can only be continued as it was begun. "
            "Undo what changed, or pass --restart to throw that run away and begin again.",
        )


def _find_newest(work_dir: Path) -> Path | None:
    checkpoints = {int(path.name.split("-")[1]): path for path in work_dir.glob("checkpoint-*")}
    for step, path in list(checkpoints.items()):
        if not (path / COMPLETE_NAME).exists():
            shutil.rmtree(path)
            del checkpoints[step]
    return checkpoints[max(checkpoints)] if checkpoints else None


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once every process has written its part and all of it is on the disk."""

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Called by transformers on every process after a checkpoint."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for path in folder.iterdir():
                if path.is_file():
                    bring_to_disk(path)
            publish_files({folder / COMPLETE_NAME: ""})
