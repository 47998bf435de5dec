"""Help texts of Megatron's flags, read once in a process.

Megatron reads them from its own source with `inspect` and `ast` whenever it builds its parser, which is twice in every
run: a quarter of what a forked rank of a few steps takes. They depend on nothing but the class.
"""

from typing import Any


def remember_flag_texts() -> None:
    """For the parsers of this process, and of those that are forked from it."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, texts = ArgumentGroupFactory._get_field_docstrings, dict[type, dict[str, str]]()

    def read_once(factory: Any, kind: type) -> dict[str, str]:
        if kind not in texts:
            texts[kind] = read(factory, kind)
        return dict(texts[kind])

    ArgumentGroupFactory._get_field_docstrings = read_once
