import json
import subprocess
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError, OutputError
from megatron_hammer.training.supervision import run_folder
from megatron_hammer.training.supervision.run_folder import (
    describe_start,
    list_differences,
    read_code_state,
    read_diff,
    read_newest_start,
    repeat_run,
    write_start,
)

ARGUMENTS = ["--preset", "hammer-tiny", "--lr", "1e-3", "--save", "old", "--load=old", "--metrics-path", "old/m.jsonl"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_start(tmp_path, describe_start(ARGUMENTS, {"data/a": "9 tokens"}), {"lr": 1e-3, "adam_eps": 1e-8})
    return tmp_path


def test_a_run_is_repeated_with_its_arguments_into_another_folder(run: Path) -> None:
    repeated = repeat_run(["--from-run", str(run), "--save", "new", "--seed", "3"])
    assert repeated == ["--preset", "hammer-tiny", "--lr", "1e-3", "--save", "new", "--seed", "3"]
    assert repeat_run(["--lr", "1"]) == ["--lr", "1"]


def test_another_runs_checkpoint_is_begun_from_again(tmp_path: Path) -> None:
    write_start(tmp_path, describe_start(["--save", "old", "--load", "base"], {}), {})
    assert repeat_run([f"--from-run={tmp_path}", "--save", "new"]) == ["--load", "base", "--save", "new"]


def test_the_newest_start_counts_and_a_file_names_an_earlier_one(run: Path) -> None:
    (first,) = (run / "run").glob("start-*.json")
    newer = json.loads(first.read_text()) | {"arguments": ["--lr", "2"]}
    (run / "run" / "start-99991231T000000.json").write_text(json.dumps(newer))
    assert read_newest_start(run)["arguments"] == ["--lr", "2"]
    assert read_newest_start(first)["arguments"] == ARGUMENTS


def test_a_start_has_versions_code_data_and_configuration(run: Path) -> None:
    start = read_newest_start(run)
    assert start["versions"]["torch"]
    assert start["data"] == {"data/a": "9 tokens"}
    assert start["directory"] == str(Path.cwd())
    (config,) = (run / "run").glob("config-*.json")
    assert json.loads(config.read_text()) == {"lr": 1e-3, "adam_eps": 1e-8}


def test_secrets_stay_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"WANDB_API_KEY": "s1", "TORCH_HUB_TOKEN": "s2", "PASSWORD": "s3", "NCCL_SECRET": "s4", "HOME": "h"}
    for name, value in {**secrets, "NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    environment = describe_start([], {})["environment"]
    assert (environment["NCCL_DEBUG"], environment["SLURM_JOB_ID"]) == ("WARN", "7")
    assert not set(secrets) & set(environment)


def test_what_is_different_now_is_said(run: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (run / "run").glob("start-*.json")
    start = json.loads(path.read_text())
    assert [line for line in list_differences(start) if "changes beyond" not in line] == []
    start["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(start | {"world_size": 64, "code": {"commit": "abc", "is_changed": False}}))
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.delenv("RANK", raising=False)
    repeat_run(["--from-run", str(run), "--save", "new"])
    notes = capsys.readouterr().err
    for fact in ("world_size was 64 and is 1", "torch was 1.0", "NCCL_ALGO was None and is Ring", "commit abc"):
        assert fact in notes
    monkeypatch.setenv("RANK", "1")
    repeat_run(["--from-run", str(run), "--save", "new"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ((), None, "from-run: must be a folder that a run has saved into, got .* without run/start-"),
        ((), "{", "from-run: must be a start of a run, got .*start-1.json"),
        ((), '{"arguments": 3}', "from-run: must be a start of a run"),
        (("no save",), '{"arguments": []}', "save: must be given with --from-run"),
    ],
)
def test_what_cannot_be_repeated(tmp_path: Path, flags: tuple[str, ...], content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "start-1.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        repeat_run(["--from-run", str(tmp_path), *(() if flags else ("--save", "new"))])
    with pytest.raises(ConfigError, match=r"from-run: must be a folder that a run has saved into, got .*/none without"):
        read_newest_start(tmp_path / "none")


def test_code_is_a_commit_and_its_changes(tmp_path: Path) -> None:
    assert read_code_state(tmp_path) is None, "as for a wheel"

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("commit", "-m", "a")
    clean = read_code_state(tmp_path)
    assert clean is not None
    assert not clean["is_changed"]
    (tmp_path / "a.py").write_text("a = 2\n")
    assert read_code_state(tmp_path) == clean | {"is_changed": True}
    assert "+a = 2" in read_diff(tmp_path)


def test_without_git_the_code_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder.read_code_state(Path.cwd()) is None


def test_ranks_that_the_launcher_started_again_do_not_say_how_a_run_began(run: Path) -> None:
    """They resume from its own checkpoint, and not from the one with which it began."""
    (first,) = (run / "run").glob("start-*.json")
    restarted = json.loads(first.read_text()) | {"arguments": ["--load", "old", "--save", "old"], "attempt": 1}
    (run / "run" / "start-99991231T000000.json").write_text(json.dumps(restarted))
    assert read_newest_start(run)["arguments"] == ARGUMENTS
    first.unlink()
    assert read_newest_start(run)["attempt"] == 1


@pytest.mark.parametrize("load", ["./old", "old/", "{directory}/old"])
def test_a_run_is_not_resumed_by_another_name_of_its_folder(tmp_path: Path, load: str) -> None:
    arguments = ["--save", "old", "--load", load.format(directory=tmp_path), "--lr", "1"]
    write_start(tmp_path / "old", describe_start(arguments, {}) | {"directory": str(tmp_path)}, {})
    assert repeat_run([f"--from-run={tmp_path}/old", "--save", "new"]) == ["--lr", "1", "--save", "new"]


def test_a_file_in_the_place_of_the_records_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(OutputError, match="file cannot be written"):
        write_start(tmp_path, describe_start([], {}), {})
