"""Weights of a blend, and a preview that megatron-core's own builders confirm."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from megatron_hammer.data.blending import (
    BlendSource,
    Budget,
    cap_weights,
    encode_data_args,
    find_warnings,
    list_data_path,
    preview_blend,
    read_sources,
    round_weights,
    split_name,
    validate_weights,
    weigh_by_tokens,
)
from megatron_hammer.data.indexed.manifest import Manifest, TokenizerIdentity, encode_manifest, manifest_path
from megatron_hammer.data.indexed.pair_writer import IndexedWriter
from megatron_hammer.data.order.order import normalize_weights
from megatron_hammer.errors import ConfigError, DataError
from tests.helpers.indexed_writing import add_document
from tests.helpers.messages import assert_problem, assert_problems


def write_pair(prefix: Path, document_lengths: list[int]) -> Path:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for length in document_lengths:
            add_document(writer, np.arange(length) % 97)
    return prefix


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("blend")
    rng = np.random.default_rng(1)
    sizes = {"large": 90, "medium": 31, "small": 11}
    return [str(write_pair(folder / name, rng.integers(1, 60, n).tolist())) for name, n in sizes.items()]


def build_with_megatron(
    words: list[str], split: str, num_samples: int, seq_length: int, folder: Path
) -> BlendedDataset:
    """What training builds for --data-path; no process group, so no rank waits for another."""
    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=seq_length,
        blend=get_blend_from_list(words),
        split=split,
        path_to_cache=str(folder),
        tokenizer=SimpleNamespace(vocab_size=97, eod=0, pad=96, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()
    assert isinstance(train, BlendedDataset)
    return train


@pytest.mark.parametrize("split", ["100,0,0", "90,10,0"])
@pytest.mark.parametrize("num_samples, seq_length, temperature", [(300, 23, 1.0), (1031, 17, 3.0), (40, 41, 1.0)])
def test_the_preview_is_what_megatron_draws(
    prefixes: list[str], tmp_path: Path, split: str, num_samples: int, seq_length: int, temperature: float
) -> None:
    sources = read_sources(prefixes, split)
    weights = round_weights(weigh_by_tokens([source.num_tokens for source in sources], temperature))
    budget = Budget(num_samples=num_samples, seq_length=seq_length)
    previews = preview_blend(weights, sources, budget)
    words = list_data_path(weights, sources)
    blend = build_with_megatron(words, split, num_samples, seq_length, tmp_path / "cache")
    drawn = np.bincount(blend.dataset_index[:num_samples], minlength=len(sources))
    for preview, source, count, dataset in zip(previews, sources, drawn.tolist(), blend.datasets, strict=True):
        assert abs(preview.num_samples - count) <= 1
        tokens_an_epoch = int(dataset.dataset.sequence_lengths[dataset.indices].sum())
        assert source.num_tokens == tokens_an_epoch
        assert preview.epochs == pytest.approx(count * seq_length / tokens_an_epoch, abs=seq_length / tokens_an_epoch)
        assert preview.num_epochs_built == len(dataset.document_index) // len(dataset.indices)
    # The twin: sources of another split are not what Megatron reads.
    others = preview_blend(weights, read_sources(prefixes, "50,50,0"), budget)
    assert [other.num_epochs_built for other in others] != [preview.num_epochs_built for preview in previews]


@pytest.mark.parametrize("num_sources", [1, 2, 3, 7, 31])
def test_counts_are_those_of_megatrons_blending_indices(num_sources: int) -> None:
    rng = np.random.default_rng(num_sources)
    sources = [BlendSource(name=str(i), prefix=str(i), num_tokens=10**6) for i in range(num_sources)]
    for num_samples in (1, 10, 1000, 25_000):
        weights = round_weights(normalize_weights(rng.random(num_sources) ** 3 + 1e-6))
        shares = normalize_weights([float(weight) for weight in weights])
        dataset_index = np.zeros(num_samples, dtype=np.int16)
        helpers.build_blending_indices(
            dataset_index, np.zeros(num_samples, dtype=np.int64), shares, num_sources, num_samples, False
        )
        previews = preview_blend(weights, sources, Budget(num_samples=num_samples, seq_length=8))
        difference = np.bincount(dataset_index, minlength=num_sources) - [p.num_samples for p in previews]
        assert abs(difference).max() <= 1


def test_temperature_flattens() -> None:
    tokens = [1_000_000, 10_000, 100]
    assert weigh_by_tokens(tokens, 1.0) == pytest.approx(np.array(tokens) / sum(tokens))
    assert weigh_by_tokens(tokens, 2.0) == pytest.approx(np.array([1000, 100, 10]) / 1110)
    assert weigh_by_tokens(tokens, 1e9) == pytest.approx([1 / 3] * 3)
    assert weigh_by_tokens([10**15, 1], 0.01).tolist() == [1.0, 0.0]  # no overflow
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"^temperature: must be positive and finite, got .*--temperature"):
            weigh_by_tokens(tokens, temperature)


def test_capped_weights_go_to_the_other_sources_in_proportion() -> None:
    tokens = [100, 1_000, 10_000, 100_000]
    weights = normalize_weights([1, 2, 3, 4])
    budget = Budget(num_samples=1000, seq_length=100)
    capped = cap_weights(weights, tokens, budget, 4.0)
    epochs = capped * budget.num_tokens / tokens
    assert capped.sum() == pytest.approx(1)
    assert epochs[:2] == pytest.approx([4, 4])
    assert epochs.max() == pytest.approx(4)
    assert capped[3] / capped[2] >= weights[3] / weights[2]  # the third is at its cap only after the first two are
    uncapped = capped < np.array(tokens) * 4 / budget.num_tokens * (1 - 1e-12)
    assert np.ptp(capped[uncapped] / weights[uncapped]) == pytest.approx(0)  # one level for all others
    assert cap_weights(weights, [10**9] * 4, budget, 4.0) == pytest.approx(weights)
    assert cap_weights(weights, [25_000] * 4, budget, 1.0) == pytest.approx([0.25] * 4)  # exactly full
    message = r"^train-tokens: must be at most 40,000, all sources read 4 times, got 100,000\. Add data"
    with pytest.raises(ConfigError, match=message):
        cap_weights(weights, [2_500] * 4, budget, 4.0)


def test_capped_sources_are_not_read_more_often_than_asked() -> None:
    sources = [BlendSource(name=str(n), prefix=str(n), num_tokens=n) for n in (333_331, 4_000_037, 90_000_049)]
    budget = Budget(num_samples=100_003, seq_length=2048)
    weights = round_weights(cap_weights(normalize_weights([1, 1, 1]), [s.num_tokens for s in sources], budget, 3.0))
    previews = preview_blend(weights, sources, budget)
    assert find_warnings(previews, sources, budget, 3.0) == []
    assert sum(preview.num_samples for preview in previews) == pytest.approx(budget.num_samples, abs=2)
    (warning, other) = find_warnings(preview_blend(["1", "1", "1"], sources, budget), sources, budget, 3.0)
    assert_problem(warning, "333331:", "204.81 times", "max_epochs=3", "--cap-epochs")
    assert other.startswith("4000037: is read 17.07 times")


def test_a_source_of_which_nothing_is_drawn_is_named() -> None:
    sources = [BlendSource(name=name, prefix=name, num_tokens=10**6) for name in ("a", "b")]
    budget = Budget(num_samples=100, seq_length=8)
    warnings = find_warnings(preview_blend(["1", "0.001"], sources, budget), sources, budget, 4.0)
    assert_problems(warnings, ("b:", "nothing of it is drawn in 100 samples"))


def test_impossible_weights_are_refused() -> None:
    validate_weights([1, 0.5], 2)
    with pytest.raises(ConfigError, match=r"^weights: must be one for each source, got 1 weights and 2 sources\."):
        validate_weights([1], 2)
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"^weights: must be positive and finite, got .* Leave out"):
            validate_weights([1, weight], 2)


def test_sources_are_named(prefixes: list[str], tmp_path: Path) -> None:
    assert split_name("zh=data/zh") == ("zh", "data/zh")
    assert split_name("data/zh") == ("zh", "data/zh")
    assert split_name("data/lr=3/zh") == ("zh", "data/lr=3/zh")
    odd = tmp_path / "x=y"
    write_pair(odd, [3])
    assert split_name(str(odd)) == ("x=y", str(odd))
    (source,) = read_sources([f"code={prefixes[0]}"])
    assert (source.name, source.prefix) == ("code", prefixes[0])


def test_a_source_under_another_name_is_refused(prefixes: list[str], tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"hard.{suffix}").hardlink_to(f"{prefixes[0]}.{suffix}")
        (tmp_path / f"soft.{suffix}").symlink_to(Path(f"{prefixes[0]}.{suffix}").absolute())
    with pytest.raises(DataError) as caught:
        read_sources([prefixes[0], f"{tmp_path}/hard", f"x={tmp_path}/soft"])
    assert_problems(
        caught.value.problems,
        (f"{tmp_path}/hard:", "source must be named once", f"got it as {prefixes[0]} too"),
        (f"{tmp_path}/soft:", "source must be named once", f"got it as {prefixes[0]} too"),
    )


def test_all_bad_sources_are_named_at_once(prefixes: list[str], tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", write_pair(tmp_path / "empty", [])
    with pytest.raises(DataError) as caught:
        read_sources([prefixes[0], f"again={prefixes[0]}", str(missing), str(empty)])
    assert_problems(
        [problem.partition(",")[0] for problem in caught.value.problems],
        (f"{prefixes[0]}:", "source must be named once"),
        (f"{missing}.bin:", "file does not exist"),
        (f"{empty}:", "training split must hold tokens"),
    )
    with pytest.raises(ConfigError, match=r"^split: must be three shares for training, validation and test"):
        read_sources(prefixes, "0,1,1")


def test_sources_share_a_tokenizer(toy_pairs: dict[str, Path]) -> None:
    assert len(read_sources([str(toy_pairs["one"]), str(toy_pairs["two"])])) == 2
    message = r"^sources: must be encoded by one tokenizer, got .*one.* by toy\.model \(.{8}\), .*other\.model \(.{8}\)"
    with pytest.raises(DataError, match=message):
        read_sources([str(toy_pairs["one"]), str(toy_pairs["other"])])


@pytest.fixture
def toy_pairs(tmp_path: Path) -> dict[str, Path]:
    """Pairs with the manifests that the preprocessor would write; only the tokenizer's identity counts here."""
    pairs = {name: write_pair(tmp_path / name, [5, 7]) for name in ("one", "two", "other")}
    for name, prefix in pairs.items():
        write_manifest(prefix, "other.model" if name == "other" else "toy.model")
    return pairs


