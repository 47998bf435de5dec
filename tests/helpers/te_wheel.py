"""TransformerEngine's Python, without its compiled parts: a wheel of 1.2 MB, unpacked once for each environment.

It is never installed: megatron would find a TransformerEngine that does not work in every other test. It lies beside
the environment's packages, and only a process that calls te_stand_in.install has it on its path.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.20.2"
FOLDER = Path(sys.prefix) / "share" / "megatron_hammer" / f"transformer-engine-{VERSION}"
TIMEOUT_S = 60


class WheelUnavailableError(Exception):
    """The wheel is not here and cannot be downloaded; says how to get it."""


def provide_te_wheel() -> Path:
    """The folder of the unpacked wheel, downloaded at the first call. Raises WheelUnavailableError."""
    if FOLDER.is_dir():
        return FOLDER
    requirement = f"transformer-engine=={VERSION}"
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        try:
            subprocess.run(
                [*download, requirement], check=True, capture_output=True, text=True, timeout=TIMEOUT_S,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise WheelUnavailableError(
                f"needs the Python of TransformerEngine, which pip cannot download: {reason}. Where an index can be "
                f"reached: pip download --no-deps {requirement}, then unzip the wheel into {FOLDER}"
            ) from error
        (wheel_path,) = Path(folder).glob("*.whl")
        unpacked = Path(folder, "unpacked")
        with zipfile.ZipFile(wheel_path) as wheel:
            wheel.extractall(unpacked)
        try:
            os.rename(unpacked, FOLDER)
        except OSError:
            if not FOLDER.is_dir():  # another process of these tests may have been first
                raise
    return FOLDER
