from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError, HammerError
from megatron_hammer.evaluation.scorers.named_models import NamedModel, list_models, split_name


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("a/hf", "b/hf", "c=d")]
    for folder in found:
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    return found


def test_models_of_one_name_are_told_apart(folders: list[Path]) -> None:
    first, second, third = map(str, folders)
    assert list_models([first, f"own={second}", third]) == [
        NamedModel(folders[0]), NamedModel(folders[1], "own"), NamedModel(folders[2]),
    ]  # fmt: skip
    assert [model.name for model in list_models([first, second, third])] == [first, second, None]
    with pytest.raises(ConfigError, match=r"models: names must differ, got .*a/hf twice"):
        list_models([first, first])


def test_everything_that_is_not_there_is_named_at_once(folders: list[Path]) -> None:
    with pytest.raises(HammerError) as caught:
        list_models(["nowhere", str(folders[0]), "other=elsewhere"], Path("run"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["nowhere", "elsewhere", "run"]


def test_a_path_may_have_an_equals_sign(folders: list[Path]) -> None:
    assert split_name(str(folders[2])) == (None, str(folders[2]))
    assert split_name("x=y=z") == ("x", "y=z")


def test_a_folder_is_called_by_its_name_wherever_the_command_runs(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[0])
    assert [model.name for model in list_models([".", str(folders[1])])] == [".", str(folders[1])]
