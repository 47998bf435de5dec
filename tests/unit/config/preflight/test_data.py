import re
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.config.preflight.data import find_vocabulary_problems, read_indices
from megatron_hammer.data.indexed.manifest import Manifest, TokenizerIdentity, encode_manifest, manifest_path
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.sources import count_split_tokens
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import find, parse, plan, write_data
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
MODEL += "--micro-batch-size 1 --train-iters 5 --lr 1e-3"


def find_for(tmp_path: Path, *flags: str, documents: list[int] | None = None, vocab_size: int = 500) -> list[str]:
    """Problems of a tiny run on data of `documents`."""
    data = write_data(tmp_path / "corpus", documents or [40] * 20, vocab_size=vocab_size)
    own = [] if {"--data-path", "--train-data-path"} & set(flags) else ["--data-path", data, "--split", "80,20,0"]
    vocab = [] if "--vocab-size" in flags else ["--vocab-size", "500"]
    return find(*MODEL.split(), *own, *vocab, *flags)


def write_manifest(prefix: Path, *, num_tokens: int, sha256: str = "0" * 64, vocab_size: int = 500) -> None:
    manifest = Manifest(
        sources=(), ignored_files=(), tokenizer=TokenizerIdentity(name="t.model", sha256=sha256, vocab_size=vocab_size),
        options={}, dtype="uint16", num_documents=20, num_tokens=num_tokens, text_bytes=9, num_empty_documents=0,
        problems=(), tool_version="0",
    )  # fmt: skip
    manifest_path(prefix).write_bytes(encode_manifest(manifest))


def test_good_data(tmp_path: Path) -> None:
    assert find_for(tmp_path) == []


def test_truncated_data(tmp_path: Path) -> None:
    write_data(tmp_path / "cut", [40] * 20)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-6])
    (problem,) = find_for(tmp_path, "--data-path", str(tmp_path / "cut"))
    assert "cut.bin: size must be 1600 bytes" in problem


@pytest.mark.parametrize(
    ("documents", "split", "match"),
    [
        ([40] * 10, "98,2,0", "its valid split must hold one sample .* got 0 tokens of 17 needed"),
        ([40] * 10, "90,8,2", "its test split must hold one sample"),
        ([8, 8, 40], "60,40,0", "its train split must hold one sample .* got 16 tokens of 17"),
        ([40] * 10, "100,0,0", "eval-iters: evaluation needs a validation set, got eval_iters=10 and none"),
    ],
)
def test_splits_without_a_sample(tmp_path: Path, documents: list[int], split: str, match: str) -> None:
    data = write_data(tmp_path / "small", documents)
    problems = find_for(tmp_path, "--data-path", data, "--split", split)
    assert len(problems) == 1
    assert re.search(match, problems[0]), problems


def test_an_empty_validation_split_is_refused_even_without_evaluation(tmp_path: Path) -> None:
    """_get_num_epochs adds tokens until there are enough; of none it never has enough."""
    data = write_data(tmp_path / "small", [40] * 10)
    (problem,) = find_for(tmp_path, "--data-path", data, "--split", "98,2,0", "--eval-iters", "0")
    assert "its valid split must hold one sample (seq_length + 1 tokens), got 0 tokens of 17 needed" in problem
    assert find_for(tmp_path, "--data-path", data, "--split", "100,0,0", "--eval-iters", "0") == []


def test_data_for_less_than_one_step_is_refused(tmp_path: Path) -> None:
    (problem,) = find_for(tmp_path, "--global-batch-size", "64")
    assert "training data must fill one step, got 640 tokens, global_batch_size=64, seq_length=16" in problem


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    (problem,) = find_for(tmp_path, "--vocab-size", "499")
    assert "corpus.bin: token ids must be below vocab_size, got id=499, vocab_size=499" in problem
    data = write_data(tmp_path / "float", [40] * 20, dtype=np.int32)
    header = bytearray((tmp_path / "float.idx").read_bytes())
    header[17] = 7  # the dtype code behind magic and version: float32
    (tmp_path / "float.idx").write_bytes(header)
    (problem,) = find_for(tmp_path, "--data-path", data, "--split", "80,20,0")
    assert "float.idx: tokens must be integers, got dtype=float32" in problem


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    model = str(train_toy_tokenizer(tmp_path))
    flags = ("--tokenizer-model", model)
    assert find_for(tmp_path, *flags, "--vocab-size", str(TOY_VOCAB_SIZE), vocab_size=300) == []
    assert find_for(tmp_path, *flags, "--vocab-size", str(TOY_VOCAB_SIZE + 9), vocab_size=300) == []  # asked for
    (problem,) = find_for(tmp_path, *flags, "--vocab-size", "310", vocab_size=300)
    assert f"got vocab_size=310, tokenizer={TOY_VOCAB_SIZE}" in problem
    assert f"Pass --vocab-size {TOY_VOCAB_SIZE}." in problem


