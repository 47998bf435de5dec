"""Which tasks are run: lm-eval's own by name, ours (exams.py, human_eval.py), and the user's files in --tasks-dir.

Importing this loads lm-eval, so offline.py comes first.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.evaluation.benchmarks import exams, human_eval
from megatron_hammer.evaluation.benchmarks.local_data import PACKAGED, find_split, require_folder, serve_local_data

# Of lm-eval, in which TinyLlama's list lies.
USUAL_FOLDERS = ("hellaswag", "openbookqa", "winogrande", "arc", "super_glue/boolq", "piqa")
WHOLE_INDEX = ("",)
PROBLEMS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A task without members, and its configuration as its file has it."""

    name: str
    config: dict[str, Any]


def load_tasks(
    names: Sequence[str],
    *,
    tasks_dir: Path | None,
    data_dir: Path | None,
    num_fewshot: int,
    runs_code: bool,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """lm-eval's tasks and groups by name, with their data, as its `evaluate` takes them.

    names: of tasks, groups or tags, or patterns such as ceval-ppl_high_*. runs_code: whether code that the model writes
    may be run. Raises ConfigError and DataError with every task that is unknown or lacks data.
    """
    manager, selected = find_tasks(names, tasks_dir)
    leaves = [leaf for name in selected for leaf in list_leaves(manager, name)]
    unsafe = sorted({leaf.name for leaf in leaves if leaf.config.get("unsafe_code")})
    if unsafe and not runs_code:
        raise ConfigError(
            f"tasks: {', '.join(unsafe)} runs code that the model writes, which must be allowed. In a container "
            "without anything of value, pass --run-generated-code."
        )
    require_data(leaves, data_dir, num_fewshot)
    with serve_local_data(data_dir):
        try:
            loaded: Any = manager.load(selected)
        except ValueError as error:
            if "Duplicate task" not in str(error):
                raise
            raise ConfigError(f"tasks: must name each task once, got: {error}. Drop one of the two.") from error
    for task in loaded["tasks"].values():
        # As lm-eval's command does: a task that fixes 0 examples keeps them.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
        task.set_fewshot_seed(seed=1234)
    return dict(loaded)


def find_tasks(names: Sequence[str], tasks_dir: Path | None) -> tuple[TaskManager, list[str]]:
    """An index of tasks that has all the names, and the names with patterns expanded.

    lm-eval's own index reads 15,000 files, which takes several seconds, so the usual tasks are looked for first.
    """
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise ConfigError(f"tasks-dir: must be a folder of lm-eval's task files, got {tasks_dir}. Check the path.")
    root = Path(lm_eval.tasks.__file__).parent
    manager = build_manager(tasks_dir, [root / folder for folder in USUAL_FOLDERS])
    if not all(name in manager.task_index for name in names):  # patterns may match more in the whole index
        manager = build_manager(tasks_dir, [root / folder for folder in WHOLE_INDEX])
    return manager, select_names(manager, names)


def build_manager(tasks_dir: Path | None, folders: Sequence[Path]) -> TaskManager:
    """An index of lm-eval's tasks in `folders` with ours, then the user's, which come before others of that name."""
    paths = [*folders, *([] if tasks_dir is None else [tasks_dir])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    own = {**dict(exams.list_exam_tasks()), human_eval.TASK: human_eval.build_task()}
    mine = () if tasks_dir is None else TaskIndex.build([tasks_dir])
    for name, config in own.items():
        entry = TaskIndex.entry_from_config(config)
        if name not in mine and entry is not None:
            manager.task_index[name] = entry
    return manager


def select_names(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """The names that exist, patterns expanded, each once; raises ConfigError with every name that does not."""
    known = sorted(manager.task_index)
    found = {name: fnmatch.filter(known, name) for name in names}
    if unknown := [name for name, matches in found.items() if not matches]:
        raise ConfigError(
            *(
                f"tasks: must be a task that lm-eval or --tasks-dir knows, got {name}. "
                f"{_suggest(name, known)}Use ceval-ppl, ceval-gen, cmmlu-ppl, cmmlu-gen, hellaswag, openbookqa, "
                "winogrande, arc_easy, arc_challenge, boolq, piqa, humaneval, or another task of lm-eval."
                for name in unknown
            )
        )
    return list(dict.fromkeys(name for matches in found.values() for name in matches))


def _suggest(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def list_leaves(manager: TaskManager, name: str) -> Iterator[_Leaf]:
    """The tasks of a task, group or tag. Tasks written in Python are left out: only they know what they read."""
    entry = manager.task_index.get(name)
    if entry is None or (entry.cfg or {}).get("class"):
        return
    members = sorted(entry.tags) if entry.yaml_path is None and entry.cfg is None else None
    if members is None and "group" in (entry.cfg or {}):
        members = [
            item if isinstance(item, str) else item.get("task", item.get("group"))
            for item in (entry.cfg or {}).get("task") or []
        ]
    if members is None:
        yield _Leaf(name, entry.cfg or {})
    for member in members or ():
        if isinstance(member, str):
            yield from list_leaves(manager, member)


def require_data(leaves: Sequence[_Leaf], data_dir: Path | None, num_fewshot: int) -> None:
    """Raise DataError unless every task has the questions that it asks, and those of its examples."""
    problems = []
    for leaf in leaves:
        config = leaf.config
        dataset, subset = config.get("dataset_path"), config.get("dataset_name")
        if dataset is None or dataset in PACKAGED or Path(dataset).is_dir() or config.get("custom_dataset"):
            continue
        splits = [config.get("test_split") or config.get("validation_split")]
        if num_fewshot and config.get("num_fewshot") != 0:
            own = config.get("fewshot_split") or (config.get("fewshot_config") or {}).get("split")
            splits.append(own or config.get("training_split") or config.get("validation_split"))
        try:
            folder = require_folder(data_dir, dataset)
            for split in dict.fromkeys(filter(None, splits)):
                if not find_split(folder, dataset, subset, split):
                    problems.append(
                        f"{folder}: must have split {split} of {' '.join(filter(None, (dataset, subset)))} for task "
                        f"{leaf.name}, got no such file. Copy the published data, or drop the task."
                    )
        except DataError as error:
            problems += error.problems
    problems = list(dict.fromkeys(problems))
    if len(problems) > PROBLEMS_SHOWN:
        more = f"{len(problems) - PROBLEMS_SHOWN} more splits are missing for these tasks. See those above."
        problems = [*problems[:PROBLEMS_SHOWN], more]
    if problems:
        raise DataError(*problems)
