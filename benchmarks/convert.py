#!/usr/bin/env python3
"""Both converters against `cp` of the same bytes on the same disk: times as ratios, CPU time per GB, and peak memory.

    python benchmarks/convert.py --work-dir /big/disk --model 7b --rounds 3

A model of random bf16 weights in the shape of Llama 2 7B (13.5 GB; 1b: 1.6 GB) is made on the spot, as a Hugging Face
folder. A round is: cp of that folder, hf_to_megatron.py of it, cp of the checkpoint, megatron_to_hf.py of the
checkpoint, every second round the other way round. Each is a command of its own, from its start to its end, and then to
the end of `sync`, since what a command leaves in memory is still to be written; the ratios are of both. Before each
command everything is synced and the files that it reads leave the page cache (posix_fadvise), so that every side reads
from the disk; programs and libraries stay in it. `--warm` leaves the files there. Peak memory is the largest resident
set of any one process, file-backed maps included.

CPU time is user and system time of a command and its children. Start-up is the CPU time for a model of 0.3 MB, the
smaller of two; "CPU s per GB" is without it. Other work on the machine disturbs these least. The disk's own speed, with
1 GB written by one process up to fsync, and read again from the disk, is printed beside them.

The converters verify every tensor bit for bit (`--verify tensors`): each is read back from the written file through the
page cache and must be the source again. The import also hashes what it writes, and the export hashes what it reads
(SHA-256). In the end the exported folder must hold the weights that were made.

Prediction, written before the first run of the present code: 1.0 s of CPU per GB for both, 1.5 s of start-up, of which
torch is 1.3. Targets: 1 s and 1 s; 2 GiB plus the largest tensor (262 MB).
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "checkpoint_convert"
POOL_ELEMENTS = 1 << 26
DISK_BYTES, DISK_BLOCK_BYTES = 1_000_000_000, 1 << 20

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "toy": (96, 136, 3, 12, 4, 501),
    "1b": (2048, 5632, 8, 32, 4, 105789),  # hammer-1b4 with 8 layers
    "7b": (4096, 11008, 32, 32, 32, 32000),  # Llama 2 7B
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One command: until it ended, until everything was on disk, and what it took."""

    name: str
    elapsed_s: float
    synced_s: float
    cpu_s: float
    peak_bytes: int


def build_config(model: str) -> dict[str, object]:
    hidden_size, intermediate_size, num_layers, num_heads, num_groups, vocab_size = SHAPES[model]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_groups,
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }


def write_model(model: str, folder: Path) -> int:
    """A Hugging Face folder of random weights, streamed; returns the bytes of its weights."""
    import torch

    from megatron_hammer.checkpoint.hugging_face.config_json import read_hf_model
    from megatron_hammer.checkpoint.hugging_face.family import expand
    from megatron_hammer.checkpoint_files.safetensors.shard_writer import ShardWriter, plan_shards

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(build_config(model), indent=2))
    described = read_hf_model(folder)
    pairs = expand(described.family, described.shape)
    shapes = {name: shape for pair in pairs for name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)}
    shards = plan_shards(shapes, dtype=torch.bfloat16, max_shard_bytes=5_000_000_000)
    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    with ShardWriter(folder, shards) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            numel = math.prod(shape)
            shifted = pool.roll(7919 * number)  # no two tensors alike
            writer.write(name, shifted.repeat(math.ceil(numel / POOL_ELEMENTS))[:numel].view(shape))
    return sum(math.prod(shape) * 2 for shape in shapes.values())