def test_a_preset_with_another_tokenizer(tmp_path: Path) -> None:
    from megatron_hammer.tokenizer.encoding.encoder import load_encoder

    encoder = load_encoder(train_toy_tokenizer(tmp_path))
    (problem,) = find_vocabulary_problems(parse("--preset", "hammer-tiny").settings, encoder)
    assert f"vocab-size: must be the tokenizer's, got vocab_size=4096, tokenizer={TOY_VOCAB_SIZE}" in problem


def test_manifest_of_another_tokenizer(tmp_path: Path) -> None:
    model = train_toy_tokenizer(tmp_path)
    write_manifest(tmp_path / "corpus", num_tokens=800)
    flags = ("--tokenizer-model", str(model), "--vocab-size", str(TOY_VOCAB_SIZE))
    (problem,) = find_for(tmp_path, *flags, vocab_size=300)
    assert "corpus: must be made with the run's tokenizer, got t.model (sha256 000000000000)" in problem


def test_a_manifest_must_agree_with_the_model_and_the_data(tmp_path: Path) -> None:
    write_manifest(tmp_path / "corpus", num_tokens=800, vocab_size=400)
    assert find_for(tmp_path, vocab_size=400) == []  # 500 was typed: larger on purpose
    write_manifest(tmp_path / "corpus", num_tokens=801, vocab_size=600)
    problems = find_for(tmp_path)
    assert (
        "corpus.manifest.json: must describe the data set beside it, got num_tokens=801, in the .idx 800" in problems[0]
    )
    assert "must be that of the data's tokenizer, got vocab_size=500, in" in problems[1]
    assert "Pass --vocab-size 600." in problems[1]


def test_two_tokenizers_in_one_blend(tmp_path: Path) -> None:
    write_manifest(tmp_path / "corpus", num_tokens=800)
    other = write_data(tmp_path / "other", [40] * 20, vocab_size=500)
    write_manifest(tmp_path / "other", num_tokens=800, sha256="1" * 64)
    blend = ("--data-path", str(tmp_path / "corpus"), other, "--split", "100,0,0")
    (problem,) = find_for(tmp_path, *blend, "--eval-iters", "0")
    assert "data-path: all data sets must be made with one tokenizer" in problem


def test_flags_that_need_an_end_of_document_token(tmp_path: Path) -> None:
    (problem,) = find_for(tmp_path, "--eod-mask-loss")
    assert "eod-mask-loss: needs a tokenizer that knows which token ends a document" in problem


def test_several_validation_sets(tmp_path: Path) -> None:
    train = write_data(tmp_path / "train", [40] * 20, vocab_size=500)
    valid = [write_data(tmp_path / name, [40] * 20, vocab_size=500) for name in ("a", "b")]
    flags = ("--train-data-path", train, "--multiple-validation-sets")
    assert find_for(tmp_path, *flags, "--valid-data-path", *valid) == []
    (problem,) = find_for(tmp_path, *flags, "--valid-data-path", *valid, "--validation-set-names", "a")
    assert "must be one for each validation set, got 1 names, 2 sets" in problem
    (problem,) = find_for(tmp_path, *flags, "--valid-data-path", "1", valid[0], "2", valid[1])
    assert "several validation sets are evaluated one by one, got weights" in problem
    (problem, *_) = find_for(tmp_path, *flags)
    assert "multiple-validation-sets: needs data sets of their own, got none" in problem


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (problem,) = find_for(tmp_path, "--data-cache-path", str(tmp_path / "corpus.bin" / "cache"))
    assert "data-cache-path: must be a folder that can be written" in problem
    assert "corpus.bin is not a folder" in problem


def test_split_tokens_are_megatrons(tmp_path: Path) -> None:
    lengths = [int(length) for length in np.random.default_rng(3).integers(1, 50, 77)]
    index = read_index(write_data(tmp_path / "corpus", lengths))
    for bounds in ((0.0, 0.9), (0.9, 0.97), (0.97, 1.0), (0.0, 1.0)):
        first, last = (round(bound * 77.0) for bound in bounds)
        assert count_split_tokens(index, bounds) == sum(lengths[first:last])


