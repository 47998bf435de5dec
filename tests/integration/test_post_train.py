"""SFT, reward models and DPO through TRL: against plain PyTorch, killed and continued, offline, back to Megatron."""

import dataclasses
import json
import math
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_hammer.checkpoint.convert.from_hugging_face import ImportOptions, import_from_hugging_face
from megatron_hammer.cli.post_train import main
from megatron_hammer.errors import ConfigError, ConversionError, DataError
from megatron_hammer.post_training.trl.output_folder import write_output
from megatron_hammer.post_training.trl.post_train import PostTrainOptions, PostTrainReport, post_train
from megatron_hammer.post_training.trl.progress import ShowProgress
from megatron_hammer.post_training.trl.recipe import Dpo, Lora, Recipe
from tests.helpers.repository import ROOT
from tests.helpers.toy_chat_model import list_conversations, list_preferences, write_chat_model, write_lines
from tests.helpers.training_runs import run_program

pytestmark = pytest.mark.integration

BETA = 0.3
RECIPE = Recipe(lr=1e-2, train_steps=3, micro_batch_size=4, global_batch_size=8, save_interval=2, log_interval=1)
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"recipe": RECIPE},
    "reward": {"recipe": dataclasses.replace(RECIPE, lora=Lora(rank=3)), "is_lora": True},
    "dpo": {"recipe": dataclasses.replace(RECIPE, dpo=Dpo(beta=BETA), lora=Lora(rank=3)), "is_lora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, conversations.jsonl and preferences.jsonl."""
    folder = tmp_path_factory.mktemp("post_train")
    write_chat_model(folder / "base")
    write_lines(folder / "conversations.jsonl", list_conversations())
    write_lines(folder / "preferences.jsonl", list_preferences())
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A test fails if anything in it looks for another machine, also where a library would hide the refusal."""
    attempts: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        attempts.append(arguments[-1])
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    yield attempts
    assert attempts == []


def build_options(folder: Path, save_dir: Path, stage: str, **changes: Any) -> PostTrainOptions:
    data = str(folder / ("conversations.jsonl" if stage == "sft" else "preferences.jsonl"))
    options = {"stage": stage, "hf_dir": folder / "base", "data": [data], "held_out_data": [data], "save_dir": save_dir}
    return PostTrainOptions(**options | {"chat_template": "chatml", "platform": "cpu"} | STAGES[stage] | changes)


def train(folder: Path, save_dir: Path, stage: str, **changes: Any) -> PostTrainReport:
    report = post_train(build_options(folder, save_dir, stage, **changes))
    assert report is not None
    return report


def render(tokenizer: Any, record: Mapping[str, Any], answer: str | None = None) -> tuple[Tensor, Tensor]:
    """Ids [n] and labels [n] of a conversation, or of a preference with one of its answers, by transformers alone."""
    messages = record.get("messages") or [
        {"role": "user", "content": record["instruction"]},
        {"role": "assistant", "content": record[answer or ""]},
    ]
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    encoded = tokenizer.apply_chat_template(messages, **options)
    ids, mask = encoded["input_ids"][0], encoded["assistant_masks"][0].bool()
    if answer is not None:  # a preference ends with its end-of-turn token
        end = int(mask.nonzero()[-1]) + 1
        ids, mask = ids[:end], mask[:end]
    return ids, torch.where(mask, ids, -100)


def score_sft(model: Any, tokenizer: Any, batch_size: int) -> float:
    """The mean over batches of the mean over learned tokens, as TRL reports it."""
    records, means = list_conversations(), []
    for start in range(0, len(records), batch_size):
        pairs = [render(tokenizer, record) for record in records[start : start + batch_size]]
        num_tokens = sum(int((labels[1:] != -100).sum()) for _, labels in pairs)
        means.append(-sum(float(sum_log_probabilities(model, *pair)) for pair in pairs) / num_tokens)
    return sum(means) / len(means)


def sum_log_probabilities(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return -cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum")


@torch.no_grad()
def score(stage: str, base_dir: Path, save_dir: Path, tokenizer: Any, *, batch_size: int = 4) -> float:
    """The loss of the stage on all its records, from the folders that were written, without TRL."""
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(save_dir, dtype=torch.float32)
    if stage == "sft":
        return score_sft(model, tokenizer, batch_size)
    losses = []
    reference = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    for record in list_preferences():
        pairs = [render(tokenizer, record, answer) for answer in ("chosen", "rejected")]
        if stage == "reward":
            values = [model(input_ids=ids[None]).logits[0, 0] for ids, _ in pairs]
        else:
            values = [
                BETA * (sum_log_probabilities(model, *pair) - sum_log_probabilities(reference, *pair)) for pair in pairs
            ]
        losses.append(-logsigmoid(values[0] - values[1]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_published_model_has_the_loss_that_was_reported(folder: Path, tmp_path: Path, stage: str) -> None:
    report = train(folder, tmp_path / "out", stage)
    losses = list(report.losses.values())
    assert losses[-1] < losses[0]
    base_dir, tokenizer = folder / "base", AutoTokenizer.from_pretrained(tmp_path / "out")
    assert score(stage, base_dir, tmp_path / "out", tokenizer) == pytest.approx(report.held_out["loss"], rel=1e-5)
    if stage == "sft":  # the first step is the mean over all learned tokens of its batch
        assert score("sft", base_dir, base_dir, tokenizer, batch_size=8) == pytest.approx(losses[0], rel=1e-5)
    if stage == "dpo":  # the model is its own reference
        assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert (report.num_records, report.num_examples, report.num_held_out, report.dropped) == (16, 8, 8, {})
    assert (report.num_trained_parameters < report.num_parameters) == report.is_lora
    written = json.loads((tmp_path / "out" / "post_training.json").read_text())
    assert written["losses"] == {str(step): loss for step, loss in report.losses.items()}
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_run_continues_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any step; with dropout in the adapters, so that the state of the random numbers counts."""
    recipe = dataclasses.replace(RECIPE, train_steps=5, global_batch_size=4, lora=Lora(rank=3, dropout=0.2))
    options = {"recipe": recipe, "is_lora": True}
    whole = train(folder, tmp_path / "whole", "sft", **options)
    shown = ShowProgress.on_log

    def die(self: Any, arguments: Any, state: Any, *others: Any, **logs: Any) -> None:
        shown(self, arguments, state, *others, **logs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    save_dir, work_dir = tmp_path / "killed", tmp_path / "killed.partial"
    with monkeypatch.context() as patch:
        patch.setattr(ShowProgress, "on_log", die)
        with pytest.raises(KeyboardInterrupt):
            train(folder, save_dir, "sft", **options)
    assert not save_dir.exists()
    (work_dir / "checkpoint-4").mkdir()  # as a kill while it is written leaves it
    changed = options | {"recipe": dataclasses.replace(recipe, lr=5e-3, seed=5)}
    with pytest.raises(ConfigError) as caught:
        train(folder, save_dir, "sft", **changed)
    assert [problem.split(" ")[0] for problem in caught.value.problems[:2]] == ["recipe.lr:", "recipe.seed:"]
    resumed = train(folder, save_dir, "sft", **options)
    assert (whole.resumed_from_step, resumed.resumed_from_step) == (0, 2)
    assert resumed.losses == whole.losses
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_an_unfinished_run_can_be_thrown_away(folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, train_steps=1)
    job_path = tmp_path / "out.partial" / "job.json"
    job_path.parent.mkdir()
    job_path.write_text("{}")
    with pytest.raises(ConfigError, match=r"job\.json: stage must be given.*--restart"):
        train(folder, tmp_path / "out", "sft", recipe=recipe)
    assert train(folder, tmp_path / "out", "sft", recipe=recipe, restart=True).num_steps == 1


def test_an_adapter_that_is_kept_is_the_one_that_is_merged(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "merged", "dpo")
    report = train(folder, tmp_path / "adapter", "dpo", keeps_adapter=True)
    assert report.is_adapter
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name for name, weight in weights.items() if not torch.equal(weight, merged[name])} == set()
    original = load_file(folder / "base" / "model.safetensors")
    assert {name for name, weight in weights.items() if not torch.equal(weight, original[name])} == {
        f"model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in (*(f"self_attn.{part}_proj" for part in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_a_trained_model_goes_back_to_megatron(tmp_path: Path) -> None:
    """In the stored type of the base model; with the template, and stopping at the end of a turn."""
    write_chat_model(tmp_path / "base", dtype="bfloat16")
    write_lines(tmp_path / "conversations.jsonl", list_conversations())
    recipe = dataclasses.replace(RECIPE, precision="bf16", train_steps=1)
    train(tmp_path, tmp_path / "out", "sft", recipe=recipe)
    weights, original = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert {name: (weight.dtype, weight.shape) for name, weight in weights.items()} == {
        name: (weight.dtype, weight.shape) for name, weight in original.items()
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 2]
    assert "{% generation %}" in tokenizer.chat_template or "{%- generation %}" in tokenizer.chat_template
    options = ImportOptions(hf_dir=tmp_path / "out", save_dir=tmp_path / "megatron", verify="tensors")
    report = import_from_hugging_face(options)
    assert report.num_parameters == sum(weight.numel() for weight in weights.values())


BAD_PREFERENCES = (
    ({"instruction": "q", "chosen": "a", "rejected": " a"}, "equal-answers"),
    (
        {"instruction": "q"}
        | {name: {"role": "assistant", "content": "a", "id": name} for name in ("chosen", "rejected")},
        "equal-answers",
    ),
    ({"instruction": "q", "chosen": "a", "rejected": " "}, "empty-turn"),
    ({"instruction": " ", "chosen": "a", "rejected": "b"}, "empty-turn"),
    ({"instruction": "q", "chosen": "a", "rejected": "fox " * 99}, "too-long"),
    ({"instruction": "q", "chosen": "a"}, "bad-record"),
    (
        {
            name: [{"role": "user", "content": name}, {"role": "assistant", "content": name}]
            for name in ("chosen", "rejected")
        },
        "prompts-differ",
    ),
)


def test_pairs_that_teach_nothing_are_named_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [*(record for record, _ in BAD_PREFERENCES), list_preferences()[0]])
    recipe = dataclasses.replace(RECIPE, train_steps=1)
    report = train(folder, tmp_path / "out", "reward", recipe=recipe, is_lora=False, data=[str(data)], held_out_data=[])
    named = [(f"{data}:{line}", reason) for line, (_, reason) in enumerate(BAD_PREFERENCES, start=1)]
    assert sorted((place, reason) for reason, places in report.dropped.items() for place in places) == named
    assert (report.num_records, report.num_examples) == (8, 1)
    told = capsys.readouterr().err
    assert all(f"left out: {data}:{line}: " in told for line in range(1, 8))
    write_lines(data, [BAD_PREFERENCES[0][0]])
    with pytest.raises(DataError, match="must hold a record that can be used, got 1 equal-answers"):
        train(folder, tmp_path / "none", "dpo", data=[str(data)])
    assert not (tmp_path / "none").exists()


def test_the_command_prints_a_summary_and_refuses_what_has_no_effect(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sft.toml"
    config.write_text("lr = 1e-3\ntrain_steps = 1\nmicro_batch_size = 4\nglobal_batch_size = 8\n")
    flags = ["--load", folder / "base", "--data", folder / "conversations.jsonl", "--config", config]
    flags += ["--save", tmp_path / "out", "--platform", "cpu"]
    command = ["sft", *map(str, flags)]
    for extra, problem in (
        (["--keep-adapter"], "--keep-adapter: needs --lora"),
        ([], f"{folder / 'base'}: model must have a chat_template.jinja"),
        (["--chat-template", "chat-ml"], "chat-template: must be"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, *extra])
        assert caught.value.code == 2
        assert problem in capsys.readouterr().err
    main([*command, "--chat-template", "chatml", "--held-out-data", str(folder / "conversations.jsonl")])
    printed = capsys.readouterr()
    last = printed.out.splitlines()[-1]
    assert f"{tmp_path / 'out'}: sft, 16 records in, 8 used, 8 held out, 0 dropped; 1 steps, loss " in last
    assert "note: 8 of 8 held-out records are trained on too" in printed.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": Lora(target_modules=("q_proj", "nope"))}, r"lora.target_modules: .* got nope. It has .*q_proj"),
        ({"lora": Lora(modules_to_save=("mlp.down", "lm_head"))}, r"lora.modules_to_save: .* got mlp.down"),
        ({"lora": Lora(target_modules=("q_proj",), modules_to_save=("q_proj",))}, r"lora: .* got q_proj for both"),
        ({"lr_warmup_steps": 3}, r"lr_warmup_steps: must be below the 3 steps of the training, got 3"),
    ],
)
def test_a_recipe_that_would_not_do_what_it_says_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(folder, tmp_path / "out", "sft", recipe=dataclasses.replace(RECIPE, **changes), is_lora="lora" in changes)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_stored_type_cannot_hold_are_refused(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.lm_head.weight.data[3, 4] = 1e5
    model.half().save_pretrained(tmp_path / "half")
    options = {"base_dir": tmp_path / "half", "model": model.float(), "keeps_adapter": False, "pad_token": "<unk>"}
    with pytest.raises(ConversionError, match=r"lm_head.weight: must have finite weights, got others"):
        write_output(tmp_path / "out", stage="sft", chat_template="", end_of_turn_ids=[2], **options)


def test_two_processes_share_a_batch(folder: Path, tmp_path: Path) -> None:
    """As torchrun starts them: one step is the same step, and the first of them writes."""
    recipe = dataclasses.replace(RECIPE, train_steps=2, micro_batch_size=2)
    alone = train(folder, tmp_path / "alone", "dpo", recipe=recipe, is_lora=False)
    config = tmp_path / "dpo.toml"
    config.write_text("lr = 1e-2\ntrain_steps = 2\nmicro_batch_size = 2\nglobal_batch_size = 8\nlog_interval = 1\n")
    flags = ["--load", folder / "base", "--data", folder / "preferences.jsonl", "--config", config]
    flags += ["--save", tmp_path / "shared", "--chat-template", "chatml", "--platform", "cpu"]
    result = run_program(ROOT / "tools" / "post_train.py", 2, "dpo", *map(str, flags))
    assert result.returncode == 0, result.stderr
    shared = json.loads((tmp_path / "shared" / "post_training.json").read_text())["losses"]
    # Measured: 7e-7 in the weights after four steps; sums over the batch have another order.
    assert list(shared.values()) == pytest.approx(list(alone.losses.values()), rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "shared")]
    assert all(torch.allclose(weight, weights[1][name], atol=1e-5) for name, weight in weights[0].items())


@pytest.mark.parametrize("log_interval", [1, 100])
def test_a_loss_that_is_not_a_number_ends_the_run(folder: Path, tmp_path: Path, log_interval: int) -> None:
    recipe = dataclasses.replace(RECIPE, lr=1e30, clip_grad=1e30, log_interval=log_interval)
    with pytest.raises(DataError, match=r"loss: must be finite, got (nan|inf) in step [23]"):
        train(folder, tmp_path / "out", "sft", recipe=recipe)
    assert not (tmp_path / "out").exists()
