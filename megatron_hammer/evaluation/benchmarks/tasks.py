"""Which tasks are run: lm-eval's own by name, ours (exams.py, human_eval.py), and the user's files in --tasks-dir.

Importing this loads lm-eval, so offline.py comes first.
"""

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_hammer.errors import ConfigError, DataError, HammerError
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
    limit: int | None = None,
) -> dict[str, Any]:
    """lm-eval's tasks and groups by name, with their data, as its `evaluate` takes them.

    names: of tasks, groups or tags, or patterns such as ceval-ppl_high_*. runs_code: whether code that the model writes
    may be run. limit: questions of each task. Raises ConfigError and DataError with every task that is unknown, lacks
    data, or has a question that does not fit it.
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
        except HammerError:
            raise
        except Exception as error:  # whatever a user's file or data make lm-eval, Jinja, datasets or its code raise
            if "Duplicate task" in str(error):
                raise ConfigError(f"tasks: must name each task once, got: {error}. Drop one of the two.") from error
            culprit = next((leaf.name for leaf in leaves if not _can_load(manager, leaf.name)), ", ".join(selected))
            raise ConfigError(
                f"task {culprit}: lm-eval must load it, got {_describe(error)}. Correct its file or its data."
            ) from error
    if max_new_tokens is not None and not any(
        task.OUTPUT_TYPE == "generate_until" for task in loaded["tasks"].values()
    ):
        raise ConfigError(
            f"max-new-tokens: is for tasks that generate, got {max_new_tokens} without one. Drop it, or add such a "
            "task."
        )
    for task in loaded["tasks"].values():
        # As lm-eval's command does: a task that fixes 0 examples keeps them.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
    require_questions(loaded["tasks"], limit)
    return dict(loaded)


def _can_load(manager: TaskManager, name: str) -> bool:
    try:
        manager.load([name])
    except Exception:
        return False
    return True


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'nothing').splitlines()[0].rstrip('.')}"


def require_questions(tasks: Mapping[str, Any], limit: int | None) -> None:
    """Raise DataError unless every question fills the templates of its task, and has its answer among its choices.

    lm-eval would stop in the middle, or count a question with an unknown answer as wrong.
    """
    problems = []
    for name, task in tasks.items():
        if not isinstance(task, ConfigurableTask):  # written in Python: only it knows its questions
            continue
        number, num_fewshot = 0, task.get_config("num_fewshot") or 0
        num_examples = len(task.sampler.df) if num_fewshot else 0
        if num_examples < num_fewshot:
            problems.append(
                f"num-fewshot: task {name} has {num_examples} examples, got num_fewshot={num_fewshot}. Pass fewer."
            )
            continue
        try:
            for number, doc in enumerate(itertools.islice(task.eval_docs, limit), start=1):
                if number == 1:
                    task.fewshot_context(doc, num_fewshot)
                _require_answer(task, doc)
        except Exception as error:  # of Jinja, or of the task's own code
            problems.append(
                f"task {name}: question {number} must fit the task, got {_describe(error)}. Correct the data."
            )
    if problems:
        raise DataError(*problems)


def _require_answer(task: Any, doc: Any) -> None:
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(doc)
    found = text if task.multiple_input else target
    for one in found if isinstance(found, list) else [found]:
        if one not in (choices if isinstance(one, str) else range(len(choices))):
            raise ValueError(f"the answer {one!r}, which is none of its {len(choices)} choices")


def find_tasks(names: Sequence[str], tasks_dir: Path | None) -> tuple[TaskManager, list[str]]:
    """An index of tasks that has all the names, and the names with patterns expanded.

    lm-eval's own index reads 15,000 files, which takes several seconds, so the usual tasks are looked for first.
    """
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise ConfigError(f"tasks-dir: must be a folder of lm-eval's task files, got {tasks_dir}. Check the path.")
    _require_readable([] if tasks_dir is None else sorted(tasks_dir.rglob("*.yaml")))
    root = Path(lm_eval.tasks.__file__).parent
    manager = build_manager(tasks_dir, [root / folder for folder in USUAL_FOLDERS])
    # Patterns may match more in the whole index, except those that only our own names begin as.
    if not all(name in manager.task_index or name.startswith(exams.GROUPS) for name in names):
        manager = build_manager(tasks_dir, [root / folder for folder in WHOLE_INDEX])
    return manager, select_names(manager, names)


def _require_readable(paths: Sequence[Path]) -> None:
    """Raise ConfigError for files that lm-eval would skip without a word, and with them the tasks that they define."""
    problems = []
    for path in paths:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of yaml, or of an include that is missing
            problems.append(f"{path}: must be a task file, got {' '.join(_describe(error).split())}. Correct it.")
    if problems:
        raise ConfigError(*problems)


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
