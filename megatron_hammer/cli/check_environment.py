"""Say which of this repository's requirements the running interpreter lacks, in about a tenth of a second.

It reads installed versions only and imports none of the packages: torch alone takes seconds. It asks for nothing but
the standard library and `packaging`, because it runs on interpreters that nobody has set up yet. stdout has one
requirement a line, as pip takes it; exit 0: nothing is missing, 1: something is.
Used by tools/setup_environment.sh and docker/Dockerfile.
"""

import argparse
import ast
import platform
import sys
from importlib import metadata
from pathlib import Path

SETUP_PATH = Path(__file__).resolve().parent.parent / "setup.py"


def read_setup_literals(setup_path: Path) -> dict[str, object]:
    """The constants of setup.py by name, read without running it (setuptools may be absent)."""
    literals = {}
    for node in ast.parse(setup_path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            literals[node.targets[0].id] = ast.literal_eval(node.value)
    return literals


def select_missing(requirements: list[str]) -> list[str]:
    """The requirements that are absent or installed at a version out of range, unchanged and in order.

    A vendor's build counts as the release it is named after: 2.13.0a0+git.nv26 satisfies torch>=2.13.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version
    except ImportError:
        return requirements
    missing = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            release = Version(metadata.version(requirement.name)).base_version
        except metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(release):
            missing.append(text)
    return missing


def is_python_supported(python_requires: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(python_requires).contains(platform.python_version(), prereleases=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the requirements of setup.py that this interpreter lacks.")
    parser.add_argument("--extra", action="append", default=[], help="also check this extra of setup.py; repeatable")
    parser.add_argument("--setup-path", type=Path, default=SETUP_PATH, help="the setup.py to read")
    arguments = parser.parse_args()

    literals = read_setup_literals(arguments.setup_path)
    requirements = list(literals["INSTALL_REQUIRES"])  # type: ignore[call-overload]
    extras: dict[str, list[str]] = literals["EXTRAS_REQUIRE"]  # type: ignore[assignment]
    for extra in arguments.extra:
        if extra not in extras:
            parser.error(f"--extra: must be an extra of setup.py, got {extra}. Use one of {', '.join(extras)}.")
        requirements += extras[extra]
    missing = select_missing(requirements)
    if not missing and not is_python_supported(str(literals["PYTHON_REQUIRES"])):
        missing = [f"python{literals['PYTHON_REQUIRES']}"]
    print("\n".join(missing), end="\n" if missing else "")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
