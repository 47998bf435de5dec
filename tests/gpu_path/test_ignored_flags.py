"""A flag that Megatron accepts and that nothing reads is refused when it is typed.

What is read is searched in the installed source of megatron and in ours: an attribute that appears only where flags are
declared changes nothing.
"""

import argparse
import re
from pathlib import Path

import megatron.training
import pytest

from megatron_hammer.config.flag_tables.refused import REFUSED
from megatron_hammer.config.preflight.flags import find_flag_problems
from tests.helpers.parsed_flags import TINY, parse, with_flags
from tests.helpers.repository import ROOT

MEGATRON = Path(megatron.training.__file__).parents[1]
# Where flags are declared, not used; and programs that pretraining never enters.
DECLARATIONS = {"arguments.py", "yaml_arguments.py", "training_config.py", "common_config.py"}
OTHER_PROGRAMS = {"inference", "rl", "export", "vision", "multimodal", "audio", "bert", "T5", "retro", "post_training"}


def read_sources() -> list[str]:
    paths = [
        path
        for path in MEGATRON.rglob("*.py")
        if path.name not in DECLARATIONS and not OTHER_PROGRAMS & set(path.relative_to(MEGATRON).parts)
    ]
    ours = [
        path for path in (ROOT / "megatron_hammer").rglob("*.py") if not {"preflight", "flag_tables"} & set(path.parts)
    ]
    # Megatron's own validation uses some flags to derive others.
    validation = [MEGATRON / "training" / name for name in ("arguments.py", "argument_utils.py")]
    texts = [path.read_text() for path in paths + ours]
    return texts + [re.sub(r"add_argument\((?:[^()]|\([^()]*\))*\)", "", path.read_text()) for path in validation]


@pytest.fixture(scope="module")
def words() -> set[str]:
    """Every attribute that is read, and every string that may name one."""
    found: set[str] = set()
    for text in read_sources():
        found.update(re.findall(r"\.([A-Za-z_0-9]+)\b(?!\s*=[^=])", text))
        found.update(re.findall(r"""['"]([a-z_0-9]+)['"]""", text))
    return found


def list_destinations() -> list[str]:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    return sorted({action.dest for action in parser._actions})


def test_what_nothing_reads_is_refused_when_typed(words: set[str]) -> None:
    base = parse(*TINY).settings
    unread = [name for name in list_destinations() if name not in words]
    assert len(unread) > 30  # else the search finds names where there are none
    silent = [name for name in unread if name not in REFUSED and not find_flag_problems(with_flags(base, name))]
    assert silent == []
