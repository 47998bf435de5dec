"""Fine-tuning starts with the loss and the gradient that transformers has for each conversation by itself.

The first batch holds every conversation once, so the oracle needs neither our packing nor our order. A twin that leaks
across boundaries in one of four stages differs by 2.8e-3 in the loss and 1.6e-3 in the gradient's norm.
"""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl
from tokenizers import Tokenizer, models

from tests.helpers.fine_tuning import LOSS_TOLERANCE, NORM_TOLERANCE, NUM_CONVERSATIONS, FineTuning
from tests.helpers.training_runs import read_lines, run, run_program, train

pytestmark = pytest.mark.distributed
PP4 = ("--pipeline-model-parallel-size", "4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FineTuning:
    return FineTuning(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> FineTuning:
    return FineTuning(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize("is_packed", [False, True])
def test_trl_has_the_same_loss_and_gradient(llama: FineTuning, tmp_path: Path, is_packed: bool) -> None:
    """Packed as TRL does it (padding_free): one sequence whose positions begin anew."""
    records = [
        {"input_ids": ids.tolist(), "labels": np.where(mask, ids, -100).tolist()} for ids, mask in llama.conversations
    ]
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(llama.directory / "hf", dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=len(records), padding_free=is_packed,
            max_length=None, gradient_checkpointing=False, use_cpu=True, bf16=False, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<end>"
        ),
    )  # fmt: skip
    trainer.train()
    llama.assert_equal(trainer.state.log_history[0])


LAYOUTS = {
    "pp4": (4, PP4),
    "pp2-vp2": (2, ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")),
    "tp2-sp": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "4")),
    # The ranks have other numbers of learned tokens, and so have their micro-batches.
    "dp2": (2, ("--micro-batch-size", "2", "--recompute-activations")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_conversations_at_every_layout(llama: FineTuning, tmp_path: Path, layout: str) -> None:
    num_processes, flags = LAYOUTS[layout]
    (line,) = train(num_processes, tmp_path / "metrics.jsonl", *llama.flags, "--global-batch-size", "8", *flags)
    llama.assert_equal(line)
    assert line["learned_tokens"] > 100
    assert 0 < line["padding_share"] < 0.2


def test_learned_positions_begin_anew(gpt2: FineTuning, tmp_path: Path) -> None:
    flags = ("--global-batch-size", "8", "--micro-batch-size", "4", "--pipeline-model-parallel-size", "2")
    (line,) = train(2, tmp_path / "metrics.jsonl", *gpt2.flags, *flags)
    gpt2.assert_equal(line)


def test_one_conversation_per_sequence(llama: FineTuning, tmp_path: Path) -> None:
    flags = ("--sft-unpacked", "--global-batch-size", str(NUM_CONVERSATIONS), "--micro-batch-size", "12")
    (line,) = train(1, tmp_path / "metrics.jsonl", *llama.flags, *flags)
    llama.assert_equal(line)


def test_a_middle_stage_that_loses_the_boundaries_is_noticed(llama: FineTuning, tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "helpers" / "leaking_stage.py"
    flags = (*llama.flags, "--global-batch-size", "8", *PP4, "--metrics-path", str(tmp_path / "metrics.jsonl"))
    result = run_program(program, 4, *flags, LEAKING_STAGE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert abs(line["loss"] / llama.loss - 1) > 100 * LOSS_TOLERANCE
    assert abs(line["grad_norm"] / llama.norm - 1) > 100 * NORM_TOLERANCE


def test_a_resumed_run_keeps_the_order_of_conversations(llama: FineTuning, tmp_path: Path) -> None:
    """Bit for bit, across the end of an epoch of 8 sequences; another packing is refused."""
    flags = (*llama.flags, "--global-batch-size", "4", "--train-iters", "5", "--save", str(tmp_path / "run"))
    whole = train(1, tmp_path / "whole.jsonl", *flags[:-2])
    train(1, tmp_path / "run.jsonl", *flags, "--exit-interval", "2")
    resumed = train(1, tmp_path / "run.jsonl", *flags)
    exact = ("step", "loss", "grad_norm", "num_samples", "learned_tokens", "padding_share")
    assert [[line[name] for name in exact] for line in resumed] == [[line[name] for name in exact] for line in whole]
    refused = run(1, *flags, "--train-iters", "6", "--sft-unpacked", "--override-opt-param-scheduler")
    assert refused.returncode == 2
    assert "rows=one conversation per sequence (was packed conversations)" in refused.stderr