def test_other_ranks_read_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_for(tmp_path, "--vocab-size", "499") == []


def test_every_prefix_is_read_once(tmp_path: Path) -> None:
    data = write_data(tmp_path / "corpus", [40] * 20)
    settings = parse(*MODEL.split(), "--data-path", data, data, "--split", "50,50,0").settings
    indices, problems = read_indices(settings.data.sources)
    assert (list(indices), problems) == ([data], [])


def test_a_data_set_has_one_spelling(tmp_path: Path) -> None:
    """By two, the documents would come twice while every record counts two data sets."""
    data = write_data(tmp_path / "corpus", [40] * 20, vocab_size=500)
    other = f"{tmp_path}/../{tmp_path.name}/corpus"
    flags = ("--split", "100,0,0", "--eval-iters", "0", "--data-path")
    (problem,) = find_for(tmp_path, *flags, "0.5", data, "0.5", other)
    assert f"data-path: a data set must be named by one spelling, got it as {data} and {other}." in problem
    (problem,) = find_for(tmp_path, *flags, "0.5", data, "0.5", data)
    assert f"data-path: a data set must be named once, got {data} 2 times." in problem


def test_prefixes_without_weights_are_read_once(tmp_path: Path) -> None:
    """48 samples of training in two sets; Megatron runs out of them at step 49 of 60, by StopIteration."""
    blend = [write_data(tmp_path / name, [40] * 10, vocab_size=500) for name in ("a", "b")]
    flags = ("--split", "100,0,0", "--eval-iters", "0", "--train-iters", "60")
    (problem,) = find_for(tmp_path, *flags, "--data-path", *blend)
    assert "are read once, got 48 samples in the train split of 60 that the run draws" in problem
    assert f"Pass weights, which repeat them: 0.5 {blend[0]} 0.5 {blend[1]}." in problem
    assert find_for(tmp_path, *flags, "--data-path", "0.5", blend[0], "0.5", blend[1]) == []
    assert find_for(tmp_path, *flags, "--data-path", blend[0]) == []  # one prefix repeats by itself
    (problem,) = find_for(tmp_path, "--split", "80,20,0", "--eval-iters", "20", "--data-path", *blend)
    assert "got 8 samples in the valid split of 120 that the run draws" in problem


def test_a_blend_of_which_nothing_is_drawn(tmp_path: Path) -> None:
    blend = [write_data(tmp_path / name, [40] * 20, vocab_size=500) for name in ("a", "b")]
    for data in (blend, ["1", blend[0], "2", blend[1]], ["1", blend[0]]):
        (problem,) = find_for(tmp_path, "--data-path", *data, "--split", "80,20,0", "--eval-iters", "0")
        assert "eval-iters: a blend needs evaluations in its valid split, got eval_iters=0" in problem
    assert find_for(tmp_path, "--data-path", blend[0], "--split", "80,20,0", "--eval-iters", "0") == []


def test_needed_samples_are_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    for extra in ("", "--eval-iters 3 --eval-interval 2", "--start-eval-at-iter 4 --eval-interval 2", "--skip-train"):
        arguments = parse(*MODEL.split(), "--vocab-size", "500", "--global-batch-size", "4", *extra.split())
        namespace, counted = arguments.namespace, arguments.plan.num_samples
        namespace.eval_global_batch_size = namespace.eval_global_batch_size or namespace.global_batch_size
        monkeypatch.setattr(training, "get_args", lambda namespace=namespace: namespace)
        train, valid, test = training.get_train_valid_test_num_samples()
        assert (counted["valid"], counted["test"]) == (valid, test), extra
        assert counted["train"] == (0 if namespace.skip_train else train), extra


def test_full_validation_with_weights_is_refused(tmp_path: Path) -> None:
    blend = [write_data(tmp_path / name, [40] * 20, vocab_size=500) for name in ("a", "b")]
    weighted = ("--data-path", "1", blend[0], "2", blend[1], "--split", "80,20,0")
    (problem,) = find_for(tmp_path, *weighted, "--full-validation")
    assert "full-validation: reads each validation set once, got weights" in problem
    assert find_for(tmp_path, "--train-data-path", blend[0], "--valid-data-path", blend[1], "--full-validation") == []


def test_full_validation_beside_a_test_set_is_refused(tmp_path: Path) -> None:
    a, b, c = (write_data(tmp_path / name, [40] * 20, vocab_size=500) for name in "abc")
    own = ("--train-data-path", a, "--valid-data-path", b, "--full-validation")
    (problem,) = find_for(tmp_path, *own, "--test-data-path", c)
    assert_problem(problem, "full-validation:", "cannot evaluate a test set", "Drop --test-data-path")
    (problem,) = find_for(tmp_path, "--data-path", a, "--split", "60,20,20", "--full-validation")
    assert "Give it no share, as in --split 98,2,0" in problem


