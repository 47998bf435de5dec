"""run/ under --save: with which arguments, versions, code, data and environment each start of a run was made.

`hammer pretrain --from-run DIR --save NEW` repeats the run from there, and says what is different now.
"""

import contextlib
import datetime
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.config.own_flags import read_option
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.training.supervision.progress import ATTEMPT_VARIABLE

RUN_DIR = "run"
FROM_RUN = "--from-run"
_GIT_TIMEOUT_S = 20
_MAX_DIFF_BYTES = 4 << 20
# An allowed list is the only safe one: secrets have any name. Those that libraries read are in read_variables().
_PLACES = re.compile(
    r"SLURM_(JOB_ID|JOB_NAME|NNODES|JOB_NODELIST|NTASKS\w*)|MASTER_(ADDR|PORT)|(LOCAL_)?WORLD_SIZE|NNODES"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
# They say where a run writes, and may not be repeated.
_OUTPUTS = (
    *("--save", "--metrics-path", "--prometheus-file", "--tensorboard-dir", "--wandb-save-dir"),
    *("--non-persistent-global-ckpt-dir", "--non-persistent-local-ckpt-dir"),
)


def describe_start(arguments: Sequence[str], data: Mapping[str, str]) -> dict[str, Any]:
    """What run/ holds of a start. arguments: of training. data: identities of its data files by prefix."""
    from megatron_hammer.training.cluster.software import read_variables, read_versions

    environment = {**{name: value for name, value in os.environ.items() if _PLACES.fullmatch(name)}, **read_variables()}
    return {
        "arguments": list(arguments),
        "directory": os.getcwd(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "attempt": int(os.environ.get(ATTEMPT_VARIABLE, "0")),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "python": sys.executable,
        "versions": read_versions(None),
        "code": read_code_state(Path(__file__).parent),
        "data": dict(data),
        "environment": {name: value for name, value in sorted(environment.items()) if not _SECRET.search(name)},
    }


def write_start(save_dir: Path, start: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Add a start to `save_dir`: start-TIME.json, and the whole configuration with every default beside it.

    config: Megatron's arguments by name. Raises OutputError if the folder cannot be written.
    """
    stem = re.sub(r"[^0-9T]", "", start["time"].split("+")[0])
    folder = save_dir / RUN_DIR
    text = json.dumps(dict(config), indent=2, sort_keys=True, default=str)
    files = {
        folder / f"start-{stem}.json": json.dumps(start, indent=2) + "\n",
        folder / f"config-{stem}.json": text + "\n",
    }
    if start["code"] is not None and start["code"]["is_changed"]:
        files[folder / f"changes-{stem}.diff"] = read_diff(Path(__file__).parent)
    publish_files(files)


def read_code_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether files were changed since, of the clone that the package is imported from; None for a wheel."""
    commit = _run_git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _run_git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "is_changed": bool(status)}


def read_diff(directory: Path) -> str:
    return (_run_git(directory, "diff", "HEAD") or "")[:_MAX_DIFF_BYTES]


def _run_git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout if result.returncode == 0 else None


def repeat_run(arguments: Sequence[str]) -> list[str]:
    """`arguments` with those of the run that --from-run names before them; unchanged without it.

    Says on stderr what is different now (only rank 0). Raises ConfigError if there is no such run, or no new --save.
    """
    source = read_option(arguments, FROM_RUN)
    if source is None:
        return list(arguments)
    if read_option(arguments, "--save") is None:
        raise ConfigError(
            f"save: must be given with --from-run, because {source} would be continued, got none. Pass --save NEW."
        )
    if os.environ.get("RANK", "0") == "0":
        for line in list_differences(read_newest_start(Path(source))):
            print(f"note: {line}", file=sys.stderr)
    return expand_from_run(arguments)


def expand_from_run(arguments: Sequence[str]) -> list[str]:
    """What `repeat_run` returns, without its words. Raises ConfigError if there is no such run."""
    source = read_option(arguments, FROM_RUN)
    if source is None:
        return list(arguments)
    return [*_drop_outputs(read_newest_start(Path(source))), *_drop(arguments, FROM_RUN)]


def read_newest_start(source: Path) -> dict[str, Any]:
    """Of a folder that a run saved into, or of one start-TIME.json in its run/. Raises ConfigError.

    Of a folder, it is the newest one of a user: where the launcher has started the ranks again, they did not begin as
    the run did.
    """
    files = [source] if source.is_file() else sorted((source / RUN_DIR).glob("start-*.json"))
    if not files:
        raise ConfigError(
            f"from-run: must be a folder that a run has saved into, got {source} without {RUN_DIR}/start-*.json. "
            "Pass the folder of its --save."
        )
    starts = []
    for path in reversed(files):
        start = _read_start(path)
        if start.get("attempt", 0) == 0:
            return start
        starts.append(start)
    return starts[0]


def _read_start(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        start = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(word, str) for word in start["arguments"]):
            return dict(start)
    raise ConfigError(f"from-run: must be a start of a run, got {path}, which is none. Pass an earlier one.")


def list_differences(start: Mapping[str, Any]) -> list[str]:
    """What may make the repeated run another one, one sentence each."""
    now = describe_start([], {})
    lines = []
    for name in ("directory", "world_size"):
        if start.get(name) != now[name]:
            lines.append(f"{name} was {start.get(name)} and is {now[name]}")
    code, code_now = start.get("code") or {}, now["code"] or {}
    if code.get("commit") != code_now.get("commit"):
        lines.append(f"the code was commit {code.get('commit')} and is {code_now.get('commit')}")
    if code.get("is_changed") or code_now.get("is_changed"):
        lines.append(f"the code had changes beyond its commit: {bool(code.get('is_changed'))}, now: "
                     f"{bool(code_now.get('is_changed'))}")  # fmt: skip
    for kind in ("versions", "environment"):
        before, after = start.get(kind) or {}, now[kind]
        for name in sorted({*before, *after}):
            is_place = kind == "environment" and _PLACES.fullmatch(name)
            if before.get(name) != after.get(name) and not is_place:
                lines.append(f"{name} was {before.get(name)} and is {after.get(name)}")
    return lines


def _drop_outputs(start: Mapping[str, Any]) -> list[str]:
    """The arguments without where the run wrote, and without resuming from there."""
    arguments = start["arguments"]
    # realpath, since one folder may have two names.
    save, load = (
        None if path is None else os.path.realpath(os.path.join(start.get("directory", ""), path))
        for path in (read_option(arguments, "--save"), read_option(arguments, "--load"))
    )
    names = _OUTPUTS if load != save else (*_OUTPUTS, "--load")
    kept = list(arguments)
    for name in names:
        kept = _drop(kept, name)
    return kept


def _drop(arguments: Sequence[str], name: str) -> list[str]:
    """Without an option and its value."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == name:
            next(words, None)
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept
