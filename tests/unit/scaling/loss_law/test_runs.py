"""Points of a loss law from training's files and from tables: which loss, which size, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.model.accounting import count_active_parameters, count_flops_per_token, count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.loss_law.law import LossRun
from megatron_hammer.scaling.loss_law.runs import ReadOptions, count_size, leave_out, read_metrics_runs, read_table
from tests.helpers.messages import assert_problems, raises_problem

TINY = PRESETS["hammer-tiny"].model
SEQ_LENGTH = 64


def write_run(
    folder: Path,
    *,
    losses: list[float],
    model: ModelShape = TINY,
    validations: dict[str, float] | None = None,
    last_lr_ratio: float = 0.1,
) -> Path:
    """A folder as training leaves it: 8 samples of 64 tokens per step; validations at the last step."""
    folder.mkdir(parents=True)
    rate = 1234.5
    lines = []
    for step, loss in enumerate(losses, 1):
        line: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "num_samples": 8 * step,
            "num_tokens": 8 * SEQ_LENGTH * step,
        }
        line["lr"] = 1e-3 * (1 + (last_lr_ratio - 1) * (step - 1) / max(1, len(losses) - 1))
        line["tokens_per_s_per_gpu"] = rate
        line["model_tflops_per_gpu"] = rate * count_flops_per_token(model, SEQ_LENGTH, "A") / 1e12
        line["mfu_convention"] = "A"
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    objects = [
        {"step": step, "validation_set": name, "loss": loss}
        for name, loss in (validations or {}).items()
        for step in (len(losses) // 2, len(losses))
    ]
    if objects:
        (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in objects), encoding="utf8")
    return folder


def read(*specs: str, **options: Any) -> list[LossRun]:
    return read_metrics_runs(specs, ReadOptions(**options), read_hf_model=refuse_folders)


def refuse_folders(path: Path) -> ModelShape:
    raise AssertionError(f"{path} is no Hugging Face folder")


FALLING = [8.0, 7.0, 6.0, 5.5, 5.2, 5.0, 4.9, 4.8, 4.75, 4.7]


def test_training_loss_is_the_mean_of_a_stated_window(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING)
    (run,) = read(f"hammer-tiny={folder}", window_ratio=0.3)
    assert run.loss == pytest.approx((4.8 + 4.75 + 4.7) / 3)
    assert run.loss_source == "mean training loss of the last 3 of 10 steps"
    assert (run.name, run.num_tokens, run.num_parameters) == ("a", 10 * 8 * SEQ_LENGTH, count_parameters(TINY))
    assert run.tokenizer == "a vocabulary of 4,096"
    assert run.notes == ()


def test_validation_is_preferred_where_every_run_has_it(tmp_path: Path) -> None:
    with_one = write_run(tmp_path / "a", losses=FALLING, validations={"validation": 4.9, "test": 1.0})
    without = write_run(tmp_path / "b", losses=FALLING)
    (run,) = read(f"hammer-tiny={with_one}")
    assert (run.loss, run.loss_source) == (4.9, "loss of validation at step 10")
    assert [run.loss_source for run in read(f"hammer-tiny={with_one}", f"hammer-tiny={without}")] == [
        "mean training loss of the last 1 of 10 steps"
    ] * 2
    (run,) = read(f"hammer-tiny={with_one}", loss="training")
    assert run.loss == 4.7


def test_one_of_several_validation_sets_is_chosen_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING, validations={"zh": 4.9, "en": 3.9})
    (run,) = read(f"hammer-tiny={folder}", validation_set="en")
    assert run.loss == 3.9
    with raises_problem(DataError, f"{folder / 'validation.jsonl'}:", "one", "got en, zh", "--validation-set"):
        read(f"hammer-tiny={folder}")


def test_a_vocabulary_of_the_runs_own(tmp_path: Path) -> None:
    trained = replace(TINY, vocab_size=1000)
    folder = write_run(tmp_path / "a", losses=FALLING, model=trained)
    (run,) = read(f"hammer-tiny@1000={folder}", flops="B")
    assert run.num_parameters == count_parameters(TINY, 1000)
    assert run.flops_per_token == count_flops_per_token(trained, SEQ_LENGTH, "B")
    assert run.tokenizer == "a vocabulary of 1,000"


@pytest.mark.parametrize(
    "other, hint",
    [
        (replace(TINY, vocab_size=1000), "hammer-tiny@1000"),
        (replace(TINY, hidden_size=128), ""),
    ],
)
def test_a_run_of_another_model_is_refused(tmp_path: Path, other: ModelShape, hint: str) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING, model=other)
    flops, own_flops = (count_flops_per_token(model, SEQ_LENGTH, "A") for model in (other, TINY))
    facts = ("a run of hammer-tiny,", f"got {flops:,} FLOPs per token", f"4,096 has {own_flops:,}", hint)
    with raises_problem(DataError, f"{folder / 'metrics.jsonl'}:", *facts):
        read(f"hammer-tiny={folder}")


def test_a_number_of_parameters_stands_for_a_model(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING)
    (run,) = read(f"1.5e6={folder / 'metrics.jsonl'}")
    assert (run.num_parameters, run.tokenizer, run.flops_per_token) == (1_500_000, None, None)
    with raises_problem(DataError, "parameters:", "total", "got non-embedding for 1,500,000"):
        read(f"1.5e6={folder}", parameters="non-embedding")


def test_a_hugging_face_folder_stands_for_a_model(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING)
    (tmp_path / "hf").mkdir()
    (run,) = read_metrics_runs([f"{tmp_path / 'hf'}={folder}"], ReadOptions(), read_hf_model=lambda path: TINY)
    assert run.num_parameters == count_parameters(TINY)


def test_a_line_that_a_kill_cut_off_is_dropped_and_any_other_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING)
    path = folder / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"step": 11, "lo')
    (run,) = read(f"hammer-tiny={folder}")
    assert run.num_tokens == 10 * 8 * SEQ_LENGTH
    path.write_text("nonsense\n" + text)
    with raises_problem(DataError, f"{path}:1:", "step and loss", "got 'nonsense'"):
        read(f"hammer-tiny={folder}")


def test_a_schedule_that_was_cut_off_is_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING, last_lr_ratio=0.8)
    (run,) = read(f"hammer-tiny={folder}")
    assert_problems(run.notes, ("ended at 80% of its highest learning rate",))


def test_all_diverged_runs_are_named_at_once(tmp_path: Path) -> None:
    nan = write_run(tmp_path / "nan", losses=[8.0, 7.0, math.nan])
    up = write_run(tmp_path / "up", losses=[8.0, 5.0, 9.0])
    good = write_run(tmp_path / "good", losses=FALLING)
    with pytest.raises(DataError) as caught:
        read(*(f"hammer-tiny={folder}" for folder in (nan, good, up)))
    assert_problems(
        caught.value.problems,
        (f"{nan / 'metrics.jsonl'}:", "run nan must end", "got nan over its last 1 steps", "--leave-out nan"),
        (f"{up / 'metrics.jsonl'}:", "run up must end", "got 9.0000 after 5.0000", "--leave-out up"),
    )


@pytest.mark.parametrize(
    "spec, problem",
    [
        ("runs/a", ("runs:", "MODEL=PATH", "got 'runs/a'", "a Hugging Face folder")),
        ("hammer-tiny=nowhere", ("nowhere:", "metrics.jsonl", "got no such file", "--runs")),
    ],
)
def test_specs_that_name_no_run_are_refused(spec: str, problem: tuple[str, ...]) -> None:
    with raises_problem(DataError, *problem):
        read(spec)


def test_validation_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=FALLING)
    with raises_problem(DataError, f"{folder / 'validation.jsonl'}:", "last step, 10", "got none", "--loss training"):
        read(f"hammer-tiny={folder}", loss="validation")


def test_sizes_without_embeddings() -> None:
    assert count_size(TINY, "total") == count_parameters(TINY)
    assert count_size(TINY, "non-embedding") == count_parameters(TINY) - 2 * 4096 * 256
    gpt2 = PRESETS["gpt2-124m"].model  # tied, with learned positions
    assert count_size(gpt2, "non-embedding") == count_parameters(gpt2) - (50_257 + 1024) * 768
    mixture = PRESETS["hammer-tiny-moe"].model
    assert count_size(mixture, "total") == count_active_parameters(mixture) < count_parameters(mixture)


def test_a_table_with_and_without_names(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text('num_parameters,num_tokens,loss,run,tokenizer\n4.8e6,1e9,3.5,a,t\n"1,000",2000,nan,,\n')
    first, second = read_table(path)
    assert (first.name, first.num_parameters, first.num_tokens, first.loss, first.tokenizer) == (
        "a",
        4_800_000,
        1_000_000_000,
        3.5,
        "t",
    )
    assert (second.name, second.num_parameters, second.source) == ("line-3", 1000, f"{path}:3")
    assert math.isnan(second.loss), "kept, so that the fit can name the run that diverged"


def test_problems_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text("num_parameters,loss\n1,2\n")
    with raises_problem(DataError, f"{path}:1:", "columns num_parameters, num_tokens, loss", "got no num_tokens"):
        read_table(path)
    path.write_text("num_parameters,num_tokens,loss\n1,many,2\n,5,2\n")
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert_problems(
        caught.value.problems,
        (f"{path}:2:", "num_tokens must be a number", "got 'many'"),
        (f"{path}:3:", "num_parameters must be a number", "got ''"),
    )
    with pytest.raises(DataError, match=r"absent\.csv: file cannot be read \(No such file or directory\)"):
        read_table(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("table", "line", "fact"),
    [
        ("num_parameters;num_tokens;loss\n1;2;3\n", 1, "separated by commas, got semicolons"),
        ("num_parameters\tnum_tokens\tloss\n1\t2\t3\n", 1, "separated by commas, got tabs"),
        # A decimal comma must not become a hundredfold loss, nor a column be shifted by it.
        ('num_parameters,num_tokens,loss\n1,2,"3,21"\n', 2, "loss must be a number, got '3,21'"),
        ('num_parameters,num_tokens,loss\n"1,5",2,3\n', 2, "num_parameters must be a number, got '1,5'"),
        ("num_parameters,num_tokens,loss\n1,2,3,21\n", 2, "cell for each of 3 columns, got 4"),
        ("num_parameters,num_tokens,loss,loss\n1,2,3,4\n", 1, "each column once, got loss twice"),
        ("num_parameters,num_tokens,loss\n1,=2+3,3\n", 2, "num_tokens must be a number, got '=2+3'"),
    ],
)
def test_tables_of_spreadsheets_that_would_be_read_wrongly(tmp_path: Path, table: str, line: int, fact: str) -> None:
    path = tmp_path / "losses.csv"
    path.write_text(table)
    with raises_problem(DataError, f"{path}:{line}:", fact):
        read_table(path)


def test_groups_of_digits_and_lines_inside_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    lines = 'num_parameters,num_tokens,loss,run\r\n"1,234,567",1_000,3.5,"a\u2028\nb"\r\n1e6,"2,000",3.25,c\r\n'
    path.write_bytes(lines.encode())
    first, second = read_table(path)
    assert (first.num_parameters, first.num_tokens, first.loss) == (1_234_567, 1000, 3.5)
    assert (second.num_tokens, second.source) == (2000, f"{path}:4")


def test_a_cell_that_is_too_large_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_text(f"num_parameters,num_tokens,loss\n{'9' * 200_000},1,1\n")
    with raises_problem(DataError, f"{path}:", "must be a CSV file", "field limit"):
        read_table(path)


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    path.write_bytes("num_parameters,num_tokens,loss,run\n1,2,3,größe\n".encode("latin-1"))
    with raises_problem(DataError, f"{path}:", "UTF-8", "got invalid start byte at byte 43"):
        read_table(path)


def test_a_run_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    spec = f"hammer-tiny={write_run(tmp_path / 'a', losses=FALLING)}"
    with raises_problem(DataError, "runs:", "once", f"got {spec} twice"):
        read(spec, spec)


def test_a_step_that_was_skipped_on_the_way_is_no_divergence(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", losses=[8.0, math.nan, *FALLING])
    (run,) = read(f"hammer-tiny={folder}")
    assert run.loss == 4.7


def test_runs_are_left_out_by_name() -> None:
    assert leave_out([1, 2, 3], ["a", "b", "c"], ["b"]) == [1, 3]
    with raises_problem(ConfigError, "leave-out:", "given runs", "got d.", "a, b, c"):
        leave_out([1, 2, 3], ["a", "b", "c"], ["d"])
