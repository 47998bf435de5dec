#!/usr/bin/env bash
# Print the path of a Python interpreter that has what this clone needs, making .venv if there is none.
# Entry scripts source tools/setup_environment.sh, which calls this one. Run it alone to set up and do nothing else.
#
# The first of these that fits is chosen:
#   1. $PYTHON, python3 or python, if it already has everything that setup.py asks for, as in a container. It is not
#      changed;
#   2. .venv of this clone, if its set-up finished with the current setup.py and constraints.txt;
#   3. a new or completed .venv: a Python 3.12/3.13 is found by running candidates, then pip install -c constraints.txt
#      -e .[dev].
# A second set-up of the same .venv waits for the first, if the machine has flock.
#
# stdout: only the absolute path. stderr: one line for each action. Exit code 2: impossible, with what to do instead.
# PYTHON              an interpreter to try before all others
# SETUP_EXTRAS        extras of setup.py that are needed too, separated by spaces (default: none)
# SETUP_SEARCH_DIRS   folders in which Python is searched after PATH and pyenv, separated by spaces (default: below)
set -euo pipefail
shopt -s nullglob

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" # a file in the caller's folder may choose pyenv's version
venv="$root/.venv"
stamp_path="$venv/setup.stamp" # "installing" while an installation is under way, the fingerprint once it is complete
log_path="$venv/setup.log"
extras=()
for extra in ${SETUP_EXTRAS:-}; do extras+=(--extra "$extra"); done
tried=""

say() { printf 'set-up: %s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 2
}

list_missing() { "$1" "$root/tools/check_environment.py" ${extras[@]+"${extras[@]}"} </dev/null; }

# Print the version and the real path (behind a pyenv shim) of an interpreter, or fail if it does not run.
probe() { "$1" -c 'import sys; print("%d.%d.%d %s" % (sys.version_info[:3] + (sys.executable,)))' 2>/dev/null </dev/null; }

fingerprint() { cat "$root/setup.py" "$root/constraints.txt" | cksum; }

use() {
    say "$2 ($1)"
    printf '%s\n' "$1"
    exit 0
}

use_interpreter_in_use() {
    local candidate version path missing
    for candidate in ${PYTHON:+"$PYTHON"} python3 python; do
        read -r version path < <(probe "$candidate") || continue
        [[ "$version" == 3.12.* || "$version" == 3.13.* ]] || continue
        [[ "$path" != "$venv/"* ]] || continue # its stamp decides, below
        if missing="$(list_missing "$path" 2>/dev/null)"; then
            use "$path" "using $candidate, which has everything, untouched"
        fi
        if [[ -n "$missing" && "$missing" != torch[\>=\<]* ]]; then
            say "$candidate lacks ${missing//$'\n'/, }; leaving it alone." \
                "To use it: $path -m pip install '${missing//$'\n'/"' '"}'"
        fi
    done
}

is_venv_ready() {
    local stamp
    [[ -x "$venv/bin/python" ]] || return 1
    # Without a stamp, somebody else made this .venv: its packages decide.
    stamp="$(cat "$stamp_path" 2>/dev/null)" || stamp="$(fingerprint)"
    [[ "$stamp" == "$(fingerprint)" ]] && list_missing "$venv/bin/python" &>/dev/null
}

lock_venv() {
    mkdir -p "$venv" 2>/dev/null || fail ".venv: the folder must be writable, got $root. Clone to a folder of your own."
    command -v flock >/dev/null || return 0
    exec 9>"$venv/setup.lock"
    flock --nonblock 9 && return 0
    say "waiting for another set-up of .venv to finish"
    flock 9
}

