"""Conversations that cannot be trained on as asked are refused before the run, each with what to do."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.config.dry_run.dry_run import build_dry_run_report
from megatron_hammer.config.dry_run.tables import describe_conversations
from megatron_hammer.data.conversations.pair import mask_prefix
from megatron_hammer.data.indexed.pair import idx_path
from megatron_hammer.presets.hammer import HAMMER_TINY
from megatron_hammer.presets.preset import LLAMA_2_SFT
from tests.helpers.parsed_flags import find, parse
from tests.helpers.toy_conversations import draw_conversations, write_conversations

VOCAB_SIZE = HAMMER_TINY.model.vocab_size
LENGTH = 40
FLAGS = (
    *("--preset", "hammer-tiny", "--sft", "--seq-length", str(LENGTH), "--global-batch-size", "4"),
    *("--eval-iters", "0", "--split", "100,0,0"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("conversations")
    conversations = draw_conversations(60, vocab_size=VOCAB_SIZE, longest=LENGTH + 1)
    return write_conversations(folder / "c", conversations, vocab_size=VOCAB_SIZE)


def test_epochs_become_steps_and_the_recipe_is_that_of_fine_tuning(data: str) -> None:
    arguments = parse(*FLAGS, "--data-path", data)
    plan = arguments.require_plan()
    (report,) = [build_dry_run_report(arguments, ()).run]
    found = report.conversations
    assert found.num_conversations == 60
    assert plan.num_steps == -(-HAMMER_TINY.sft.num_epochs * found.num_sequences // 4)
    assert (plan.schedule.lr, plan.schedule.lr_warmup_fraction) == (HAMMER_TINY.sft.lr, 0.05)
    assert arguments.namespace.calculate_per_token_loss
    assert report.epochs == pytest.approx(plan.num_steps * 4 / found.num_sequences)
    assert f"60 in {found.num_sequences} sequences (packed conversations)" in describe_conversations(found)


def test_flags_replace_the_recipe(data: str) -> None:
    plan = parse(*FLAGS, "--data-path", data, "--train-iters", "9", "--lr", "1e-3", "--lr-warmup-iters", "2").plan
    assert plan.num_steps == 9
    assert plan.sft.num_epochs is None
    assert (plan.schedule.lr, plan.schedule.lr_warmup_iters, plan.schedule.lr_warmup_fraction) == (1e-3, 2, None)
    half = parse(*FLAGS, "--data-path", data, "--sft-epochs", "0.5", "--sft-unpacked").plan
    assert half.num_steps == -(-60 // 8)
    assert parse("--preset", "llama2-7b", "--sft").namespace.lr == LLAMA_2_SFT.lr


def check(data: str, *flags: str, match: str) -> None:
    problems = find(*FLAGS, "--data-path", data, *flags)
    assert any(re.search(match, problem) for problem in problems), problems


def test_a_good_run_has_no_problem(data: str) -> None:
    assert find(*FLAGS, "--data-path", data) == []
    assert find(*FLAGS, "--data-path", data, "--sft-unpacked") == []


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--seq-length 20", r"seq-length: must hold .* got seq_length=20, \d+ of 60 .* --sft-truncate"),
        (
            "--seq-length 2 --sft-truncate",
            r"sft-truncate: must leave every conversation a token to learn, got seq_length=2",
        ),
        ("--global-batch-size 64", "must fill one step, got .* global_batch_size=64"),
        ("--sft-epochs 0", "sft-epochs: must be above 0"),
        ("--train-iters 50000", "must not be read more than 1,000 times"),
        ("--split 99.9,0.1,0 --eval-iters 2", "its valid split must hold a conversation, got none"),
        ("--vocab-size 4000", "vocab-size: must be that of the data's tokenizer"),
        ("--mock-data", "mock-data: makes random text"),
        ("--reset-position-ids", "reset-position-ids: acts on documents of text"),
        ("--eod-mask-loss", "eod-mask-loss: masks the ends of documents"),
        ("--dataloader-type cyclic", "dataloader-type: would shuffle"),
        ("--data-order epochwise", "data-order: is for text"),
        ("--sft-epochs 2 --train-iters 5", "sft-epochs: gives the length of the run, as --train-iters"),
        ("--sft-tokenizer-prompt-format x", "sft-tokenizer-prompt-format: has no effect"),
    ],
)
def test_what_is_refused(data: str, flags: str, match: str) -> None:
    check(data, *flags.split(), match=match)


def test_cut_conversations_are_counted(data: str) -> None:
    arguments = parse(*FLAGS, "--data-path", data, "--seq-length", "20", "--sft-truncate")
    found = build_dry_run_report(arguments, ()).run.conversations
    assert 20 < found.num_truncated < 50
    assert f"{found.num_truncated} cut at their end" in describe_conversations(found)


def test_masks_that_are_missing_or_of_other_conversations(tmp_path: Path) -> None:
    conversations = draw_conversations(20, vocab_size=VOCAB_SIZE, longest=20)
    data = write_conversations(tmp_path / "c", conversations, vocab_size=VOCAB_SIZE)
    other = write_conversations(tmp_path / "other", conversations[:-1], vocab_size=VOCAB_SIZE)
    idx_path(mask_prefix(data)).rename(tmp_path / "kept")
    check(data, match=r"c_loss_mask.idx: file does not exist")
    for path in (mask_prefix(other).with_suffix(suffix) for suffix in (".bin", ".idx")):
        path.rename(tmp_path / path.name.replace("other", "c"))
    check(data, match="masks must have the lengths of the conversations")


def test_masks_without_a_token_to_learn(tmp_path: Path) -> None:
    conversations = draw_conversations(20, vocab_size=VOCAB_SIZE, longest=20)
    conversations[7] = (conversations[7][0], np.zeros_like(conversations[7][1]))
    data = write_conversations(tmp_path / "c", conversations, vocab_size=VOCAB_SIZE)
    check(data, match=r"must have a token to learn, got 1 of 20 with none in their masks \(conversations 7, from 0\)")


def test_text_and_an_empty_share_are_named(data: str, tmp_path: Path) -> None:
    one = write_conversations(
        tmp_path / "one", draw_conversations(1, vocab_size=VOCAB_SIZE, longest=20), vocab_size=VOCAB_SIZE
    )
    (problem,) = find(*FLAGS, "--data-path", one, "--split", "40,60,0", "--eval-iters", "1")
    assert "its train split must hold a conversation, got none" in problem
    manifest = json.loads((tmp_path / "one.manifest.json").read_bytes())
    del manifest["template"]
    (tmp_path / "one.manifest.json").write_text(json.dumps(manifest))
    for suffix in (".bin", ".idx"):
        mask_prefix(one).with_suffix(suffix).unlink()
    (problem,) = find(*FLAGS, "--data-path", one, "--global-batch-size", "1")
    assert "data must be conversations, got text without loss masks" in problem


def test_pretraining_does_not_ignore_masks(data: str) -> None:
    flags = ("--preset", "hammer-tiny", "--data-path", data, "--train-iters", "2")
    assert any("holds conversations with a loss mask" in problem for problem in find(*flags))
    assert any(
        problem.startswith("sft-truncate: has no effect without --sft") for problem in find(*flags, "--sft-truncate")
    )


def test_a_blend_without_weights_is_read_once(data: str, tmp_path: Path) -> None:
    other = write_conversations(
        tmp_path / "c", draw_conversations(40, vocab_size=VOCAB_SIZE, longest=20, seed=4), vocab_size=VOCAB_SIZE
    )
    problems = find(*FLAGS, "--data-path", data, other)
    assert any("several prefixes without weights are read once" in problem for problem in problems), problems
    assert find(*FLAGS, "--data-path", "0.7", data, "0.3", other) == []
