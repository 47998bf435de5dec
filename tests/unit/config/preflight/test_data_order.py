"""The check of the data order: its numbers are counted again from Megatron's own data sets."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.config import saved_run
from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.datasets import build_run_record
from megatron_hammer.config.preflight.data_order import describe_order_state
from megatron_hammer.config.training_state import RECORD_NAME
from megatron_hammer.data.order.review import describe_continuation
from megatron_hammer.data.order.run_order import plan_run_order
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import find, parse
from tests.helpers.sample_orders import build_datasets, draw_lengths, read_tokens, write_numbered

SEQ_LENGTH = 64
BATCH = 4
MODEL = ("--preset", "hammer-tiny", "--vocab-size", "1000000", "--seq-length", str(SEQ_LENGTH), "--eval-iters", "0")
MODEL += ("--micro-batch-size", "2", "--global-batch-size", str(BATCH), "--lr-warmup-iters", "1")
MODEL += ("--override-opt-param-scheduler",)
WHOLE = ("--split", "100,0,0")
NUM_STEPS = 12  # of the run that is resumed, 48 samples of the 67 in an epoch
Resume = Callable[..., Any]


def steps(count: int) -> tuple[str, ...]:
    return "--train-iters", str(count)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_numbered(tmp_path / "a", draw_lengths(0, 97))


@pytest.fixture
def other(tmp_path: Path) -> str:
    return write_numbered(tmp_path / "b", draw_lengths(1, 50))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a checkpoint of a run with these flags, of as much as the guard reads of one."""

    def write(*flags: str, step: int = NUM_STEPS, has_record: bool = True, **extra: Any) -> Path:
        arguments = parse(*MODEL, *flags)
        saved = arguments.namespace
        saved.consumed_train_samples, saved.iteration = step * saved.global_batch_size, step
        for name, value in extra.items():
            setattr(saved, name, value)
        if has_record:
            setattr(saved, RECORD_NAME, extra.get(RECORD_NAME, build_run_record(arguments.plan)))
        folder = tmp_path / "checkpoints"
        (folder / f"iter_{step:07d}").mkdir(parents=True, exist_ok=True)
        (folder / f"iter_{step:07d}" / ".metadata").touch()
        (folder / LATEST_FILE).write_text(str(step))
        saved_run.open_saved_run.cache_clear()
        opened = SimpleNamespace(args=saved, iteration=step)
        monkeypatch.setattr(saved_run, "open_checkpoint", lambda path: opened)
        monkeypatch.setattr(saved_run, "find_visible_damage", lambda directory, has_hash_check: [])
        return folder

    yield write
    saved_run.open_saved_run.cache_clear()


def tally(tokens: np.ndarray, size: int) -> np.ndarray:
    """How often each token of each source occurs: [2, size]."""
    return np.bincount(tokens[:, 0] * size + tokens[:, 1], minlength=2 * size).reshape(2, size)


def count_by_hand(
    old: list[tuple[ParsedArguments, int, int]], new: ParsedArguments, num_consumed: int, num_drawn: int
) -> dict[str, np.ndarray]:
    """What comes again, is skipped and is never seen, by source, of samples that real data sets return."""
    size = 10_000
    trained = sum(tally(read_tokens(build_datasets(run)[0], *bounds), size) for run, *bounds in old)
    dataset = build_datasets(new)[0]
    counted = tally(read_tokens(dataset, 0, num_consumed), size)
    rest = tally(read_tokens(dataset, num_consumed, num_drawn), size)
    return {
        "again": np.minimum(rest, np.maximum(trained - counted, 0)).sum(axis=1),
        "skipped": np.maximum(counted - trained, 0).sum(axis=1),
        "unseen": ((counted > 0) & (trained == 0) & (rest == 0)).sum(axis=1),
    }


