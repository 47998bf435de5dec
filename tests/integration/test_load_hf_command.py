"""`--load-hf DIR` as a user types it: what a dry run prints about a folder, and what is refused before training."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.preprocess import preprocess
from megatron_hammer.errors import ConfigError, ConversionError
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers.messages import assert_errors
from tests.helpers.parsed_flags import install
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, train_toy_tokenizer, write_jsonl
from tests.helpers.training_runs import run

pytestmark = pytest.mark.integration

RECIPE = (
    *("--platform", "cpu", "--seq-length", "24", "--micro-batch-size", "1", "--global-batch-size", "2"),
    *("--train-iters", "3", "--lr", "1e-3", "--lr-warmup-iters", "0", "--eval-iters", "0", "--split", "100,0,0"),
)
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 13 rows more than its tokenizer has pieces, and that tokenizer as an export leaves it."""
    directory = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=TOY_VOCAB_SIZE + 13,
        max_position_embeddings=32,
        attention_dropout=0.25,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / "toy-model")
    export_tokenizer(train_toy_tokenizer(directory), directory / "toy-model", max_length=None)
    return directory / "toy-model"


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Indexed data that the SentencePiece model made, from which the folder's tokenizer.json was exported."""
    directory = tmp_path_factory.mktemp("data")
    source = write_jsonl(directory / "text.jsonl", TOY_TEXTS * 20)
    tokenizer = folder.with_name("toy.model")
    preprocess(
        PreprocessOptions(inputs=(str(source),), tokenizer_path=tokenizer, output_prefix=directory / "toy"),
    )
    return str(directory / "toy_text_document")


def report_of(*flags: str) -> dict[str, Any]:
    """The dry run as JSON; a problem ends it with SystemExit."""
    install()
    from megatron_hammer.training.pretrain import dry_run, prepare

    stream = io.StringIO()
    dry_run(prepare([*RECIPE, *flags, "--dry-run", "--json"]), stream)
    return json.loads(stream.getvalue())


def check(*flags: str) -> None:
    install()
    from megatron_hammer.training import pretrain

    pretrain.check(pretrain.prepare([*RECIPE, *flags]))


def damage(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the folder with other tensors: a value to set the first element to, or None to leave a tensor out."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name].view(-1)[0] = value
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_dry_run_describes_the_folder(folder: Path, data: str) -> None:
    report = report_of("--load-hf", str(folder), "--data-path", data)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert report["model"]["num_parameters"] == model.num_parameters()
    assert report["model"]["name"] == "toy-model"
    assert (report["problems"], report["precision"]) == ([], "fp32")
    assert report["weights"].startswith(f"{folder} (39 tensors, ")
    settings = report["settings"]
    assert (settings["vocab_size"], settings["attention_dropout"]) == (TOY_VOCAB_SIZE + 13, 0.25)
    assert (settings["tokenizer_model"], settings["layernorm_epsilon"]) == (str(folder / "tokenizer.model"), 1e-06)


def test_data_of_another_tokenizer_is_refused(folder: Path, data: str, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match="must be made with the run's tokenizer, got"):
        check("--load-hf", str(other), "--data-path", data)


def test_every_fault_of_the_folder_is_named_before_a_run(folder: Path, data: str, tmp_path: Path) -> None:
    broken = damage(folder, tmp_path / "broken", **{NORM: None, "model.norm.weight": None})
    with pytest.raises(ConfigError) as caught:
        check("--load-hf", str(broken), "--data-path", data, "--num-layers", "6", "--norm-epsilon", "1e-5")
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == ["num-layers", "norm-epsilon", "load-hf", "load-hf"]
    assert all(any(f"load-hf: {name}: " in problem for problem in problems) for name in (NORM, "model.norm.weight"))


def test_a_model_that_is_not_mapped_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ConversionError, match=r"config\.json, model_type: must be one of .*, got model_type='mamba': "):
        check("--load-hf", str(other), "--mock-data")
    with pytest.raises(ConversionError, match=r"config\.json: must exist, got none\."):
        check("--load-hf", str(tmp_path / "nowhere"), "--mock-data")


def test_a_value_that_one_rank_alone_sees_ends_all_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    bad = damage(folder, tmp_path / "bad", **{NORM: math.nan})
    result = run(2, "--load-hf", str(bad), "--mock-data", *RECIPE, "--pipeline-model-parallel-size", "2")
    assert result.returncode == 2
    (message,) = set(result.stderr.strip().splitlines())  # on a slow machine the other rank says it too
    assert_errors(message, (f"{bad}: {NORM}:", "finite", "got NaN or infinity"))
