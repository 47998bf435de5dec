# shellcheck shell=bash
# The Python environment of this clone, for entry scripts, which begin with:
#
#   set -euo pipefail
#   root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
#   # shellcheck source=tools/setup_environment.sh
#   source "$root/tools/setup_environment.sh"        # where pytest is needed: SETUP_EXTRAS=dev source ...
#   "$PYTHON" -m torch.distributed.run ...           # rather than torchrun: surely the same interpreter
#
# To be sourced by bash, from any folder. It finds or makes the interpreter (tools/find_or_make_python.sh says how),
# then exports PYTHON (its absolute path), puts this clone first on PYTHONPATH and, where .venv was chosen, .venv/bin
# first on PATH. It takes no arguments, prints nothing on stdout, and leaves the caller's options, folder and "$@"
# alone, so it sets no `set -euo pipefail` of its own. On failure it returns 2: under `set -e` the caller ends with 2.

_hammer_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$(bash "$_hammer_root/tools/find_or_make_python.sh")" || {
    unset PYTHON _hammer_root
    # shellcheck disable=SC2317 # reached when the file is executed by mistake
    return 2 2>/dev/null || exit 2
}
export PYTHON
if [[ ":${PYTHONPATH:-}:" != *":$_hammer_root:"* ]]; then
    export PYTHONPATH="$_hammer_root${PYTHONPATH:+:$PYTHONPATH}"
fi
if [[ "$PYTHON" == "$_hammer_root/.venv/"* && ":$PATH:" != *":$_hammer_root/.venv/bin:"* ]]; then
    export PATH="$_hammer_root/.venv/bin:$PATH"
fi
unset _hammer_root
