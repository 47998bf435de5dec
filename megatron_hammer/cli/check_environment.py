"""Say which requirements of this package the running interpreter lacks, in about a tenth of a second.

It reads installed versions only and imports none of the packages: torch alone takes seconds. It needs nothing but the
standard library and `packaging`, because it also runs on interpreters where nothing was installed yet. stdout has one
requirement per line, in pip's syntax. Exit code 0: nothing is missing; 1: something is; 2: an unknown extra.
Used by tools/find_or_make_python.sh and docker/Dockerfile.
"""

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from megatron_hammer.errors import exit_on_user_error

# The folder above megatron_hammer/, if this file lies in a clone.
CLONE = Path(__file__).resolve().parents[2]
SETUP_NAMES = ("PYTHON_REQUIRES", "INSTALL_REQUIRES", "EXTRAS_REQUIRE")


class Requirements(NamedTuple):
    python: str
    packages: list[str]
    extras: dict[str, list[str]]


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see --help. Prints the missing requirements; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description="Print the requirements of setup.py that this interpreter lacks.")
    parser.add_argument("--extra", action="append", default=[], help="also check this extra of setup.py; repeatable")
    parser.add_argument("--setup-path", type=Path, default=find_setup(), help="the setup.py to read")
    arguments = parser.parse_args(argv)

    required = read_installed() if arguments.setup_path is None else read_setup(arguments.setup_path)
    # A copy: extras are added to it.
    packages = list(required.packages)
    for extra in arguments.extra:
        if extra not in required.extras:
            parser.error(
                f"--extra: must be an extra of setup.py, got {extra}. Use one of {', '.join(required.extras)}."
            )
        packages += required.extras[extra]
    missing = select_missing(packages)
    if not is_python_supported(required.python):
        missing = [f"python{required.python}", *missing]
    print("\n".join(missing), end="\n" if missing else "")
    return 1 if missing else 0


def find_setup() -> Path | None:
    """The clone's setup.py; None where the package was installed without a clone."""
    # A wheel has no tools/. A setup.py beside an installed package would be that of another project.
    is_clone = (CLONE / "tools" / "check_environment.py").is_file()
    return CLONE / "setup.py" if is_clone else None


def read_setup(setup_path: Path) -> Requirements:
    """The requirements in setup.py, read without running it (setuptools may be absent)."""
    literals = {}
    for node in ast.parse(setup_path.read_text(encoding="utf-8")).body:
        # Only literals with these names: the rest of setup.py imports setuptools.
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in SETUP_NAMES:
            literals[node.targets[0].id] = ast.literal_eval(node.value)
    return Requirements(*(literals[name] for name in SETUP_NAMES))


def read_installed() -> Requirements:
    """The same requirements, from the metadata that pip installed with the package."""
    distribution = metadata.distribution("megatron_hammer")
    packages: list[str] = []
    extras: dict[str, list[str]] = {name: [] for name in distribution.metadata.get_all("Provides-Extra") or ()}
    for line in distribution.requires or ():
        text, _, marker = line.partition(";")
        # pip writes the extra of a requirement into its marker, such as: gguf>=0.19; extra == "gguf".
        extra = re.search(r"""extra == ["']([\w-]+)["']""", marker)
        (extras[extra[1]] if extra else packages).append(text.strip())
    return Requirements(distribution.metadata["Requires-Python"], packages, extras)


def select_missing(requirements: list[str]) -> list[str]:
    """The requirements that are absent or installed at a version out of range, unchanged and in order.

    A vendor's build counts as the release in its name: 2.13.0a0+git.nv26 satisfies torch>=2.13.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version
    # packaging may be missing too. Without it no version can be compared, so every requirement counts as missing.
    except ImportError:
        return requirements
    missing = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            # base_version drops what a vendor adds. By PEP 440, 2.13.0a0 would be before 2.13.
            release = Version(metadata.version(requirement.name)).base_version
        except metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(release):
            missing.append(text)
    return missing


def is_python_supported(python_requires: str) -> bool:
    """Whether this interpreter is in a range such as `>=3.12,<3.14`."""
    # Not by `packaging`: an unsupported interpreter with nothing installed must be named too.
    bounds = re.findall(r"(>=|<)([\d.]+)", python_requires)
    return all(
        (sys.version_info[:3] >= tuple(map(int, version.split(".")))) == (sign == ">=") for sign, version in bounds
    )
