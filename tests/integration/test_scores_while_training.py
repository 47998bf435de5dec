"""--evaluate-every: checkpoints of a running job are evaluated beside it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.published_benchmarks import write_published_data
from tests.helpers.repository import ROOT
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, environment, run


def test_a_run_on_two_stages_has_the_scores_of_its_last_checkpoint(tmp_path: Path) -> None:
    write_published_data(tmp_path / "data")
    tokenizer_model = train_toy_tokenizer(tmp_path)
    suite = tmp_path / "suite.toml"
    (tmp_path / "text.jsonl").write_text('{"text": "a small text"}\n{"text": "and one more of them"}\n')
    suite.write_text(
        f'tasks = ["piqa"]\ndata_dir = "{tmp_path / "data"}"\nlimit = 5\n'
        f'domains = {{ english = "{tmp_path / "text.jsonl"}" }}\n'
    )
    save = tmp_path / "save"
    flags = [
        *TOY_MODEL, *TOY_SCHEDULE, "--vocab-size", str(TOY_VOCAB_SIZE), "--mock-data", "--tokenizer-type",
        "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer_model), "--train-iters", "4", "--save", str(save),
        "--save-interval", "2", "--keep-last", "1", "--evaluate-every", "4", "--evaluate-suite", str(suite),
        "--tensorboard-dir", str(tmp_path / "tensorboard"), "--pipeline-model-parallel-size", "2",
    ]  # fmt: skip
    result = run(2, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [json.loads(text) for text in (save / "scores.jsonl").read_text().splitlines()]
    assert line["step"] == 4
    assert [(score["task"], score["metric"], score["num_questions"]) for score in line["scores"]] == [
        ("piqa", "acc", 5), ("piqa", "acc_norm", 5), ("english", "perplexity", 2), ("english", "bits_per_byte", 2),
    ]  # fmt: skip
    assert "step 4  evaluation: piqa/acc/0-shot" in result.stdout
    assert (save / "loss.png").stat().st_size > 0
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000004"]
    assert read_tensorboard(tmp_path / "tensorboard", "evaluation/piqa/acc/0-shot") == [(4, line["scores"][0]["value"])]


def read_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_an_evaluation_does_not_outlive_the_run_that_started_it() -> None:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "model", "--tasks", "piqa"]
    orphan = subprocess.run(
        [*command, "--parent-process", "1"], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert orphan.returncode == -signal.SIGKILL