def leave_page_cache(folder: Path) -> None:
    """Have every file of the folder on disk only."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_apart(function: str, *arguments: object) -> int:
    """Call a function of this file in a process of its own.

    A child's peak memory starts at its parent's, so nothing large may ever be in this process.
    """
    code = f"import convert; print(convert.{function}({', '.join(map(repr, arguments))}))".replace(
        "PosixPath", "convert.Path"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(result.stdout.splitlines()[-1])


def measure(name: str, command: Sequence[str], source: Path, target: Path, is_warm: bool) -> Measured:
    """Run one command that makes `target` of `source`; what is there is removed first. Raises if it fails."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    if not is_warm:
        leave_page_cache(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started_at_s = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.monotonic() - started_at_s
    if status:
        raise SystemExit(f"{' '.join(command)} failed with exit code {os.waitstatus_to_exitcode(status)}")
    os.sync()
    return Measured(
        name=name,
        elapsed_s=elapsed_s,
        synced_s=time.monotonic() - started_at_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def measure_disk(work_dir: Path) -> tuple[float, float]:
    """Seconds to write DISK_BYTES up to fsync, and to read them from the disk."""
    block, path = os.urandom(DISK_BLOCK_BYTES), work_dir / "disk"
    with path.open("wb", buffering=0) as file:
        started_at_s = time.monotonic()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        write_s = time.monotonic() - started_at_s
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb", buffering=0) as file:
        started_at_s = time.monotonic()
        while file.read(DISK_BLOCK_BYTES):
            pass
        read_s = time.monotonic() - started_at_s
    path.unlink()
    return write_s, read_s


def convert(script: str, source: Path, target: Path, verify: str, is_warm: bool) -> Measured:
    flags = ["--load", str(source), "--save", str(target), "--no-tokenizer", "--verify", verify]
    command = [sys.executable, "-W", "ignore", str(TOOLS / f"{script}.py"), *flags]
    return measure(script, command, source, target, is_warm)


def measure_start_up(work_dir: Path, verify: str) -> dict[str, float]:
    """CPU seconds of each converter for a model of next to nothing: the smaller of two."""
    hf, megatron, back = (work_dir / f"toy-{name}" for name in ("hf", "megatron", "back"))
    run_apart("write_model", "toy", hf)
    pairs = {"hf_to_megatron": (hf, megatron), "megatron_to_hf": (megatron, back)}
    found = [{name: convert(name, *paths, verify, True).cpu_s for name, paths in pairs.items()} for _ in range(2)]
    return {name: min(times[name] for times in found) for name in pairs}


def measure_round(work_dir: Path, number: int, verify: str, is_warm: bool) -> list[Measured]:
    """cp, import, cp, export; the checkpoint of an earlier round stays until the import of this one replaces it."""
    hf, megatron, copy, back = (work_dir / name for name in ("hf", "megatron", "copy", "back"))

    def copy_of(what: str, source: Path) -> Measured:
        result = measure(f"cp {what}", ["cp", "-r", str(source), str(copy)], source, copy, is_warm)
        shutil.rmtree(copy)
        return result

    shutil.rmtree(back, ignore_errors=True)
    steps = [lambda: copy_of("hf", hf), lambda: convert("hf_to_megatron", hf, megatron, verify, is_warm)]
    measured = [step() for step in (steps if number % 2 == 0 else reversed(steps))]
    steps = [lambda: copy_of("megatron", megatron), lambda: convert("megatron_to_hf", megatron, back, verify, is_warm)]
    return measured + [step() for step in (steps if number % 2 == 0 else reversed(steps))]


def count_equal_tensors(first: Path, second: Path) -> int:
    """How many tensors two folders have, all of them alike; raises if one differs."""
    from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
    from megatron_hammer.checkpoint_files.safetensors.weight_files import open_hf_weights

    ours, theirs = open_hf_weights(first), open_hf_weights(second)
    different = [
        name
        for name in ours.shapes.keys() | theirs.shapes.keys()
        if name not in ours.shapes
        or name not in theirs.shapes
        or not is_bitwise_equal(ours.read(name), theirs.read(name))
    ]
    if different:
        raise SystemExit(f"{len(different)} tensors did not come back equal: {', '.join(sorted(different)[:5])}")
    return len(ours.shapes)


def format_table(rounds: Sequence[Sequence[Measured]], num_bytes: int, start_up_s: Mapping[str, float]) -> str:
    """Markdown: medians over the rounds with their smallest and largest, and ratios of the rounds' own pairs."""
    lines = [
        "| command | s | s with sync | CPU s | of it start-up | CPU s per GB | peak memory, MiB | GB/s with sync "
        "| times cp | times cp, with sync | CPU times cp |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, copied in (
        ("cp hf", None),
        ("hf_to_megatron", "cp hf"),
        ("cp megatron", None),
        ("megatron_to_hf", "cp megatron"),
    ):
        own = [next(step for step in steps if step.name == name) for steps in rounds]
        cells = [_spread([getattr(step, field) for step in own]) for field in ("elapsed_s", "synced_s", "cpu_s")]
        base_s = start_up_s.get(name, 0.0)
        cells.append(f"{base_s:.2f}" if base_s else "")
        cells.append(_spread([(step.cpu_s - base_s) / num_bytes * 1e9 for step in own]))
        cells.append(f"{max(step.peak_bytes for step in own) / 2**20:,.0f}")
        cells.append(f"{num_bytes / 1e9 / statistics.median(step.synced_s for step in own):.2f}")
        if copied is None:
            cells += ["", "", ""]
        else:
            base = [next(step for step in steps if step.name == copied) for steps in rounds]
            for field in ("elapsed_s", "synced_s", "cpu_s"):
                pairs = zip(own, base, strict=True)
                cells.append(_spread([getattr(step, field) / getattr(copy, field) for step, copy in pairs]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    median = f"{statistics.median(values):.2f}"
    return median if len(values) == 1 else f"{median} ({min(values):.2f} to {max(values):.2f})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="new folder on the disk to measure; removed after")
    parser.add_argument("--model", choices=SHAPES, default="7b", help="shape of the model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the four commands (%(default)s)")
    parser.add_argument("--verify", default="tensors", help="level passed to both converters (%(default)s)")
    parser.add_argument("--warm", action="store_true", help="leave what is read in the page cache")
    parser.add_argument("--json", action="store_true", help="every command of every round, as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.work_dir.exists():
        raise SystemExit(f"{arguments.work_dir}: must not exist yet; it is removed in the end")
    arguments.work_dir.mkdir(parents=True)
    try:
        write_s, read_s = measure_disk(arguments.work_dir)
        start_up_s = measure_start_up(arguments.work_dir, arguments.verify)
        num_bytes = run_apart("write_model", arguments.model, arguments.work_dir / "hf")
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(measure_round(arguments.work_dir, number, arguments.verify, arguments.warm))
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
        num_equal = run_apart("count_equal_tensors", arguments.work_dir / "hf", arguments.work_dir / "back")
    finally:
        shutil.rmtree(arguments.work_dir)
    if arguments.json:
        found = {"num_bytes": num_bytes, "disk_write_s": write_s, "disk_read_s": read_s, "start_up_s": start_up_s}
        print(json.dumps({**found, "rounds": [[asdict(step) for step in steps] for steps in rounds]}))
        return
    print(format_table(rounds, num_bytes, start_up_s))
    cache = "in the page cache as far as they fit" if arguments.warm else "not in the page cache"
    print(
        f"\ndisk: {DISK_BYTES / write_s / 1e9:.2f} GB/s written, {DISK_BYTES / read_s / 1e9:.2f} GB/s read"
        f"\n{arguments.model}: {num_bytes / 1e9:.1f} GB of bf16 weights, rounds: {arguments.rounds}; files read were "
        f"{cache}; converters with --verify {arguments.verify}; all {num_equal} tensors came back bit for bit"
    )


if __name__ == "__main__":
    main()
