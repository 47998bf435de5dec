"""A GGUF file scores tokens as transformers scores those of its folder, through llama.cpp.

In nats, of log-probabilities around -10 in fp32: at most 2e-5 was measured.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
from megatron_hammer.cli.evaluate_perplexity import main
from megatron_hammer.errors import ConfigError
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer
from tests.helpers.gguf_models import write_gguf_source
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, write_jsonl

pytest.importorskip("xllamacpp", reason="xllamacpp, the wheel of llama.cpp, is missing; pip install xllamacpp")
TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf_scorer")
    source = write_gguf_source(folder / "hf")
    export_to_gguf(GgufOptions(load_dir=source, save_path=folder / "model.gguf", file_type="f32", is_verified=False))
    return source, folder / "model.gguf"


def measure(scorer: Scorer) -> dict[str, Any]:
    # Ids of bytes, which are parts of characters, and the token that ends a text among them.
    generator = np.random.default_rng(0)
    sequences = [[*generator.integers(3, TOY_VOCAB_SIZE, length).tolist(), 2, 5] for length in (3, 30)]
    scores = scorer.score(sequences, [4, 31])
    return {
        "logs": np.concatenate([one.log_probabilities for one in scores]),
        "is_greedy": np.concatenate([one.is_greedy for one in scores]).tolist(),
        "next": scorer.choose_next([ids[:9] for ids in sequences]),
        "continuations": scorer.generate([ids[:3] for ids in sequences], max_new_tokens=4, is_done=lambda new: False),
        "encoded": [scorer.encoder.encode(text).tolist() for text in (*TOY_TEXTS, "<s> 𠮷")],
        "decoded": scorer.encoder.decode(scorer.encoder.encode(TOY_TEXTS[2])),
        "ends": (scorer.encoder.bos_id, scorer.encoder.eod_id),
    }


def test_llama_cpp_scores_as_transformers(models: tuple[Path, Path]) -> None:
    theirs, ours = (use_scorer(path, ScorerOptions(), measure) for path in models)
    assert theirs is not None
    assert ours is not None
    np.testing.assert_allclose(ours.pop("logs"), theirs.pop("logs"), rtol=0, atol=TOLERANCE_NATS)
    assert ours == theirs


def test_the_tables_have_both(models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", TOY_TEXTS)
    # The GGUF file first: its tokenizer is the reference, and ends with its model.
    main(["--models", *map(str, models[::-1]), "--domains", str(path), "--max-length", "40", "--json"])
    ours, theirs = json.loads(capsys.readouterr().out)["rows"]
    assert (theirs["precision"], ours["precision"]) == ("fp32", "all F32 in llama.cpp")
    assert ours["reference_tokens"] == theirs["reference_tokens"] == ours["tokens"]
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


def test_what_a_file_does_not_take_is_refused(models: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"precision: a GGUF file has its own, got bf16 for .*model\.gguf"):
        use_scorer(models[1], ScorerOptions(precision="bf16"), measure)
