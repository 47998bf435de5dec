"""Files that a disk, a cut-off transfer or an attacker has changed: every reader answers, or refuses with a sentence.

hypothesis draws the changes: bits, cuts, repeated and inserted bytes, numbers of all widths, and JSON values of other
types. HOSTILE_EXAMPLES sets how many for each reader (default 25).
"""

import contextlib
import io
import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hammer.checkpoint.hugging_face.folder import open_hf_folder
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.cli import compare_runs, inspect_checkpoint, inspect_data, preprocess_data
from megatron_hammer.config.saved_run import read_saved_run
from megatron_hammer.errors import HammerError
from megatron_hammer.scaling.metrics_file import read_metrics
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.training.fingerprints import read_file
from megatron_hammer.training.metrics import drop_lines_from
from megatron_hammer.training.supervision.bad_steps import read_skipped
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_hf_folder import write_toy_folder
from tests.helpers.toy_legacy_checkpoint import llama_weights, write_legacy_checkpoint
from tests.helpers.toy_tokenizer import train_toy_tokenizer, write_jsonl, write_llama_folder

NUM_EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "25"))
MOST_MEMORY_BYTES = 2 << 30  # beside what the process has: a size in a file must not decide what is allocated
JSON_VALUE = re.compile(rb'(?<=[:\[, ])(-?\d+(\.\d+)?|"[^"]{0,40}"|true|false|null)')
ODD_VALUES = (
    *(b"0", b"-1", b"1e400", b"NaN", b"-Infinity", b"9" * 30, b"2147483648", b"18446744073709551616", b"1.5"),
    *(b"null", b"true", b'"x"', b'""', b"[]", b"{}", b"[[[[]]]]", b'"\\ud800"'),
)
ODD_INTEGERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)

Change = Callable[[bytes], bytes]
Read = Callable[[Path], Any]
# Each reader with the files that are changed, one at a time.
READERS: dict[str, tuple[tuple[str, ...], Read]] = {
    "pair": (("pair.idx", "pair.bin", "pair.manifest.json"), lambda root: inspect_data.main([f"{root}/pair"])),
    "pair, every byte": (
        ("pair.idx", "pair.bin", "pair.manifest.json"),
        lambda root: inspect_data.main([f"{root}/pair", "--verify"]),
    ),
    "text": (
        ("text.jsonl",),
        lambda root: preprocess_data.main(
            [
                *("--input", f"{root}/text.jsonl", "--tokenizer-model", f"{root}/toy.model", "--workers", "1"),
                *("--output-prefix", f"{root}/out", "--restart"),
            ]
        ),
    ),
    "SentencePiece model": (("toy.model",), lambda root: load_encoder(root / "toy.model").encode("what is it")),
    "tokenizer folder": (
        ("llama/tokenizer_config.json", "llama/special_tokens_map.json", "llama/added_tokens.json"),
        lambda root: load_encoder(root / "llama").encode("what is it"),
    ),
    "model folder": (("hf/config.json", "hf/model.safetensors"), lambda root: open_hf_folder(root / "hf")),
    "torch_dist": (
        (
            *("dist/iter_0000010/.metadata", "dist/iter_0000010/__0_0.distcp", "dist/iter_0000010/metadata.json"),
            "dist/latest_checkpointed_iteration.txt",
        ),
        lambda root: read_all(root / "dist"),
    ),
    "legacy checkpoint": (
        ("legacy/iter_0000010/mp_rank_00/model_optim_rng.pt", "legacy/latest_checkpointed_iteration.txt"),
        lambda root: read_all(root / "legacy"),
    ),
    "saved run": (("dist/iter_0000010/.metadata",), lambda root: read_saved_run(root / "dist" / "iter_0000010")),
    "inspection": (("dist/iter_0000010/.metadata",), lambda root: inspect_checkpoint.main([f"{root}/dist"])),
    "metrics": (
        ("metrics.jsonl",),
        lambda root: compare_runs.main(["--runs", f"a={root}/metrics.jsonl", f"b={root}/metrics.jsonl"]),
    ),
    "metrics of a study": (("metrics.jsonl",), lambda root: read_metrics(root / "metrics.jsonl", "step", "loss")),
    "metrics of a resumed run": (("metrics.jsonl",), lambda root: drop_lines_from(root / "metrics.jsonl", 3)),
    "skipped batches": (("skipped.jsonl",), lambda root: read_skipped(root / "skipped.jsonl")),
    "fingerprints": (("fingerprints.jsonl",), lambda root: read_file(root / "fingerprints.jsonl")),
}


