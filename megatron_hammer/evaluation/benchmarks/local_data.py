"""Benchmark data from local folders, in the layouts in which it is published. Nothing is ever fetched.

--data-dir holds one folder per dataset: the authors' archive, unpacked, or a copy of the dataset's repository on the
hub. Of a folder, only the names of files count: each name, with those of its folders, says split and subset.
`serve_local_data` puts this in the place of `datasets.load_dataset` while lm-eval builds its tasks.
"""

import contextlib
import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.corpus.json_records import BadRecordError, parse_json_object
from megatron_hammer.errors import DataError
from megatron_hammer.files.read import read_bytes, read_text

# By dataset: names of the authors' archives that are not the dataset's own.
PUBLISHED_FOLDERS = {
    "ceval/ceval-exam": ("ceval",),
    "haonan-li/cmmlu": ("cmmlu_v1_0_1",),
    "allenai/ai2_arc": ("arc", "ARC-V1-Feb2018", "ARC-V1-Feb2018-2"),
    "allenai/openbookqa": ("OpenBookQA-V1-Sep2018",),
    "allenai/winogrande": ("winogrande_1.1",),
    "aps/super_glue": ("SuperGLUE",),
    "baber/piqa": ("physicaliqa-train-dev",),
}
# What a split may be called in names of files. C-Eval has both val and dev, so val is never read from dev.
SPLIT_WORDS = {
    "validation": ("validation", "valid", "val", "dev"),
    "val": ("val", "valid", "validation"),
    "valid": ("valid", "val", "validation"),
}
SUFFIXES = (".parquet", ".jsonl", ".csv")  # the best first: some archives hold the same questions in several
PACKAGED = ("json", "csv", "parquet", "text", "arrow")  # readers of `datasets`, for local files that a task names
_WORD = "train|dev|validation|valid|val|test"
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
_NEUTRAL = {"data", "main", "default"}


@dataclass(frozen=True, slots=True)
class _DataFile:
    """labels: what its name and folders say beside the split, in canonical form. series: equal for shards of one."""

    path: Path
    split: str
    labels: frozenset[str]
    series: tuple[str, str]


class LocalDataset(dict[str, Any]):
    """The splits of one dataset, read when they are first asked for: {split: datasets.Dataset}; see `find_split`.

    A split that is not there is an empty one: tasks ask for the examples of prompts also where they need none.
    `tasks.py` refuses a task without the splits that it needs.
    """

    def __init__(self, data_dir: Path, dataset: str, subset: str | None):
        super().__init__()
        self.source = data_dir, dataset, subset

    def __missing__(self, split: str) -> Any:
        from datasets import Dataset

        rows = [row for path in find_split(*self.source, split) for row in read_rows(path)]
        self[split] = Dataset.from_list(rows)
        return self[split]


@contextlib.contextmanager
def serve_local_data(data_dir: Path | None) -> Iterator[None]:
    """Have lm-eval's tasks find their data under `data_dir`, instead of on the hub."""
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path in PACKAGED or Path(path).is_dir():
            return original(path, name, **options)
        return LocalDataset(require_folder(data_dir, path), path, name)

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def require_folder(data_dir: Path | None, dataset: str) -> Path:
    """`data_dir`, if it is given; raises DataError."""
    if data_dir is None:
        raise DataError(f"data-dir: must be given for {dataset}, since nothing is fetched, got none. Pass --data-dir.")
    return data_dir


def find_split(data_dir: Path, dataset: str, subset: str | None, split: str) -> list[Path]:
    """The files of a split, in order; none where it is not there.

    dataset: as on the hub, owner/name. subset: of it, such as a subject. Raises DataError if the dataset has no folder,
    or if several files could be the split.
    """
    folder = find_folder(data_dir, dataset, subset)
    files = list_data_files(folder)
    wanted = _canonical(subset or "")
    own = {_canonical(name) for name in _name_folders(dataset, None)} | _NEUTRAL
    for word in SPLIT_WORDS.get(split, (split,)):
        of_split = [file for file in files if file.split == word]
        # winogrande_xl is train_xl.jsonl in the archive.
        named = [file for file in of_split if wanted and any(wanted in (x, *(n + x for n in own)) for x in file.labels)]
        found = named or [file for file in of_split if file.labels <= own | ({wanted} if subset else set())]
        for suffix in SUFFIXES:
            if best := [file for file in found if file.path.suffix == suffix]:
                if len({file.series for file in best}) > 1:
                    names = ", ".join(str(file.path.relative_to(folder)) for file in best[:4])
                    raise DataError(
                        f"{folder}: must have one file for split {split} of {subset or dataset}, got {names}. "
                        "Keep one of them."
                    )
                return [file.path for file in best]
    return []


