"""The numpy model of Megatron's order against Megatron's own data sets, element by element, and the epochwise order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.data.order.order import DataOrder, EpochPlan, build_source_order, count_samples, plan_epochs
from megatron_hammer.data.order.run_order import plan_run_order
from tests.helpers.parsed_flags import parse
from tests.helpers.sample_orders import build_datasets, draw_lengths, read_tokens, write_numbered

LENGTHS = draw_lengths(0, 97)
SEQ_LENGTH = 64
FLAGS = ("--preset", "hammer-tiny", "--vocab-size", "1000000", "--seq-length", str(SEQ_LENGTH))
FLAGS += ("--micro-batch-size", "1", "--global-batch-size", "1", "--eval-iters", "2", "--lr-warmup-iters", "1")


def run(num_samples: int, *flags: str) -> ParsedArguments:
    return parse(*FLAGS, "--train-iters", str(num_samples), "--eval-interval", str(num_samples), *flags)


def order_of(source: Any, order: DataOrder) -> tuple[np.ndarray, np.ndarray]:
    documents = np.arange(source.first_sequence, source.last_sequence, dtype=np.int32)
    return build_source_order(
        documents, source.epochs, source.epoch_tokens, order.seq_length, seed=order.seed
    )  # fmt: skip


def assert_is_order_of(dataset: Any, source: Any, order: DataOrder, lengths: list[int]) -> None:
    """Document, sample and shuffle index; a sample begins where seq_length times its number falls in the stream."""
    document_order, sample_order = order_of(source, order)
    assert np.array_equal(document_order, dataset.document_index)
    assert np.array_equal(sample_order, dataset.shuffle_index)
    assert sample_order.dtype == dataset.shuffle_index.dtype
    assert source.count_samples(order.seq_length) == len(dataset) == len(dataset.shuffle_index)
    stream = np.concatenate([[0], np.cumsum(np.array(lengths)[document_order])])
    starts = stream[dataset.sample_index[:, 0]] + dataset.sample_index[:, 1]
    assert np.array_equal(starts, np.arange(len(dataset) + 1) * order.seq_length)


# 66 samples an epoch, or 59 of the nine tenths: within an epoch, at its end, below and above the threshold of 0.8.
@pytest.mark.parametrize("num_samples", [1, 40, 58, 59, 66, 67, 70, 105, 107, 118, 119, 125, 133, 300])
@pytest.mark.parametrize("split", ["100,0,0", "90,10,0"])
def test_one_source(tmp_path: Path, num_samples: int, split: str) -> None:
    data = write_numbered(tmp_path / "a", LENGTHS)
    arguments = run(num_samples, "--data-path", data, "--split", split)
    (train, *_), order = build_datasets(arguments, (num_samples, 1, 1)), plan_run_order(arguments.plan.order)
    assert_is_order_of(train, order.sources[0], order, LENGTHS)
    assert order.num_available == len(train)


def test_the_run_lengths_cover_every_epoch_plan() -> None:
    plans = {plan_epochs(count, sum(LENGTHS), SEQ_LENGTH) for count in range(1, 400)}
    assert {(plan.num_epochs, plan.is_last_apart) for plan in plans} >= {(1, False), (2, True), (2, False), (3, True)}


@pytest.mark.parametrize(
    "broken",
    [
        {"seed": 1235},
        {"epochs": EpochPlan(num_epochs=2, num_joint_epochs=2, is_last_apart=False)},
        {"epochs": EpochPlan(num_epochs=2, num_joint_epochs=1, is_last_apart=False)},
    ],
)
def test_a_wrong_order_is_noticed(tmp_path: Path, broken: dict[str, Any]) -> None:
    data = write_numbered(tmp_path / "a", LENGTHS)
    arguments = run(70, "--data-path", data, "--split", "100,0,0")
    (train, *_), order = build_datasets(arguments, (70, 1, 1)), plan_run_order(arguments.plan.order)
    source = order.sources[0]
    assert source.epochs == EpochPlan(num_epochs=2, num_joint_epochs=2, is_last_apart=True)
    if "epochs" in broken:
        source = replace(source, **broken)
    else:
        order = replace(order, **broken)
    with pytest.raises(AssertionError):
        assert_is_order_of(train, source, order, LENGTHS)


BLENDS = [
    ("0.7", "a", "0.3", "b"),
    ("3", "a", "2", "b", "1.7", "c"),
    ("1", "a"),
    ("a", "b", "c"),
]


@pytest.mark.parametrize("words", BLENDS, ids=" ".join)
@pytest.mark.parametrize("num_samples", [30, 75, 140])
@pytest.mark.parametrize("is_own", [False, True])
def test_blends(tmp_path: Path, words: tuple[str, ...], num_samples: int, is_own: bool) -> None:
    lengths = {"a": LENGTHS, "b": draw_lengths(1, 50), "c": draw_lengths(2, 41, longest=200)}
    blend = [write_numbered(tmp_path / word, lengths[word]) if word in lengths else word for word in words]
    flags = ("--train-data-path", *blend) if is_own else ("--data-path", *blend, "--split", "100,0,0")
    arguments = run(num_samples, *flags)
    (train, *_), order = build_datasets(arguments, (num_samples, 1, 1)), plan_run_order(arguments.plan.order)
    assert order.num_available == len(train)
    if not order.is_blend:
        assert is_own
        assert_is_order_of(train, order.sources[0], order, lengths["a"])
        return
    sources, samples = order.draw(len(train))
    assert np.array_equal(sources, train.dataset_index)
    assert np.array_equal(samples, train.dataset_sample_index)
    for part, source in zip(train.datasets, order.sources, strict=True):
        assert_is_order_of(part, source, order, lengths[Path(source.prefix).name])


# --- the epochwise order --------------------------------------------------------------------------------------------

EPOCHWISE = ("--data-order", "epochwise")


def test_megatrons_first_epoch_is_the_epochwise_one(tmp_path: Path) -> None:
    data = ("--data-path", write_numbered(tmp_path / "a", LENGTHS), "--split", "100,0,0")
    (megatron, *_), (epochwise, *_) = (build_datasets(run(50, *data, *flags)) for flags in ((), EPOCHWISE))
    num_samples = len(megatron)
    assert type(megatron).__name__ != type(epochwise).__name__
    assert num_samples == len(epochwise) == count_samples(1, sum(LENGTHS), SEQ_LENGTH)
    assert np.array_equal(read_tokens(megatron, 0, num_samples), read_tokens(epochwise, 0, num_samples))


@pytest.mark.parametrize("words", [("a",), ("0.7", "a", "0.3", "b")], ids=" ".join)
def test_extension_keeps_the_epochwise_order(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Training, validation and test samples; Megatron's own order is the twin that fails."""
    lengths = {"a": LENGTHS, "b": draw_lengths(1, 50)}
    blend = [write_numbered(tmp_path / word, lengths[word]) if word in lengths else word for word in words]
    drawn: dict[tuple[str, ...], list[list[np.ndarray]]] = {}
    for flags in (EPOCHWISE, ()):
        for num_samples in (50, 75, 140, 300):
            arguments = run(num_samples, "--data-path", *blend, "--split", "80,15,5", *flags)
            datasets = build_datasets(arguments, (num_samples, num_samples // 5, 3))
            counts = (50, 10, 3)
            tokens = [read_tokens(part, 0, count) for part, count in zip(datasets, counts, strict=True)]
            drawn.setdefault(flags, []).append(tokens)
    first, *longer = drawn[EPOCHWISE]
    assert all(np.array_equal(mine, other) for tokens in longer for mine, other in zip(first, tokens, strict=True))
    first, *longer = drawn[()]
    num_changed = [int((mine != first[0]).any(axis=1).sum()) for mine, *_ in longer]
    assert min(num_changed[1:]) > 0.9 * len(first[0]), "Megatron's order must change, or nothing is shown"


def test_no_token_comes_again_before_its_epoch_is_over(tmp_path: Path) -> None:
    data = write_numbered(tmp_path / "a", LENGTHS)
    train, *_ = build_datasets(run(300, "--data-path", data, "--split", "100,0,0", *EPOCHWISE))
    num_tokens = sum(LENGTHS)
    seen = np.zeros(num_tokens, dtype=np.int64)
    for position in range(len(train)):
        tokens = train[position]["tokens"].numpy()
        np.add.at(seen, tokens, 1)
        assert seen.max() - seen.min() <= 1 or position in [count_samples(e, num_tokens, SEQ_LENGTH) for e in range(6)]
    assert seen.min() >= 4
    orders = [tuple(train.document_index[epoch * 97 : (epoch + 1) * 97]) for epoch in range(5)]
    assert len(set(orders)) == 5
    assert all(sorted(order) == list(range(97)) for order in orders)


def test_a_first_block_in_megatrons_order(tmp_path: Path) -> None:
    """A run of several of Megatron's epochs continues epoch by epoch, each source of a blend after its own number."""
    blend = ["0.6", write_numbered(tmp_path / "a", LENGTHS), "0.4", write_numbered(tmp_path / "b", draw_lengths(1, 30))]
    data = ("--data-path", *blend, "--split", "100,0,0")
    before, *_ = build_datasets(run(120, *data))
    after, *_ = build_datasets(run(400, *data, *EPOCHWISE, "--data-order-samples", "120"))
    assert [source.epochs.num_joint_epochs for source in plan_run_order(run(120, *data).plan.order).sources] == [2, 3]
    assert np.array_equal(read_tokens(before, 0, 120), read_tokens(after, 0, 120))
    without, *_ = build_datasets(run(400, *data, *EPOCHWISE))
    assert not np.array_equal(read_tokens(before, 0, 120), read_tokens(without, 0, 120))


def test_a_pinned_order_of_megatrons(tmp_path: Path) -> None:
    data = ("--data-path", write_numbered(tmp_path / "a", LENGTHS), "--split", "100,0,0")
    pinned = [build_datasets(run(count, *data, "--data-order-samples", "250"))[0] for count in (50, 75, 140, 250)]
    longest, *_ = build_datasets(run(250, *data))
    assert all(np.array_equal(dataset.shuffle_index, longest.shuffle_index) for dataset in pinned)


def test_each_order_has_its_own_cache(tmp_path: Path) -> None:
    data = ("--data-path", write_numbered(tmp_path / "a", LENGTHS), "--split", "90,10,0")
    data += ("--data-cache-path", str(tmp_path / "cache"))
    flags = [(), EPOCHWISE, (*EPOCHWISE, "--data-order-samples", "100")]
    first = [read_tokens(build_datasets(run(200, *data, *more))[0], 0, 200) for more in flags]
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert not [name for name in files if "partial" in name]
    assert sum("EpochwiseGPTDataset-train-shuffle_index" in name for name in files) == 2
    again = [read_tokens(build_datasets(run(200, *data, *more))[0], 0, 200) for more in flags]
    assert all(np.array_equal(mine, other) for mine, other in zip(first, again, strict=True))
    assert len({tokens.tobytes() for tokens in first}) == 3
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == files


def test_json_keeps_an_order(tmp_path: Path) -> None:
    data = write_numbered(tmp_path / "a", LENGTHS)
    order = plan_run_order(
        run(70, "--data-path", "1", data, "--split", "90,10,0", *EPOCHWISE).plan.order, is_identified=True
    )
    assert DataOrder.from_json(order.to_json()) == order
