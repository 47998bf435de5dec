# shellcheck shell=bash
# The Python environment of this clone, for entry scripts, which begin with:
#
#   set -euo pipefail
#   root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
#   # shellcheck source=tools/setup_environment.sh
#   source "$root/tools/setup_environment.sh"        # where pytest is needed: SETUP_EXTRAS=dev source ...
#   "$PYTHON" -m torch.distributed.run ...           # not torchrun, which may belong to another interpreter
#
# To be sourced by bash, from any folder. It finds or makes the interpreter (see tools/find_or_make_python.sh). Then it
# exports PYTHON (its absolute path), puts this clone first on PYTHONPATH and, if .venv was chosen, .venv/bin first on
# PATH. It takes no arguments and prints nothing on stdout. It changes neither the caller's options nor the folder nor
# "$@", so it does not contain `set -euo pipefail`. On failure it returns 2, which ends a caller that uses `set -e`.

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