def find_folder(data_dir: Path, dataset: str, subset: str | None) -> Path:
    """The folder of a dataset in `data_dir`; raises DataError with the names that it may have."""
    names = _name_folders(dataset, subset)
    wanted = [_canonical(name) for name in names]
    if (data_dir / dataset).is_dir():
        return data_dir / dataset
    try:
        entries = sorted(data_dir.iterdir())
    except OSError as error:
        raise DataError(f"data-dir: must be a folder, got {data_dir}: {error.strerror}. Check the path.") from error
    found = [entry for entry in entries if entry.is_dir() and _canonical(entry.name) in wanted]
    if not found:
        archives = [entry.name for entry in entries if entry.suffix in (".zip", ".gz", ".tar", ".tgz")]
        remedy = f"Unpack {archives[0]}" if archives else "Copy the published data there; docs/evaluation.md lists it"
        raise DataError(
            f"{data_dir}: must have a folder of dataset {dataset}, called {' or '.join(dict.fromkeys(names))}, got "
            f"{', '.join(entry.name for entry in entries[:8]) or 'nothing'}. {remedy}."
        )
    return min(found, key=lambda entry: wanted.index(_canonical(entry.name)))


def _name_folders(dataset: str, subset: str | None) -> list[str]:
    """ai2_arc, allenai__ai2_arc, the archive's names, and ARC-Easy where only that subset was copied."""
    owner, _, name = dataset.rpartition("/")
    names = [name, f"{owner}__{name}" if owner else name, *PUBLISHED_FOLDERS.get(dataset, ())]
    return [*names, subset] if subset and subset not in _NEUTRAL else names


def list_data_files(folder: Path) -> list[_DataFile]:
    """Every file of a split at any depth."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES)
    return [file for path in paths if (file := _describe(path, folder)) is not None]


def _describe(path: Path, folder: Path) -> _DataFile | None:
    """ARC-Easy/ARC-Easy-Test.jsonl is split test with the label arceasy; None if no name says the split."""
    *parents, name = path.relative_to(folder).parts
    stem = _SHARD.sub("", name.removesuffix(path.suffix))
    labels, splits = [], []
    for part in (*parents, stem):
        match = re.fullmatch(rf"(?:(.+)[-_])?({_WORD})(?:[-_](.+))?", part, re.IGNORECASE)
        if match:
            splits.append(match[2].lower())
        labels += [text for text in (match.group(1, 3) if match else (part,)) if text]
    if not splits:
        return None
    series = "/".join((*parents, stem)), path.suffix
    # The file's own name counts more than a folder's.
    return _DataFile(path, splits[-1], frozenset(map(_canonical, labels)), series)


def _canonical(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The questions of one file, with the hub's names of fields. Raises DataError with path and line."""
    readers: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".parquet": _read_parquet, ".jsonl": _read_json_lines, ".csv": _read_csv,
    }  # fmt: skip
    rows = readers[path.suffix](path)
    labels_path = path.with_name(f"{path.stem}-labels.lst")  # PIQA's answers lie beside its questions
    if labels_path.is_file() and rows and not {"label", "answer"} & rows[0].keys():
        labels = read_text(labels_path).split()
        if len(labels) != len(rows):
            raise DataError(
                f"{labels_path}: must have a line for each question of {path.name}, got {len(labels)} for {len(rows)}. "
                "Copy both files again."
            )
        rows = [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]
    return [_rename_fields(row) for row in rows]


def _rename_fields(row: dict[str, Any]) -> dict[str, Any]:
    """ARC's and OpenBookQA's nested questions and BoolQ's true and false, as the hub has them."""
    question = row.get("question")
    if isinstance(question, dict):
        choices = question.get("choices", [])
        texts = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
        stem = question.get("stem")
        return {**row, "question": stem, "question_stem": stem, "choices": texts}
    if "passage" in row and isinstance(row.get("answer"), bool):
        return {**row, "label": int(row["answer"])}
    return {**row, "label": int(row["label"])} if isinstance(row.get("label"), bool) else row


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            if line.strip():
                rows.append(parse_json_object(line))
        except BadRecordError as error:
            raise DataError(f"{path}:{number}: {error}") from error
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(), which breaks a cell at U+2028 too.
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    header = next(reader, [])
    rows = []
    for cells in filter(None, reader):  # without empty lines
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{reader.line_num}: must have {len(header)} cells, got {len(cells)}. Copy the file again."
            )
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: must be a Parquet file, got: {error}. Copy the file again.") from error
    return rows