def test_data_of_a_run_without_a_micro_batch(tmp_path: Path) -> None:
    """What is drawn from the data cannot be counted then; what is wrong with the data itself is still said."""
    model = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 500 --max-position-embeddings 64"
    flags = (*model.split(), "--seq-length", "64", "--train-iters", "5", "--lr", "1e-3", "--data-path")
    (problem,) = find(*flags, write_data(tmp_path / "data", [100] * 50, vocab_size=500))
    assert problem.startswith("micro-batch-size: must be given, got micro_batch_size=None")
    problems = find(*flags, write_data(tmp_path / "small", [9], vocab_size=500))
    assert len(problems) > 1
    assert f"{tmp_path / 'small'}: its train split must hold one sample" in problems[1]


MANY = ("--train-iters", "100000", "--global-batch-size", "4")


def test_data_that_would_be_repeated_absurdly(tmp_path: Path) -> None:
    """400,000 samples of 16 tokens from 16 documents of 40 tokens: 10,000 epochs."""
    (problem,) = find_for(tmp_path, *MANY)
    assert re.search(r"^train-iters: training data must not be read more than 1,000 times, got 10,000 epochs", problem)
    assert "of the 640 tokens in " in problem
    assert "(400,000 samples of 16 tokens). Pass --train-iters (10 is one pass over all data). If" in problem
    assert problem.endswith("beforehand: tools/build_data_cache.py.")
    assert find_for(tmp_path, *MANY, "--accept-many-epochs") == []
    assert find_for(tmp_path, "--train-iters", "10000", "--global-batch-size", "4") == []  # exactly 1,000


def test_one_source_of_a_blend_that_would_be_repeated_absurdly(tmp_path: Path) -> None:
    small = write_data(tmp_path / "small", [40] * 20, vocab_size=500)
    large = write_data(tmp_path / "large", [40] * 20_000, vocab_size=500)
    blend = ("--split", "80,20,0", "--train-iters", "40000", "--global-batch-size", "4")
    (problem,) = find_for(tmp_path, "--data-path", "1", small, "1", large, *blend)
    assert re.search(r"got 2,000 epochs of the 640 tokens in \S*small \(160,000 samples", problem)
    assert "or lower the weight of this source" in problem
    assert find_for(tmp_path, "--data-path", "1", small, "9", large, *blend) == []


@pytest.mark.parametrize(
    ("flags", "minutes"),
    [
        ((), 10),
        (("--train-iters", "1000000", "--global-batch-size", "1024", "--eval-iters", "0"), 103),
        (("--train-samples", "1024000000", "--global-batch-size", "1024", "--eval-iters", "0"), 103),
        # Evaluation draws as many samples again: 1,001 evaluations of 1,000 steps.
        (("--train-iters", "1000000", "--global-batch-size", "1024", "--eval-iters", "1000"), 205),
        (("--train-samples", str(2**62), "--global-batch-size", "1024"), 24 * 60),
        (("--train-iters", "1000000", "--global-batch-size", "1024", "--distributed-timeout-minutes", "20"), 20),
    ],
)
def test_the_ranks_wait_as_long_as_the_sample_index_takes(flags: tuple[str, ...], minutes: int) -> None:
    namespace = parse("--preset", "hammer-tiny", "--mock-data", *flags).namespace
    assert namespace.distributed_timeout_minutes == minutes


def test_a_whole_pass_needs_a_sample_for_each_data_parallel_rank(tmp_path: Path) -> None:
    """50 tokens are 3 samples of 16 tokens and the one after."""
    train, held = write_data(tmp_path / "train", [40] * 40), write_data(tmp_path / "held", [50])
    flags = ("--train-data-path", train, "--valid-data-path", held, "--full-validation", "--vocab-size", "4096")
    (problem,) = find_for(tmp_path, *flags, "--global-batch-size", "4", *plan(4))
    assert "full-validation: needs a sample for each data-parallel rank, got 3 samples of 16 tokens in " in problem
    assert problem.endswith("held, dp=4. Give it more text, or drop --full-validation.")
    assert find_for(tmp_path, *flags, "--global-batch-size", "6", *plan(3)) == []
    assert find_for(tmp_path, *flags, *plan(4), "--tensor-model-parallel-size", "2") == []
