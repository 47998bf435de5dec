#!/usr/bin/env python3
"""How the preprocessor's CPU time grows with the number of input files, for one or several checkouts in turn.

    python benchmarks/many_files.py --tokenizer-model a.model --checkouts . ../older --num-files 5000 10000 20000

Each file holds one short document. All checkouts take turns on the same folder, in processes of their own, and must
write the same .bin. CPU time without that of start-up, which is the time for a folder of one file.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.preprocess import preprocess
folder, tokenizer, prefix = map(Path, sys.argv[1:])
preprocess(PreprocessOptions(inputs=(str(folder),), tokenizer_path=tokenizer, output_prefix=prefix))
print(time.process_time())
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--num-files", type=int, nargs="+", default=[5000, 10000, 20000])
    parser.add_argument("--rounds", type=int, default=1, help="turns of all checkouts (%(default)s)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def write_files(folder: Path, num_files: int) -> None:
    folder.mkdir()
    for number in range(num_files):
        (folder / f"{number:07d}.jsonl").write_text(json.dumps({"text": f"The document with number {number}."}) + "\n")


def run(checkout: Path, folder: Path, tokenizer: Path) -> tuple[float, str]:
    """Return the CPU seconds of one run and the hash of its .bin."""
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, "-c", SCRIPT, str(folder), str(tokenizer.resolve()), f"{output_dir}/x"]
        # The working folder comes before PYTHONPATH where Python looks for the package.
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout), hashlib.sha256(Path(output_dir, "x_text_document.bin").read_bytes()).hexdigest()


def main() -> None:
    arguments = parse_arguments()
    cpu_s: dict[str, dict[int, float]] = {str(checkout): {} for checkout in arguments.checkouts}
    with tempfile.TemporaryDirectory() as work_dir:
        for num_files in (1, *arguments.num_files):
            folder = Path(work_dir, str(num_files))
            write_files(folder, num_files)
            times: dict[str, list[float]] = {name: [] for name in cpu_s}
            hashes = set()
            for _ in range(arguments.rounds):
                for checkout in arguments.checkouts:
                    elapsed_s, sha256 = run(checkout, folder, arguments.tokenizer_model)
                    times[str(checkout)].append(elapsed_s)
                    hashes.add(sha256)
            if len(hashes) > 1:
                raise SystemExit(f"the checkouts write different bytes for {num_files} files")
            for name, values in times.items():
                cpu_s[name][num_files] = statistics.median(values)
    rows = {
        name: {str(count): values[count] - values[1] for count in arguments.num_files} for name, values in cpu_s.items()
    }
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for name, values in rows.items():
        print(name, *(f"{int(count):,} files: {seconds:.2f} s" for count, seconds in values.items()), sep="; ")


if __name__ == "__main__":
    main()