def read_all(directory: Path) -> None:
    reader = open_checkpoint(directory)
    for name in reader.tensors:
        reader.read(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind, in order."""
    folder = tmp_path_factory.mktemp("hostile")
    train_toy_tokenizer(folder).rename(folder / "toy.model")
    write_llama_folder(folder / "llama", folder / "toy.model", 100)
    write_jsonl(folder / "text.jsonl", ["what is it", "", "it is what it is"] * 3)
    options = ("--tokenizer-model", f"{folder}/toy.model", "--output-prefix", f"{folder}/written", "--workers", "1")
    preprocess_data.main(["--input", f"{folder}/text.jsonl", *options])
    for path in folder.glob("written_text_document.*"):
        path.rename(folder / f"pair{path.name.removeprefix('written_text_document')}")
    write_toy_folder(folder / "hf")
    write_toy_checkpoint(folder / "dist", toy_llama_tensors())
    write_legacy_checkpoint(folder / "legacy", llama_weights())
    steps = [{"step": step, "loss": 3.5, "grad_norm": 1.0, "step_time_s": 0.1} for step in range(1, 6)]
    skipped = [{"step": step, "num_samples": 8 * step, "reason": "rank 0"} for step in (3, 4)]
    hashes = [{"step": 1, "batch": {"0.tokens": 5}, "gradients": {"w": 6}, "weights": {"w": 7}}] * 2
    for name, lines in (("metrics", steps), ("skipped", skipped), ("fingerprints", hashes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def flip(at: int, bit: int) -> Change:
    return lambda data: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def replace(at: int, length: int, inserted: bytes) -> Change:
    return lambda data: data[:at] + inserted + data[at + length :]


def repeat(at: int, length: int) -> Change:
    return lambda data: data[: at + length] + data[at:]


def write_integer(at: int, value: int, width: int) -> Change:
    return replace(at, width, value.to_bytes(8, "little")[:width])


def replace_value(index: int, value: bytes) -> Change:
    """The value of a JSON text with this number, if it has one."""

    def change(data: bytes) -> bytes:
        places = list(JSON_VALUE.finditer(data))
        if not places:
            return data
        place = places[index % len(places)]
        return data[: place.start()] + value + data[place.end() :]

    return change


def list_changes(size: int) -> st.SearchStrategy[Change]:
    at = st.integers(0, max(0, size - 1))
    length = st.sampled_from([0, 1, 2, 8, 64])
    return st.one_of(
        st.builds(flip, at, st.integers(0, 7)),
        st.builds(replace, at, st.just(size), st.just(b"")),  # cut off
        st.builds(replace, at, length, st.binary(max_size=8)),
        st.builds(repeat, at, length),
        st.builds(write_integer, at, st.sampled_from(ODD_INTEGERS), st.sampled_from([4, 8])),
        st.builds(replace_value, st.integers(0, 10_000), st.sampled_from(ODD_VALUES)),
    )


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + MOST_MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name: str, root: Path) -> None:
    files, read = READERS[name]

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize="HOSTILE_EXAMPLES" not in os.environ,  # the default run is the same for everybody
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path = root / data.draw(st.sampled_from(files), label="file")
        content = path.read_bytes()
        changed = content
        for change in data.draw(st.lists(list_changes(len(content)), min_size=1, max_size=3), label="changes"):
            with contextlib.suppress(IndexError):  # a cut before it has taken the place away
                changed = change(changed)
        path.write_bytes(changed)
        output, code = io.StringIO(), 0
        try:
            with limited_memory(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                read(root)
        except HammerError:
            pass
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            path.write_bytes(content)
        assert code in (0, 1, 2)  # of a command: 1 is its verdict, 2 a sentence on stderr
        assert code != 2 or "error: " in output.getvalue()
        assert "Traceback" not in output.getvalue()

    check()
