from pathlib import Path

import pytest

from megatron_hammer.cli.evaluate import build_suite, main, parse_arguments
from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.errors import ConfigError


def read(*flags: str) -> EvaluationSuite:
    return build_suite(parse_arguments(["model", *flags]))


def test_flags_override_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text('tasks = ["piqa"]\nnum_fewshot = [5]\nlimit = 3\nbos = "bos"\ndata_dir = "here"\n')
    assert read("--suite", str(path), "--num-fewshot", "0", "5", "0", "--bos", "auto") == EvaluationSuite(
        tasks=("piqa",), num_fewshot=(0, 5), limit=3, bos="auto", data_dir="here"
    )
    assert read("--tasks", "piqa").bos == "auto"


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), r"tasks: must be given"),
        (("--tasks", "piqa", "--limit", "0"), r"limit: must be at least 1, got 0"),
        (("--tasks", "piqa", "--num-fewshot", "0", "-1"), r"num-fewshot: must be at least 0, got -1"),
        (("--tasks", "piqa", "--fewshot-as-multiturn"), r"fewshot-as-multiturn: has no effect without"),
        (("--suite", "{texts}", "--limit", "3"), r"limit: acts on tasks, of which there are none, got 3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    (tmp_path / "texts.toml").write_text('domains = { zh = "zh.jsonl" }')
    with pytest.raises(ConfigError, match=message):
        read(*(flag.format(texts=tmp_path / "texts.toml") for flag in flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("{folder}/none",), "none: model must be"),
        (("m", "--check", "--save-dir", "x"), "--save-dir has no effect with --check, got --save-dir x"),
        (("--iterations", "5"), "--iterations must come with --load, got --iterations 5 alone"),
        (("--load", "{folder}", "--iterations", "5"), "iterations: must be all or among those of"),
        (("--save-dir", "{folder}"), "target must be absent or an empty folder"),
    ],
)
def test_what_is_wrong_beside_the_suite_is_told_before_a_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "model"), *(flag.format(folder=tmp_path) for flag in flags), "--tasks", "piqa"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