def sentence(counts: dict[str, np.ndarray], *, held: int, consumed: int = NUM_STEPS * BATCH, length: int = 64) -> str:
    again, skipped, unseen = (int(counts[name].sum()) for name in ("again", "skipped", "unseen"))
    tokens = consumed * SEQ_LENGTH
    return (
        f"Of the {consumed:,} samples ({tokens:,} tokens) trained on so far, {again / length:,.0f} ({again:,} tokens, "
        f"{again / tokens:.1%}) would come again before their turn; of the rest, {skipped / length:,.0f} "
        f"({skipped:,} tokens, {skipped / held:.1%} of the training data) would be skipped, {unseen:,} tokens of them "
        "never seen."
    )


CHANGE_BACK = "Change it back, or pass --accept-data-order-change to continue in the new order."


def expect(
    problem: str, changes: str, numbers: str, folder: Path, *, more: str = "", remedy: str = CHANGE_BACK
) -> None:
    where = folder / f"iter_{NUM_STEPS:07d}"
    parts = [f"data-order: must be that of the checkpoint, got {changes} (in {where}).", numbers, more, remedy]
    assert problem == " ".join(part for part in parts if part)


# --- what stops a run -----------------------------------------------------------------------------------------------


def test_more_steps_within_the_epochs_are_no_change(data: str, checkpoint: Resume) -> None:
    """67 samples an epoch: 16 steps are still one; the 20 and 33 steps of two epochs differ by the threshold."""
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    for count in (13, 16):
        assert find(*MODEL, *flags, *steps(count), "--load", str(folder)) == []
    folder = checkpoint(*flags, *steps(20))
    assert find(*MODEL, *flags, *steps(24), "--load", str(folder)) == []
    (problem,) = find(*MODEL, *flags, *steps(33), "--load", str(folder))
    assert (
        f"got samples=132 (was 80); {data} with 2 epochs shuffled together (was 2 epochs shuffled together, the "
        in (problem)
    )


