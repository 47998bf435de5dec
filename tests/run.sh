#!/usr/bin/env bash
# All tests, on any machine: `bash tests/run.sh`. Arguments go to pytest: `bash tests/run.sh tests/contract -k readme`.
# The first run makes .venv, which takes a few minutes. Later runs start at once.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# shellcheck source=tools/setup_environment.sh
SETUP_EXTRAS=dev source "$root/tools/setup_environment.sh"
export OMP_NUM_THREADS=1 # several processes share few cores, and sums keep one order

# A file's tests stay together: they share what they set up. In the folders' order the long files come first, and the
# many short ones of tests/unit fill what the last of them leave idle.
workers="$(env -u OMP_NUM_THREADS nproc)" # nproc would heed it
arguments=(--numprocesses "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder "$@")
echo "tests: $PYTHON -m pytest ${arguments[*]}" >&2
exec "$PYTHON" -m pytest "${arguments[@]}"
