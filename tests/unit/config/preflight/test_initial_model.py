"""--load-hf against the rest of a command line. tests/integration/test_load_hf_command.py reads a folder."""

import dataclasses
from pathlib import Path

import pytest

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.initial_model import InitialModel
from megatron_hammer.config.saved_run import describe_weights
from megatron_hammer.model.shape import MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.messages import assert_problem, assert_problems
from tests.helpers.parsed_flags import install, with_flags, write_data

MODEL = dataclasses.replace(PRESETS["hammer-tiny"].model, name="folder", max_position_embeddings=512)
RECIPE = (
    *("--mock-data", "--load-hf", "hf", "--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2"),
    *("--train-iters", "9", "--lr", "1e-4"),
)


def make_initial_model(**values: object) -> InitialModel:
    fields = {
        "folder": Path("hf"),
        "model": MODEL,
        "dtype": "bfloat16",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.25,
        "description": "39 tensors",
    }
    return InitialModel(**{**fields, **values})  # type: ignore[arg-type]


def parse(*flags: str, initial: InitialModel | None = None, backend: str = "torch") -> ParsedArguments:
    install()
    from megatron_hammer.config.arguments import parse_arguments

    return parse_arguments(flags, platform="cpu", backend=backend, initial_model=initial or make_initial_model())


def find(*flags: str, initial: InitialModel | None = None) -> list[str]:
    from megatron_hammer.config.preflight.find_problems import find_problems

    return find_problems(parse(*flags, initial=initial))


def find_of_initial_model(*flags: str, initial: InitialModel | None = None, **values: object) -> list[str]:
    """Only the problems of --load-hf; values: of other flags."""
    settings = parse(*flags, initial=initial).settings
    from megatron_hammer.config.preflight.initial_model import find_initial_model_problems

    return find_initial_model_problems(with_flags(settings, **values))


def test_the_folder_alone_gives_model_dropout_and_precision() -> None:
    namespace = parse(*RECIPE).namespace
    assert (namespace.num_layers, namespace.vocab_size, namespace.attention_dropout) == (4, 4096, 0.25)
    assert (namespace.hidden_dropout, namespace.bf16, namespace.max_position_embeddings) == (0.0, True, 512)
    assert find(*RECIPE) == []
    assert parse(*RECIPE, initial=make_initial_model(dtype="float16")).namespace.precision == "fp32"
    typed = parse(*RECIPE, "--attention-dropout", "0.1", "--precision", "fp32").namespace
    assert (typed.attention_dropout, typed.bf16) == (0.1, False)


def test_the_missing_flags_of_a_run_without_a_recipe_are_named() -> None:
    problems = find("--mock-data", "--load-hf", "hf")
    assert "lr: must be given" in "\n".join(problems)
    assert not any("num-layers" in problem for problem in problems)


def test_a_preset_gives_its_recipe_alone() -> None:
    arguments = parse("--preset", "hammer-tiny", "--mock-data", "--load-hf", "hf")
    recipe = PRESETS["hammer-tiny"].recipe
    assert arguments.namespace.lr == recipe.lr
    assert arguments.namespace.attention_dropout == recipe.attention_dropout
    assert arguments.namespace.max_position_embeddings == 512  # the folder's
    assert find_of_initial_model("--preset", "hammer-tiny", "--mock-data", "--load-hf", "hf") == []


def test_a_preset_of_another_model_is_refused_by_every_difference() -> None:
    initial = make_initial_model(model=dataclasses.replace(MODEL, num_layers=5, norm_epsilon=1e-6))
    problems = find_of_initial_model("--preset", "hammer-tiny", "--mock-data", "--load-hf", "hf", initial=initial)
    assert_problems(
        problems,
        ("preset:", "the model in hf", "got num_layers=4 in hammer-tiny, 5 in config.json"),
        ("preset:", "the model in hf", "got layernorm_epsilon=1e-05 in hammer-tiny, 1e-06 in config.json"),
    )


def test_flags_of_another_model_are_refused_by_name() -> None:
    flags = ("--num-layers", "6", "--norm-epsilon", "1e-6", "--disable-bias-linear", "--rotary-base", "500000")
    assert_problems(
        find_of_initial_model(*RECIPE, *flags),
        ("num-layers:", "must be as in hf/config.json", "got num_layers=6, there 4"),
        ("norm-epsilon:", "must be as in hf/config.json", "got layernorm_epsilon=1e-06, there 1e-05"),
        ("rotary-base:", "must be as in hf/config.json", "got rotary_base=500000, there 10000"),
    )
    experts = ("--num-experts", "4", "--moe-router-topk", "2", "--qk-layernorm")
    problems = "\n".join(find_of_initial_model(*RECIPE, *experts))
    assert "num-experts: must be as in hf/config.json, got num_experts=4, there None." in problems
    assert "qk-layernorm: must be as in hf/config.json, got qk_layernorm=on, there" in problems


