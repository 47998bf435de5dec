"""What a command did, as lines of text that two recordings can be compared by: for compare_revisions.py.

Of messages, facts (numbers, flags, names, paths) are kept apart from wording, since sentences may be improved where
results may not. Of files: text as it is; tensors by name, shape and hash, whatever pickle or chunk they are in; other
files by hash. Absolute paths, elapsed times and memory are left out.

Stored classes are imported from torch, numpy and the standard containers only. An object of any other class, such as
megatron's enumerations, is shown as the name of its class and its state.
"""

import argparse
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

Lines = list[str]
Kind = Literal["messages", "run", "data"]
PART = "@@ "  # begins the line that names a part of a recording: a stream or a file

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".toml", ".txt")
PROSE_SUFFIXES = (".md", ".html", ".sh", ".sbatch", ".yaml")
TENSOR_SUFFIXES = (".safetensors", ".pt", "pytorch_model.bin")
# What training writes for people (times, memory, a plot of both), and the chunks that .metadata leads to.
LEFT_OUT = re.compile(r"(^|/)(logs/.*|output\.txt|loss\.png|[^/]*\.distcp)$")
VARYING_FIELDS = ("elapsed_s",)
VARYING_METRICS = (  # of metrics.jsonl; in a projection, fields of these names are results
    *("step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu", "eta_s"),
    *("peak_memory_bytes", "save_time_s"),
)
ELAPSED = re.compile(r"[\d.,]+ s(, [\d.,]+ MB/s)?( since it was continued)?$", re.MULTILINE)
NOISE = re.compile(r"^(set-up: |[WE]\d{4} |.*Warning: |\s+warnings\.warn).*\n?", re.MULTILINE)
# A word of a message that is not English: a number, a flag, a name with its value, a path, the field before a colon.
FACT = re.compile(r"[^\s\"'()\[\]|,;│─]*(?:[\d=_/]|--|:(?=\s))[^\s\"'()\[\]|,;│─]*")
LARGEST_TEXT_BYTES = 40_000
PLAIN_MODULES = ("torch", "numpy", "collections", "builtins", "argparse", "_codecs")
LONG_LIST = 50  # of numbers: the state of a random generator


# --- messages --------------------------------------------------------------------------------------------------------


def describe_stream(name: str, text: str, kind: Kind) -> tuple[Lines, Lines]:
    """(facts, wording) of what a command printed. JSON and CSV are facts, except the sentences in JSON.

    kind: "run" is a training run, whose lines have speeds and times; its results are in files. "data" is all fact.
    """
    text = NOISE.sub("", ELAPSED.sub("<time>", text))
    if kind == "data":
        return [f"{PART}{name}", *text.splitlines()], []
    if kind == "run":
        return [], [f"{PART}{name}, words", *sorted(set(re.findall(r"[A-Za-z]{4,}", text)))]
    document = parse_json(text)
    if document is not None:
        sentences: Lines = []
        facts = format_json(take_sentences(document, sentences))
        return [f"{PART}{name}, JSON", *facts], [f"{PART}{name}, sentences", *sentences]
    header, _, rows = text.partition("\n")
    if header.count(",") > 5 and " " not in header and rows:
        return [f"{PART}{name}, CSV", *text.splitlines()], []
    return [f"{PART}{name}", *list_facts(text)], [f"{PART}{name}", *text.splitlines()]


def list_facts(text: str) -> Lines:
    """The words of each line that a rewording must keep, sorted: their order in a sentence is free."""
    lines = (" ".join(sorted(word.strip(".:") for word in FACT.findall(line))) for line in text.splitlines())
    return [line for line in lines if line]


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def take_sentences(value: Any, sentences: Lines) -> Any:
    """The value with the facts of each string of several words in its place; the strings go to `sentences`."""
    if isinstance(value, dict):
        return {key: take_sentences(item, sentences) for key, item in value.items()}
    if isinstance(value, list):
        return [take_sentences(item, sentences) for item in value]
    if isinstance(value, str) and value.count(" ") > 2:
        sentences.append(value)
        return list_facts(value)
    return value


def format_json(document: Any, varying: Sequence[str] = VARYING_FIELDS) -> Lines:
    """One value a line, with all digits, without the fields that vary from run to run."""
    return json.dumps(drop_fields(document, varying), indent=1, ensure_ascii=False).splitlines()


def drop_fields(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: drop_fields(item, names) for key, item in value.items() if key not in names}
    return [drop_fields(item, names) for item in value] if isinstance(value, list) else value


# --- files -----------------------------------------------------------------------------------------------------------


