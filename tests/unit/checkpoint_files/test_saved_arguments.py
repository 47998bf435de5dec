"""The files that saved arguments name, wherever the checkpoint lies now."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_hammer.checkpoint_files.saved_arguments import find_saved_tokenizer


@pytest.mark.parametrize("beside", ["checkpoint/release/tokenizer", "checkpoint/tokenizer"])
def test_the_tokenizer_of_a_moved_checkpoint_is_the_one_in_its_folder(tmp_path: Path, beside: str) -> None:
    folder = tmp_path / "checkpoint/release"
    (tmp_path / beside).mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    args = Namespace(tokenizer_model=str(tmp_path / "old/tokenizer"))
    assert find_saved_tokenizer(args, folder) == tmp_path / beside
    (tmp_path / "old/tokenizer").mkdir(parents=True)
    assert find_saved_tokenizer(args, folder) == tmp_path / "old/tokenizer", "the named one comes first"


@pytest.mark.parametrize("saved", [{}, {"tokenizer_model": None}, {"tokenizer_model": "gone.model"}])
def test_none_where_none_is_named_or_left(tmp_path: Path, saved: dict[str, str | None]) -> None:
    assert find_saved_tokenizer(Namespace(**saved), tmp_path) is None