def test_flags_of_the_recipe_may_be_changed() -> None:
    experts = MoeShape(num_experts=4, router_topk=2, ffn_hidden_size=64)
    initial = make_initial_model(model=dataclasses.replace(MODEL, moe=experts))
    flags = ("--moe-aux-loss-coeff", "0.5", "--init-method-std", "0.1", "--max-position-embeddings", "4096")
    assert find_of_initial_model(*RECIPE, *flags, initial=initial) == []


def test_weights_of_the_folder_are_looked_at_only_where_they_are_read(tmp_path: Path) -> None:
    initial = make_initial_model(problems=("load-hf: hf/model.safetensors: file is gone.",))
    assert find_of_initial_model(*RECIPE, initial=initial) == list(initial.problems)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    resumed = (*RECIPE, "--save", str(tmp_path))
    assert find_of_initial_model(*resumed, initial=initial) == []
    assert (
        describe_weights(parse(*resumed).settings.checkpoints, initial)
        == f"checkpoint in {tmp_path}; hf is not read again"
    )
    assert describe_weights(parse(*RECIPE).settings.checkpoints, initial) == "hf (39 tensors)"
    assert describe_weights(parse(*RECIPE).settings.checkpoints, None) == "random"


def test_the_load_folder_may_be_missing_with_load_hf(tmp_path: Path) -> None:
    assert find(*RECIPE, "--load", str(tmp_path / "new")) == []
    assert list(tmp_path.iterdir()) == []


def test_two_initial_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (problem,) = find_of_initial_model(*RECIPE, "--pretrained-checkpoint", str(tmp_path))
    assert_problem(
        problem, "load-hf:", "a run begins with one model's", f"got load_hf=hf, pretrained_checkpoint={tmp_path}"
    )


def test_fsdp2_is_refused_with_load_hf() -> None:
    (problem,) = find_of_initial_model(*RECIPE, use_torch_fsdp2=True)
    assert_problem(problem, "use-torch-fsdp2:", "--load-hf", "got use_torch_fsdp2=on", "hammer convert from-hf")


@pytest.mark.parametrize(("dtype", "is_refused"), [("float32", True), ("mixed", True), ("bfloat16", False)])
def test_an_optimizer_that_rounds_fp32_weights_is_refused(dtype: str, is_refused: bool) -> None:
    initial = make_initial_model(dtype=dtype)
    problems = find_of_initial_model(
        *RECIPE, "--precision", "bf16", initial=initial, use_precision_aware_optimizer=True
    )
    refusal = (
        "use-precision-aware-optimizer:",
        "fp32 weights from bf16",
        f"got use_precision_aware_optimizer=on, weights of {dtype} in hf",
        "bfloat16",
    )
    assert_problems(problems, *([refusal] if is_refused else []))


def test_the_tokenizer_that_made_the_data_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from megatron_hammer.config import initial_model

    hashes = {"a.json": "aa", "b.model": "bb"}
    monkeypatch.setattr(initial_model, "hash_tokenizer", lambda path: hashes[path.name])
    made_with = SimpleNamespace(tokenizer=SimpleNamespace(sha256="bb"))
    monkeypatch.setattr(initial_model, "read_manifest", lambda prefix: made_with)
    initial = make_initial_model(tokenizers=(tmp_path / "a.json", tmp_path / "b.model"))
    flags = (*RECIPE[1:], "--data-path", write_data(tmp_path / "data", [100] * 9))
    assert parse(*flags, initial=initial).namespace.tokenizer_model == str(tmp_path / "b.model")
    made_with.tokenizer.sha256 = "another"  # preflight refuses it
    assert parse(*flags, initial=initial).namespace.tokenizer_model == str(tmp_path / "a.json")
    assert parse(*flags, "--tokenizer-model", "mine", initial=initial).namespace.tokenizer_model == "mine"
    assert parse(*flags, initial=make_initial_model()).namespace.tokenizer_model is None
    assert parse(*flags, initial=initial).namespace.tokenizer_type == "HuggingFaceTokenizer"


def test_the_tokenizer_may_have_fewer_tokens_than_the_model_but_not_more(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from megatron_hammer.config.preflight.data import find_vocabulary_problems

    settings = parse(*RECIPE).settings
    smaller = SimpleNamespace(vocab_size=4000, path="tokenizer.model")
    assert find_vocabulary_problems(settings, smaller) == []  # type: ignore[arg-type]
    larger = SimpleNamespace(vocab_size=4097, path="tokenizer.model")
    assert_problems(
        find_vocabulary_problems(settings, larger),  # type: ignore[arg-type]
        (
            "tokenizer-model:",
            "must have no more",
            "got 4097 in tokenizer.model, vocab_size=4096",
            "hammer resize-embeddings",
        ),
    )