def describe_file(path: Path, name: str, normalize: Callable[[str], str]) -> tuple[Lines, Lines]:
    """(facts, wording) of a file that a command wrote."""
    if LEFT_OUT.search(name):
        return [], []
    is_text = path.suffix in DATA_SUFFIXES + PROSE_SUFFIXES
    if path.name == ".metadata":
        facts = describe_torch_dist(path.parent)
    elif path.suffix == ".safetensors":
        facts = describe_safetensors(path)
    elif path.name.endswith(TENSOR_SUFFIXES):
        facts = list(describe_value("", read_pickled(path)))
    elif is_text and path.stat().st_size < LARGEST_TEXT_BYTES:
        text = normalize(path.read_text(encoding="utf-8"))
        if path.suffix in PROSE_SUFFIXES:
            return [f"{PART}{name}", *list_facts(text)], [f"{PART}{name}", *text.splitlines()]
        varying = VARYING_METRICS if path.name == "metrics.jsonl" else VARYING_FIELDS
        facts = describe_data(text, is_json_lines=path.suffix == ".jsonl", varying=varying)
    else:
        facts = [f"{path.stat().st_size} bytes, sha256 {hash_bytes(path.read_bytes())}"]
    return [f"{PART}{name}", *map(normalize, facts)], []


def describe_data(text: str, *, is_json_lines: bool, varying: Sequence[str]) -> Lines:
    """The lines of a text; of JSON its values, and a hash of its bytes unless some of them vary."""
    documents = [parse_json(part) for part in (text.splitlines() if is_json_lines else [text])]
    if None in documents or not documents:
        return text.splitlines()
    is_stable = drop_fields(documents, varying) == documents
    hashes = [f"sha256 {hash_bytes(text.encode())}"] if is_stable else []
    return [*hashes, *(line for document in documents for line in format_json(document, varying))]


def describe_safetensors(path: Path) -> Lines:
    from safetensors.torch import load_file

    return [f"sha256 {hash_bytes(path.read_bytes())}", *describe_value("", load_file(path))]


# --- stored values ---------------------------------------------------------------------------------------------------


class StandIn:
    """An object of a class that is not imported."""

    class_name = ""
    state: list[Any]

    def __new__(cls, *arguments: Any, **keywords: Any) -> "StandIn":
        made = super().__new__(cls)
        made.state = [*arguments, *keywords.items()]
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)

    def __repr__(self) -> str:
        return f"{self.class_name}{self.state}"


class PlainUnpickler(pickle.Unpickler):
    """Imports the classes of PLAIN_MODULES only."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in PLAIN_MODULES:
            return super().find_class(module, name)
        return type(name, (StandIn,), {"class_name": f"{module}.{name}"})


def read_pickled(source: Path | io.BytesIO) -> Any:
    """What torch.save wrote."""
    import torch

    module = SimpleNamespace(__name__="plain", Unpickler=PlainUnpickler, load=pickle.load)
    return torch.load(source, map_location="cpu", weights_only=False, pickle_module=module)


def describe_torch_dist(folder: Path) -> list[str]:
    """Lines for every tensor and value of a torch_dist checkpoint, whatever file and chunk of it they are in."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = checkpoint.FileSystemReader(folder)
    metadata = reader.read_metadata()
    entries = metadata.state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    lines = list(describe_value("", tensors))
    for key in tensors:
        boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entries[key].chunks)
        lines.append(f"{key} in {len(boxes)} chunks: {hash_bytes(repr(boxes).encode())[:16]}")
    for index, stored in metadata.storage_data.items():
        if index.fqn not in tensors:
            with (folder / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                content = io.BytesIO(file.read(stored.length))
            lines += describe_value(index.fqn, read_pickled(content))
    return sorted(lines)


def describe_value(name: str, value: Any) -> Iterator[str]:
    """A line for each leaf; order of keys does not matter."""
    import numpy as np
    import torch

    if isinstance(value, StandIn):
        yield f"{name} of class {value.class_name}"
        value = value.state
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield from describe_value(f"{name}.{key}" if name else str(key), value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{name}: {type(value).__name__} of {len(value)}"
        if len(value) > LONG_LIST and all(isinstance(item, (int, float)) for item in value):
            yield f"{name}: {hash_bytes(repr(value).encode())}"
            return
        for number, item in enumerate(value):
            yield from describe_value(f"{name}[{number}]", item)
    elif isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().flatten()
        content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        yield f"{name}: {value.dtype} {tuple(value.shape)} {hash_bytes(content)}"
    elif isinstance(value, np.ndarray):
        yield f"{name}: {value.dtype} {value.shape} {hash_bytes(value.tobytes())}"
    elif isinstance(value, io.BytesIO):
        yield f"{name}: bytes {hash_bytes(value.getvalue())}"
    else:
        yield f"{name} = {value!r}"


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
