"""Calibration windows: by seed, an equal share of every input, without overlap; too little text is named."""

import numpy as np
import pytest
import torch

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.serving.quantization.calibration import draw_samples
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.gguf_models import make_toy_model
from tests.helpers.messages import assert_problems
from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    # Every line its own number, so that windows can be told apart.
    english = write_jsonl(folder / "en.jsonl", [f"{number} {TOY_TEXTS[0]}" for number in range(60)])
    chinese = write_jsonl(folder / "zh.jsonl", [f"{TOY_TEXTS[2]} {number}" for number in range(60)], key="content")
    return english, chinese


def draw(*paths, text_key="text", num_samples=8, seq_length=24, seed=3):
    encoder = load_encoder(make_toy_model())
    inputs = [str(path) for path in paths]
    return draw_samples(inputs, encoder, text_key=text_key, num_samples=num_samples, seq_length=seq_length, seed=seed)


def test_the_seed_decides(corpora) -> None:
    first, again, other = draw(corpora[0]), draw(corpora[0]), draw(corpora[0], seed=4)
    assert all(sample.shape == (1, 24) and sample.dtype == torch.int64 for sample in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(sample[0].tolist()) for sample in first}) == 8


def test_windows_are_neighbouring_tokens_of_the_joined_documents(corpora) -> None:
    encoder = load_encoder(make_toy_model())
    texts = [f"{number} {TOY_TEXTS[0]}" for number in range(60)]
    stream = np.concatenate([np.append(encoder.encode(text), encoder.eod_id) for text in texts])
    for sample in draw(corpora[0]):
        windows = [
            start for start in range(0, len(stream) - 23, 24) if (stream[start : start + 24] == sample[0].numpy()).all()
        ]
        assert windows


def test_every_input_gives_an_equal_share(corpora, tmp_path) -> None:
    chinese = write_jsonl(tmp_path / "zh.jsonl", [f"{TOY_TEXTS[2]} {number}" for number in range(60)])
    encoder = load_encoder(make_toy_model())
    samples = [encoder.decode(sample[0].tolist()) for sample in draw(corpora[0], chinese, num_samples=9)]
    assert sum("春" in text or "花" in text or "鸟" in text for text in samples) == 4  # the first gets the odd one


def test_an_input_without_a_sample_is_refused(corpora) -> None:
    with pytest.raises(ConfigError, match=r"num-samples: must be at least 1 for each of the 2 inputs .*, got 1"):
        draw(*corpora, num_samples=1)


def test_too_little_text_is_named_for_every_input(corpora) -> None:
    with pytest.raises(DataError) as error:
        draw(corpora[0], corpora[0], num_samples=500)
    expected = (str(corpora[0]), "250 samples of 24 tokens", "6,000 tokens", "--num-samples")
    assert_problems(error.value.problems, expected, expected)


def test_a_wrong_field_is_named(corpora) -> None:
    with pytest.raises(DataError, match=r"zh\.jsonl:1.*text"):
        draw(corpora[1])
    assert len(draw(corpora[1], text_key="content")) == 8