def test_more_steps_across_an_epoch_change_the_order(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    resumed = (*MODEL, *flags, *steps(40), "--load", str(folder))
    (problem,) = find(*resumed)
    old, new = parse(*MODEL, *flags, *steps(NUM_STEPS)), parse(*resumed)
    counts = count_by_hand([(old, 0, 48)], new, 48, 160)
    assert counts["again"].sum() > 500
    held = plan_run_order(new.plan.order).sources[0].epoch_tokens
    changes = f"samples=160 (was 48); {data} with 3 epochs shuffled together, the last apart (was one epoch)"
    remedy = (
        "Pass --data-order epochwise, which keeps the order, or pass --accept-data-order-change to continue in the new "
        "order."
    )
    expect(problem, changes, sentence(counts, held=held), folder, remedy=remedy)
    assert find(*resumed, "--accept-data-order-change") == []
    assert find(*resumed, "--data-order", "epochwise") == []


def test_several_epochs_are_continued_by_a_first_block(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(20))
    resumed = (*MODEL, *flags, *steps(40), "--load", str(folder))
    (problem,) = find(*resumed)
    assert "Pass --data-order epochwise --data-order-samples 80, which keeps the order, or" in problem
    assert find(*resumed, "--data-order", "epochwise", "--data-order-samples", "80") == []
    (problem,) = find(*resumed, "--data-order", "epochwise")
    assert f"got data_order=epochwise (was megatron); samples=160 (was 80); {data} with each of 3 epochs" in problem
    (problem,) = find(*MODEL, *flags, *steps(14), "--load", str(folder))
    assert "Pass --data-order-samples 80, which keeps the order, or" in problem
    assert find(*MODEL, *flags, *steps(14), "--load", str(folder), "--data-order-samples", "80") == []


def test_another_seed_is_refused(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, "--split", "90,10,0", *steps(NUM_STEPS))
    folder = checkpoint(*flags)
    resumed = (*MODEL, *flags, *steps(14), "--seed", "7", "--load", str(folder))
    (problem,) = find(*resumed)
    new = parse(*resumed)
    counts = count_by_hand([(parse(*MODEL, *flags), 0, 48)], new, 48, 56)
    assert counts["unseen"].sum() > 100, "within an epoch, what is skipped is never seen"
    held = plan_run_order(new.plan.order).sources[0].epoch_tokens
    expect(problem, "seed=7 (was 1234)", sentence(counts, held=held), folder)


def test_another_sequence_length_is_refused(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    resumed = (*MODEL, *flags, *steps(30), "--seq-length", "48", "--load", str(folder))
    (problem,) = find(*resumed)
    old, new = parse(*MODEL, *flags, *steps(NUM_STEPS)), parse(*resumed)
    counts = count_by_hand([(old, 0, 48)], new, 48, 120)
    numbers = sentence(counts, held=plan_run_order(new.plan.order).sources[0].epoch_tokens, length=48)
    changes = f"seq_length=48 (was 64); samples=120 (was 48); {data} with 2 epochs shuffled together, the last apart "
    expect(problem, f"{changes}(was one epoch)", numbers, folder)


def test_another_split_is_refused(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *steps(NUM_STEPS))
    folder = checkpoint(*flags, "--split", "90,10,0")
    resumed = (*MODEL, *flags, *steps(13), "--split", "80,20,0", "--load", str(folder))
    (problem,) = find(*resumed)
    old, new = parse(*MODEL, *flags, "--split", "90,10,0"), parse(*resumed)
    counts = count_by_hand([(old, 0, 48)], new, 48, 52)
    held = plan_run_order(new.plan.order).sources[0].epoch_tokens
    expect(problem, "split=80,20,0 (was 90,10,0)", sentence(counts, held=held), folder)
    assert find(*MODEL, *flags, "--split", "9,1,0", "--load", str(folder)) == [], "the same shares in other words"


def blend_of(first: float, data: str, second: float, other: str) -> tuple[str, ...]:
    return "--data-path", str(first), data, str(second), other, *WHOLE


def test_other_weights_are_refused(data: str, other: str, checkpoint: Resume) -> None:
    folder = checkpoint(*blend_of(0.7, data, 0.3, other), *steps(NUM_STEPS))
    resumed = (*MODEL, *blend_of(0.5, data, 0.5, other), *steps(13), "--load", str(folder))
    (problem,) = find(*resumed)
    old = parse(*MODEL, *blend_of(0.7, data, 0.3, other), *steps(NUM_STEPS))
    new = parse(*resumed)
    counts = count_by_hand([(old, 0, 48)], new, 48, 52)
    held = sum(source.epoch_tokens for source in plan_run_order(new.plan.order).sources)
    drawn = np.bincount(build_datasets(old)[0].dataset_index[:48])
    by_source = "; ".join(
        f"{prefix} {counts['again'][place]:,} tokens of {drawn[place] * 64:,} again, {counts['skipped'][place]:,} "
        f"skipped, {counts['unseen'][place]:,} never seen"
        for place, prefix in enumerate((data, other))
    )
    changes = f"{data} with weight 0.5 (was 0.7); {other} with weight 0.5 (was 0.3)"
    expect(problem, changes, sentence(counts, held=held), folder, more=f"By source: {by_source}.")
    assert find(*MODEL, *blend_of(7, data, 3, other), *steps(13), "--load", str(folder)) == [], "the same weights"


def test_another_source_is_refused(data: str, other: str, checkpoint: Resume) -> None:
    folder = checkpoint(*blend_of(0.7, data, 0.3, other), *steps(NUM_STEPS))
    (problem,) = find(*MODEL, "--data-path", "1", data, *WHOLE, *steps(13), "--load", str(folder))
    assert f"{data} with weight 1 (was 0.7); no {other} (in" in problem
    assert f"{other} 0 tokens of 960 again, 0 skipped, 0 never seen." in problem
    folder = checkpoint("--data-path", data, *WHOLE, *steps(NUM_STEPS))
    (problem,) = find(*MODEL, *blend_of(0.7, data, 0.3, other), *steps(13), "--load", str(folder))
    assert f"{data} with weight 0.7 (was 1); {other} as a new source (in" in problem


def test_sources_named_in_another_order(data: str, other: str, checkpoint: Resume) -> None:
    folder = checkpoint(*blend_of(1, data, 1, other), *steps(NUM_STEPS))
    (problem,) = find(*MODEL, *blend_of(1, other, 1, data), *steps(13), "--load", str(folder))
    assert f"got sources in the row {other}, {data} (was {data}, {other}) (in" in problem
    folder = checkpoint(*blend_of(0.618, data, 0.382, other), *steps(NUM_STEPS))
    assert find(*MODEL, *blend_of(0.382, other, 0.618, data), *steps(13), "--load", str(folder)) == []


# --- files ----------------------------------------------------------------------------------------------------------


def test_moved_files_are_no_change(data: str, tmp_path: Path, checkpoint: Resume) -> None:
    folder = checkpoint("--data-path", data, *WHOLE, *steps(NUM_STEPS))
    moved = str(tmp_path / "moved")
    for suffix in (".bin", ".idx"):
        shutil.move(data + suffix, moved + suffix)
    resumed = (*MODEL, "--data-path", moved, *WHOLE, *steps(13), "--load", str(folder))
    assert find(*resumed) == []
    state = describe_order_state(parse(*resumed).plan)
    assert state == f"megatron; as in the checkpoint (iter_0000012); {data} is now {moved}"


def test_changed_files_are_refused(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    resumed = (*MODEL, *flags, *steps(13), "--load", str(folder))
    write_numbered(Path(data), [*draw_lengths(0, 97), 70])
    (problem,) = find(*resumed)
    counts = {"again": np.zeros(1), "skipped": np.array([48 * 64]), "unseen": np.array([48 * 64])}
    held = plan_run_order(parse(*resumed).plan.order).sources[0].epoch_tokens
    by_source = (
        f"By source: {data} 0 tokens of 3,072 again, 0 skipped, 0 never seen; {data} 0 tokens of 0 again, 3,072 "
        "skipped, 3,072 never seen."
    )
    changes = f"{data} with other contents: num_documents=98 (was 97)"
    expect(problem, changes, sentence(counts, held=held), folder, more=by_source)
    write_numbered(Path(data), draw_lengths(0, 97)[::-1])
    (problem,) = find(*resumed)
    assert f"got {data} with other contents: as many documents and tokens, but not the same (in" in problem


def test_a_checkpoint_of_megatron_lm(data: str, checkpoint: Resume) -> None:
    """It has arguments, and no record of its files."""
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS), has_record=False)
    resumed = (*MODEL, *flags, *steps(13), "--load", str(folder))
    assert find(*resumed) == []
    assert_problem(
        describe_order_state(parse(*resumed).plan),
        "megatron; as in the checkpoint (iter_0000012)",
        "contents of the files were not compared",
    )
    (problem,) = find(*resumed, "--seed", "7")
    assert "could not be compared" in problem
    shutil.move(data + ".idx", data + "2.idx")
    shutil.move(data + ".bin", data + "2.bin")
    moved = (*MODEL, "--data-path", data + "2", *WHOLE, *steps(13), "--load", str(folder))
    assert find(*moved) == []
    assert "got seed=7 (was 1234)" in find(*moved, "--seed", "7")[0]


def test_a_checkpoint_without_data_arguments_is_not_compared(data: str, checkpoint: Resume) -> None:
    folder = checkpoint("--mock-data", *steps(NUM_STEPS))
    resumed = (*MODEL, "--data-path", data, *WHOLE, *steps(13), "--load", str(folder))
    assert find(*resumed) == []
    state = describe_order_state(parse(*resumed).plan)
    assert_problem(state, "megatron; not compared with iter_0000012", "do not tell its data")


# --- the record -----------------------------------------------------------------------------------------------------


def test_an_accepted_change_is_remembered(data: str, checkpoint: Resume) -> None:
    """12 steps in one order and 2 in another: the next count knows both."""
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    second = parse(*MODEL, *flags, *steps(14), "--seed", "7", "--load", str(folder))
    record = build_run_record(second.plan)
    assert [segment["first_sample"] for segment in record["segments"]] == [0, 48]
    assert describe_continuation(record, 48) == "data order: changed after sample 48, as accepted"
    folder = checkpoint(*flags, *steps(14), "--seed", "7", step=14, data_order_record=record)
    assert find(*MODEL, *flags, *steps(15), "--seed", "7", "--load", str(folder)) == []
    resumed = parse(*MODEL, *flags, *steps(16), "--seed", "9", "--load", str(folder))
    (problem,) = find(*MODEL, *flags, *steps(16), "--seed", "9", "--load", str(folder))
    first = parse(*MODEL, *flags, *steps(NUM_STEPS))
    counts = count_by_hand([(first, 0, 48), (second, 48, 56)], resumed, 56, 64)
    held = plan_run_order(resumed.plan.order).sources[0].epoch_tokens
    assert sentence(counts, held=held, consumed=56) in problem
    again = build_run_record(resumed.plan)
    assert [segment["first_sample"] for segment in again["segments"]] == [0, 48, 56]


def test_a_continued_record_has_the_newest_description(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    record = build_run_record(parse(*MODEL, *flags, *steps(16), "--load", str(folder)).plan)
    (segment,) = record["segments"]
    assert (segment["first_sample"], segment["order"]["num_samples"]) == (0, 64)
    assert describe_continuation(record, 48) == "data order: as in the checkpoint"
    assert describe_continuation(record, 0) is None
    assert describe_continuation(None, 48) is None
    folder = checkpoint("--mock-data", *steps(NUM_STEPS))
    unknown = build_run_record(parse(*MODEL, *flags, *steps(16), "--load", str(folder)).plan)
    assert_problem(describe_continuation(unknown, 48) or "", "data order: recorded from sample 48", "does not tell")


def test_changed_validation_samples_are_reported(data: str, checkpoint: Resume) -> None:
    """More steps are more evaluations, from another number of epochs; the epochwise order keeps them."""
    flags = ("--data-path", data, "--split", "80,20,0", "--eval-iters", "2", "--eval-interval", "2")
    drawn = {}
    for order in ("megatron", "epochwise"):
        runs = [(*MODEL, *flags, *steps(count), "--data-order", order) for count in (10, 12)]
        folder = checkpoint(*runs[0][len(MODEL) :], step=10)
        resumed = (*runs[1], "--load", str(folder))
        assert find(*resumed) == []
        validation = [read_tokens(build_datasets(parse(*flags))[1], 0, 10) for flags in runs]
        drawn[order] = np.array_equal(*validation)
        state = describe_order_state(parse(*resumed).plan)
        line = describe_continuation(build_run_record(parse(*resumed).plan), 40)
        note = "" if drawn[order] else "; the order of the validation samples has changed"
        assert state == f"{order}; as in the checkpoint (iter_0000010){note}"
        assert line == f"data order: as in the checkpoint{note}"
    assert drawn == {"megatron": False, "epochwise": True}


# --- settings that do not fit ---------------------------------------------------------------------------------------


def test_a_pinned_order_must_be_long_enough(data: str, other: str) -> None:
    model = tuple(flag for flag in MODEL if flag != "--override-opt-param-scheduler")  # of resumed runs
    flags = (*model, "--data-path", data, *WHOLE, *steps(20))
    (problem,) = find(*flags, "--data-order-samples", "79")
    assert_problem(
        problem, "data-order-samples:", "at least the 80 samples", "got data_order_samples=79", "--data-order epochwise"
    )
    assert find(*flags, "--data-order-samples", "80") == []
    assert find(*flags, "--data-order-samples", "48", "--data-order", "epochwise") == []


def test_a_changed_batch_may_leave_a_run_without_samples(data: str, checkpoint: Resume) -> None:
    """Megatron would stop in the middle: 12 steps of 4 and 8 of 2 are more than the 20 x 2 that it asks for."""
    flags = ("--data-path", "1", data, *WHOLE)
    folder = checkpoint(*flags, *steps(16))
    resumed = (*MODEL, *flags, *steps(20), "--global-batch-size", "2", "--load", str(folder))
    (problem,) = find(*resumed)
    assert_problem(
        problem,
        "data-order:",
        "must hold all samples",
        "got 40 samples, 64 needed",
        "drawn 48",
        "--data-order-samples 64",
        "--data-order epochwise",
    )
    assert find(*resumed, "--data-order-samples", "64") == []
    assert find(*resumed, "--data-order", "epochwise") == []
    arguments = parse(*resumed, "--data-order", "epochwise")
    namespace = arguments.namespace
    namespace.iteration, namespace.consumed_train_samples, namespace.consumed_valid_samples = 12, 48, 0
    assert len(build_datasets(arguments)[0]) == 64


def test_a_complete_run_may_be_started_again(data: str) -> None:
    """A blend holds no sample more than it is asked for, and Megatron refuses to start with none left."""
    arguments = parse(*MODEL, "--data-path", "1", data, *WHOLE, *steps(NUM_STEPS))
    namespace = arguments.namespace
    assert len(build_datasets(arguments)[0]) == 48
    namespace.iteration, namespace.consumed_train_samples, namespace.consumed_valid_samples = NUM_STEPS, 48, 0
    assert len(build_datasets(arguments)[0]) == 49


def test_validation_does_not_end_before_the_run(data: str) -> None:
    """A run that was evaluated more often before: Megatron counts by the present interval and stops in the middle."""
    evaluated = (*MODEL, "--data-path", "1", data, "--split", "80,20,0", "--eval-iters", "2")
    arguments = parse(*evaluated, *steps(12), "--eval-interval", "4")
    namespace = arguments.namespace
    assert len(build_datasets(arguments)[1]) == 4 * 2 * BATCH
    namespace.iteration, namespace.consumed_train_samples = 8, 32
    namespace.consumed_valid_samples = 2 * 2 * BATCH
    assert len(build_datasets(arguments)[1]) == 4 * 2 * BATCH, "as before: every fourth step and at the end"
    namespace.consumed_valid_samples = 8 * 2 * BATCH
    assert len(build_datasets(arguments)[1]) == (8 + 2) * 2 * BATCH


def test_a_shuffling_loader_is_not_compared(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    resumed = (*MODEL, *flags, *steps(40), "--dataloader-type", "cyclic", "--load", str(folder))
    assert find(*resumed) == []
    state = describe_order_state(parse(*resumed).plan)
    assert state.startswith("megatron; not compared with iter_0000012 (--dataloader-type")


def test_nothing_is_compared_without_a_checkpoint_or_its_samples(data: str, checkpoint: Resume) -> None:
    flags = ("--data-path", data, *WHOLE)
    folder = checkpoint(*flags, *steps(NUM_STEPS))
    assert find(*MODEL, *flags, *steps(40), "--seed", "7", "--load", str(folder), "--finetune") == []
    assert describe_order_state(parse(*MODEL, *flags, *steps(40)).plan) == "megatron"
    assert describe_order_state(parse(*MODEL, "--mock-data", *steps(40)).plan) is None


def test_the_dry_run_reports_the_data_order(data: str, other: str, checkpoint: Resume) -> None:
    from megatron_hammer.config.dry_run.dry_run import build_dry_run_report, print_report

    folder = checkpoint(*blend_of(0.7, data, 0.3, other), *steps(NUM_STEPS))
    flags = (*MODEL, *blend_of(0.7, data, 0.3, other), *steps(60), "--load", str(folder), "--dry-run")
    run = build_dry_run_report(parse(*flags), []).run
    assert run.data_order == "megatron; not as in the checkpoint (iter_0000012)"
    assert [source.shuffling for source in run.sources] == [
        "3 epochs shuffled together, the last apart",
        "3 epochs shuffled together, the last apart",
    ]
    arguments = parse(*flags, "--data-order", "epochwise")
    stream = io.StringIO()
    print_report(build_dry_run_report(arguments, []), stream)
    text = " ".join(stream.getvalue().split())
    assert "data order epochwise; as in the checkpoint (iter_0000012)" in text
    accepted = build_dry_run_report(parse(*flags, "--accept-data-order-change"), []).run.data_order
    assert accepted == "megatron; not as in the checkpoint (iter_0000012), accepted"
    mock = build_dry_run_report(parse(*MODEL, "--mock-data", *steps(20), "--dry-run"), []).run
    assert (mock.data_order, mock.sources) == (None, ())
