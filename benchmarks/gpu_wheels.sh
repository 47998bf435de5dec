#!/usr/bin/env bash
# Pack what a GPU machine without network lacks, so that benchmarks/gpu.py runs there.
#
#   bash benchmarks/gpu_wheels.sh --list                  # names, versions and why, and stop
#   bash benchmarks/gpu_wheels.sh --output wheels-gpu     # download and pack, in pieces
#   bash benchmarks/gpu_wheels.sh --output wheels-gpu --te 2.20.2 --cuda 13
#
# Run it where the environment of tools/setup_environment.sh is and packages can be downloaded: versions are those that
# are installed. The other machine has Python 3.12 and, by --image, torch (2.11 with CUDA), triton and transformers; what
# these need is there too. Copy the output and this repository to it, then, without network:
#
#   bash benchmarks/gpu_wheels.sh --install wheels-gpu    # checks the sums; PYTHON and pip's variables (PIP_TARGET) apply
#
# --te: TransformerEngine as well. Its library is a wheel. Its part for torch is compiled against the torch of the GPU
# machine, so it is compiled here only if this machine has nvcc and that torch (--torch); else its source is packed, and
# --install compiles it there, which takes minutes.
set -euo pipefail

# What training and the benchmark import; --all: what any command of the package imports. What is named here is packed
# even where transformers needs it too: another version of transformers may not.
packages=(megatron-core orjson zstandard sentencepiece protobuf psutil pydantic pydantic-core annotated-types
    typing-inspection typing-extensions rich markdown-it-py mdurl pygments matplotlib contourpy cycler fonttools
    kiwisolver pillow pyparsing python-dateutil)
te_needs=(einops onnx onnxscript onnx-ir ml-dtypes nvdlfw-inspect nvidia-cudnn-frontend) # of TransformerEngine's torch part
image=(torch triton transformers numpy)
output="" packed="" piece_mib=60 is_list="" te_version="" cuda_major=13 torch_version=2.11 python_version=3.12
platform=manylinux_2_28_x86_64

fail() {
    echo "error: $1" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --list) is_list=yes && shift && continue ;;
        --all) packages=() && shift && continue ;;
        --help | -h) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    esac
    [[ $# -ge 2 ]] || fail "$1: needs a value, got none. See --help."
    case $1 in
        --output) output=$2 ;;
        --install) packed=$2 ;;
        --piece-mib) piece_mib=$2 ;;
        --image) read -ra image <<<"$2" ;;
        --te) te_version=$2 ;;
        --cuda) cuda_major=$2 ;;
        --torch) torch_version=$2 ;;
        --python-version) python_version=$2 ;;
        --platform) platform=$2 ;;
        *) fail "command line: unknown option, got $1. See --help." ;;
    esac
    shift 2
done
[[ $piece_mib =~ ^[1-9][0-9]*$ ]] || fail "piece-mib: must be a whole number of MiB, got $piece_mib. Use 60."

install() {
    [[ -f $1/SHA256SUMS ]] || fail "install: must be a folder that --output made, got $1. Copy all of it."
    (cd "$1" && sha256sum --check --quiet SHA256SUMS) || fail "install: a piece is damaged in $1. Copy it again."
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    cat "$1"/piece-* | tar -xf - -C "$scratch"
    local pip=("$python" -m pip install --disable-pip-version-check --no-index --no-deps)
    "${pip[@]}" "$scratch"/wheels/*.whl
    shopt -s nullglob
    local sources=("$scratch"/wheels/*.tar.gz)
    if ((${#sources[@]})); then
        NVTE_FRAMEWORK=pytorch TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} "${pip[@]}" --no-build-isolation \
            "${sources[@]}"
    fi
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -n $packed ]]; then
    install "$packed"
    exit
fi
[[ -n $is_list || -n $output ]] || fail "output: must name a folder to make, got nothing. Pass --output wheels-gpu."
[[ -z $output || ! -e $output ]] || fail "output: must not exist yet, got $output. Name a new folder."

# Each line: name==version, and the package that needs it. Without names: what setup.py of this repository asks for.
list_requirements() {
    "$python" - "$root" "${packages[*]}" "${image[*]}" <<'PYTHON'
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root, packages, image = sys.argv[1:]


def list_needed(requirements: list[str], needed_by: str) -> dict[str, str]:
    """Installed distributions that the requirements lead to, and the one that needs each."""
    found: dict[str, str] = {}
    waiting = [(requirement, needed_by) for requirement in requirements]
    while waiting:
        text, parent = waiting.pop(0)
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        marker = requirement.marker
        if name in found or not (marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)):
            continue
        found[name] = parent
        try:
            waiting += [(text, name) for text in metadata.requires(name) or () if "extra ==" not in text]
        except metadata.PackageNotFoundError:
            if parent in ("image", "package"):
                sys.exit(f"error: {name}: must be installed here, to know its version. Run tools/setup_environment.sh.")
            del found[name]
    return found


literal = re.search(r"INSTALL_REQUIRES = \[(.*?)^\]", (Path(root) / "setup.py").read_text(), re.DOTALL | re.MULTILINE)
wanted = packages.split() or re.findall(r'^ +"([^"]+)"', literal[1], re.MULTILINE)
has = {*list_needed(image.split(), "image"), "setuptools", "pip", "wheel"} - {*packages.split()}
for name, parent in sorted(list_needed(wanted, "package").items()):
    if name not in has:
        print(f"{name}=={metadata.version(name)} {parent}")
PYTHON
}

requirements=$(list_requirements)
if [[ -n $is_list ]]; then
    echo "# python $python_version, $platform; the machine has: ${image[*]}"
    awk '{printf "%-32s needed by %s\n", $1, $2}' <<<"$requirements"
    if [[ -n $te_version ]]; then
        printf '%s\n' "${te_needs[@]}" "transformer-engine==$te_version" "transformer-engine-cu$cuda_major==$te_version" \
            "transformer-engine-torch==$te_version (source, compiled against torch $torch_version)"
    fi
    exit 0
fi

partial="$output.partial"
rm -rf "$partial"
mkdir -p "$partial/wheels"
download() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$partial/wheels" "$@"
}
binary=(--only-binary=:all: --python-version "$python_version" --implementation cp --platform "$platform"
    --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
mapfile -t pinned < <(cut -d' ' -f1 <<<"$requirements")
download "${binary[@]}" "${pinned[@]}"
if [[ -n $te_version ]]; then
    download "${binary[@]}" "${te_needs[@]}" "transformer-engine==$te_version" "transformer-engine-cu$cuda_major==$te_version"
    source_part="transformer-engine-torch==$te_version"
    installed_torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null || true)
    if command -v nvcc >/dev/null && [[ $installed_torch == "$torch_version".* ]]; then
        NVTE_FRAMEWORK=pytorch TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} "$python" -m pip wheel --no-deps \
            --no-build-isolation --wheel-dir "$partial/wheels" "$source_part"
    else
        NVTE_FRAMEWORK=pytorch download --no-binary=:all: --no-build-isolation "$source_part"
    fi
fi

tar -C "$partial" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - wheels |
    split --bytes="$((piece_mib * 1024 * 1024))" --numeric-suffixes --suffix-length=3 - "$partial/piece-"
num_wheels=$(find "$partial/wheels" -type f | wc -l)
rm -r "$partial/wheels"
(cd "$partial" && sha256sum piece-* >SHA256SUMS)
mv "$partial" "$output"
echo "packed $num_wheels files into $(find "$output" -name 'piece-*' | wc -l) pieces of at most $piece_mib MiB, \
$(du -sm "$output" | cut -f1) MiB in all, in $output"
