"""The files that saved arguments name, wherever the checkpoint lies now."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_hammer.checkpoint_files.saved_arguments import find_saved_tokenizer
from megatron_hammer.errors import CheckpointError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import set_trainer_settings
from tests.helpers.toy_tokenizer import train_toy_tokenizer


@pytest.mark.parametrize("beside", ["checkpoint/release/tokenizer", "checkpoint/tokenizer"])
def test_the_tokenizer_of_a_moved_checkpoint_is_the_one_in_its_folder(tmp_path: Path, beside: str) -> None:
    folder = tmp_path / "checkpoint/release"
    (tmp_path / beside).mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    args = Namespace(tokenizer_model=str(tmp_path / "old/tokenizer"))
    assert find_saved_tokenizer(args, folder) == tmp_path / beside
    (tmp_path / "old/tokenizer").mkdir(parents=True)
    own = folder / "tokenizer"
    expected = own if own.exists() else tmp_path / "old/tokenizer"
    assert find_saved_tokenizer(args, folder) == expected, "the old place may have been used again"


def test_a_tokenizer_is_known_by_its_hash_and_not_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = train_toy_tokenizer(tmp_path)
    another = set_trainer_settings(one.read_bytes(), model_prefix="another")
    args = Namespace(tokenizer_model="t.model", tokenizer_sha256=load_encoder(one).sha256)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    Path("t.model").write_bytes(another)  # the same relative path, in another folder
    with pytest.raises(CheckpointError, match=r"t\.model: tokenizer must be the one that the checkpoint was trained"):
        find_saved_tokenizer(args, tmp_path)
    (tmp_path / "release").mkdir()
    one.rename(tmp_path / "tokenizer")
    assert find_saved_tokenizer(args, tmp_path / "release") == tmp_path / "tokenizer"


def test_without_a_hash_a_file_at_a_relative_path_may_be_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.model").touch()
    with pytest.raises(CheckpointError, match=r"t\.model: tokenizer must be known .* and no hash"):
        find_saved_tokenizer(Namespace(tokenizer_model="t.model"), tmp_path / "release")
    (tmp_path / "tokenizer").touch()
    assert find_saved_tokenizer(Namespace(tokenizer_model="t.model"), tmp_path / "release") == tmp_path / "tokenizer"
    absolute = tmp_path / "t.model"
    assert find_saved_tokenizer(Namespace(tokenizer_model=str(absolute)), tmp_path / "a/b") == absolute


@pytest.mark.parametrize("saved", [{}, {"tokenizer_model": None}, {"tokenizer_model": "gone.model"}])
def test_none_where_none_is_named_or_left(tmp_path: Path, saved: dict[str, str | None]) -> None:
    assert find_saved_tokenizer(Namespace(**saved), tmp_path) is None