# 3.12 comes first because constraints.txt was tested with it.
list_candidates() {
    local name folder pyenv_root="${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"
    local default_folders="/usr/local/bin /usr/bin /opt/homebrew/bin /opt/python*/bin /opt/conda/bin /opt/*conda3/bin"
    default_folders+=" ${HOME:-/nonexistent}/*conda3/bin ${HOME:-/nonexistent}/*forge3/bin"
    if [[ -n "${PYTHON:-}" ]]; then printf '%s\n' "$PYTHON"; fi
    for name in python3.12 python3.13 python3 python; do type -ap "$name" || true; done
    printf '%s\n' "$pyenv_root"/versions/3.12.*/bin/python "$pyenv_root"/versions/3.13.*/bin/python
    if [[ -n "${CONDA_PREFIX:-}" ]]; then printf '%s\n' "$CONDA_PREFIX/bin/python"; fi
    for folder in ${SETUP_SEARCH_DIRS-$default_folders}; do # unquoted: a pattern lists its folders
        for name in python3.12 python3.13 python3; do
            if [[ -x "$folder/$name" ]]; then printf '%s\n' "$folder/$name"; fi
        done
    done
    if command -v uv >/dev/null; then uv python find --no-project '>=3.12,<3.14' 2>/dev/null || true; fi
}

# Set base_python to a Python 3.12/3.13 that runs and can make environments; every refusal goes to `tried`.
find_base_python() {
    local candidate version path
    while read -r candidate; do
        [[ -n "$candidate" ]] || continue
        if ! read -r version path < <(probe "$candidate"); then
            tried+="$candidate (does not run); "
        elif [[ "$version" != 3.12.* && "$version" != 3.13.* ]]; then
            tried+="$candidate (is $version); "
        elif ! "$path" -c 'import ensurepip, venv' 2>/dev/null </dev/null; then
            tried+="$candidate (has no ensurepip; on Debian or Ubuntu: apt install python${version%.*}-venv); "
        else
            base_python="$path"
            say "found Python $version ($path)"
            return 0
        fi
    done < <(list_candidates | awk '!seen[$0]++')
    return 1
}

make_venv() {
    find_base_python || fail "a Python 3.12 or 3.13 must be installed, tried: ${tried:-nothing, there is no python}." \
        "Install one (uv python install 3.12; or pyenv install 3.12; or conda create -p ./py312 python=3.12) or set PYTHON to its path, and run again."
    say "making .venv"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name setup.lock -exec rm -rf {} +
    echo installing >"$stamp_path"
    "$base_python" -m venv "$venv" >"$log_path" 2>&1 ||
        fail "$base_python -m venv $venv failed: $(tail -n 3 "$log_path"). Set PYTHON to another Python 3.12 or 3.13 and run again."
}

install_into_venv() {
    echo installing >"$stamp_path"
    say "installing into .venv with the versions of constraints.txt (several GB the first time; progress: tail -f $log_path)"
    local metadata_dir # pip writes RECORD last: a package without it was interrupted
    for metadata_dir in "$venv"/lib/python*/site-packages/*.dist-info; do
        if [[ ! -e "$metadata_dir/RECORD" ]]; then rm -rf "$metadata_dir"; fi
    done
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true
    if ! "$venv/bin/python" -m pip install --no-input --progress-bar off --disable-pip-version-check \
        -c "$root/constraints.txt" -e "${root}[dev]" >"$log_path" 2>&1 9>&-; then
        tail -n 15 "$log_path" >&2
        fail "pip could not install (the lines above; all of them in $log_path)." \
            "Check the network or the package index (pip config list) and the free space (df -h .), then run again: it continues."
    fi
    fingerprint >"$stamp_path"
    if command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -m pip show -q transformer-engine 2>/dev/null; then
        say "there is an NVIDIA driver but no TransformerEngine: the torch backend will be used." \
            "For the te backend: $venv/bin/python -m pip install --no-build-isolation -e '${root}[gpu]'"
    fi
}

use_interpreter_in_use
if is_venv_ready; then use "$venv/bin/python" "using .venv"; fi
unset PYTHONPATH # its packages must not count as installed in .venv
lock_venv
if is_venv_ready; then use "$venv/bin/python" "using .venv"; fi
if [[ "$(probe "$venv/bin/python")" == 3.1[23].* ]]; then
    say "completing .venv: its set-up was interrupted, or setup.py or constraints.txt has changed"
else
    make_venv
fi
install_into_venv
is_venv_ready || fail ".venv: everything must be there after the installation, still lacks: $(list_missing "$venv/bin/python" 2>&1)." \
    "Delete $venv and run again."
use "$venv/bin/python" ".venv is ready"