def write_manifest(prefix: Path, tokenizer_name: str) -> None:
    values = {field.name: 0 for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING}
    values |= {"sources": (), "ignored_files": (), "problems": (), "options": {}, "dtype": "uint16", "tool_version": ""}
    digest = ("a" if tokenizer_name == "toy.model" else "b") * 64
    tokenizer = TokenizerIdentity(name=tokenizer_name, sha256=digest, vocab_size=97)
    manifest_path(prefix).write_bytes(encode_manifest(Manifest(**values | {"tokenizer": tokenizer})))


def test_a_split_without_a_sample_is_refused() -> None:
    source = BlendSource(name="a", prefix="p/a", num_tokens=8)
    preview_blend(["1"], [source], Budget(num_samples=1, seq_length=7))
    message = (
        r"^p/a: training split must hold one sample \(seq_length \+ 1 tokens\), got 8 tokens, seq_length=8\. Leave it"
    )
    with pytest.raises(DataError, match=message):
        preview_blend(["1"], [source], Budget(num_samples=1, seq_length=8))


def test_weights_and_prefixes_are_written_as_megatron_reads_them() -> None:
    sources = [BlendSource(name=name, prefix=name, num_tokens=1) for name in ("a b", "2024")]
    named = [dataclasses.replace(sources[0], prefix=prefix) for prefix in "ab"]
    assert list_data_path(["0.5", "0.5"], named) == ["0.5", "a", "0.5", "b"]
    with pytest.raises(ConfigError, match=r"^data-path: a data set must be named once, got a 2 times"):
        list_data_path(["0.5", "0.5"], named[:1] * 2)
    with pytest.raises(ConfigError, match=r"^data-path: must be prefixes alone, or a weight before every prefix"):
        list_data_path(["0.5", "0.5"], sources)
    with pytest.raises(ConfigError, match=r"^output: a file for --data-args-path cannot hold white space .* got 'a b'"):
        encode_data_args(["1"], sources[:1])
    named = [BlendSource(name="a", prefix="data/a", num_tokens=1)]
    assert encode_data_args(["0.25"], named) == b"0.25 data/a\n"
