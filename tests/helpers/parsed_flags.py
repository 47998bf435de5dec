"""Command lines parsed in this process, for tests of preflight and of the dry run. Importing megatron takes seconds."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.flags import Flags
from megatron_hammer.config.run_plan import RunSettings
from megatron_hammer.data.indexed.pair import IndexedWriter
from tests.helpers.flag_texts import remember_flag_texts
from tests.helpers.indexed_writing import add_document

TINY = ("--preset", "hammer-tiny", "--mock-data")


@functools.cache
def install() -> None:
    from megatron_hammer.platforms import megatron_compat

    megatron_compat.install("cpu")
    remember_flag_texts()


def parse(*flags: str, platform: str = "cpu", backend: str = "torch") -> ParsedArguments:
    install()
    from megatron_hammer.config.arguments import parse_arguments

    return parse_arguments(flags, platform=platform, backend=backend)


def with_flags(settings: RunSettings, *typed: str, **values: object) -> RunSettings:
    """The settings as if these flags were typed, and others had these values."""
    flags = Flags(values={**settings.flags.values, **values}, typed=settings.flags.typed | set(typed))
    return dataclasses.replace(settings, flags=flags)


def find(*flags: str, platform: str = "cpu", backend: str = "torch") -> list[str]:
    """The problems of a command line."""
    from megatron_hammer.config.preflight.find_problems import find_problems

    return find_problems(parse(*flags, platform=platform, backend=backend))


def plan(world_size: int) -> tuple[str, ...]:
    """Flags that plan a run of so many processes."""
    return ("--dry-run", "--world-size", str(world_size))


def write_data(prefix: Path, documents: list[int], *, vocab_size: int = 4096, dtype: type = np.uint16) -> str:
    """Indexed data of documents of these lengths, ids counting up through the vocabulary."""
    next_id = 0
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for length in documents:
            add_document(writer, (np.arange(next_id, next_id + length) % vocab_size).astype(dtype))
            next_id += length
    return str(prefix)
