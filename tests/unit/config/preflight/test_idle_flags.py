"""What is said of flags without effect; tests/unit/config/flag_tables asks about every flag."""

import pytest

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.run_plan import RunSettings
from tests.helpers.parsed_flags import TINY, find, parse, with_flags

BASE = parse(*TINY).settings


def list_idle(flag: str, settings: RunSettings) -> list[str]:
    return [text for text in find_flag_problems(settings) if text.startswith(f"{flag}: has no effect")]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--kv-lora-rank 64", "kv-lora-rank: has no effect here: no such layer is built, got --kv-lora-rank typed."),
        ("--lr-wsd-decay-style linear", "lr-wsd-decay-style: has no effect without --lr-decay-style WSD"),
        ("--manual-gc-interval 5", "manual-gc-interval: has no effect without --manual-gc"),
        ("--cp-comm-type a2a", "cp-comm-type: has no effect without context parallelism"),
        ("--hierarchical-context-parallel-sizes 2 1", "without context parallelism"),
        ("--offload-modules core_attn", "offload-modules: has no effect without --fine-grained-activation-offloading"),
        ("--use-dist-ckpt", "use-dist-ckpt: has no effect in megatron-core 0.19, which never reads it"),
        ("--moe-router-topk 2", "moe-router-topk: has no effect without --num-experts, got --moe-router-topk typed"),
        ("--num-experts 8 --moe-token-drop-policy probs", "without --moe-expert-capacity-factor"),
        ("--log-timers-to-tensorboard", "log-timers-to-tensorboard: has no effect without --tensorboard-dir"),
        (
            "--load x --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
            "use-checkpoint-opt-param-scheduler: has no effect with --override-opt-param-scheduler",
        ),
        ("--profile-step-start 3", "profile-step-start: has no effect without --profile"),
        ("--disable-straggler-on-startup", "without --log-straggler"),
        ("--ft-num-warmup-iters 3", "ft-num-warmup-iters: has no effect without --enable-ft-package"),
        ("--fp8-recipe delayed", "without --fp8-format: the run would train in its other precision"),
        ("--rl-prompts-per-eval 2", "rl-prompts-per-eval: has no effect while pretraining"),
        ("--inference-max-seq-length 9", "inference-max-seq-length: has no effect while pretraining"),
        ("--num-classes 9", "on a language model"),
        ("--glu-linear-offset 1.0", "unless SwiGLU is computed without fusion"),
        ("--no-bias-gelu-fusion", "no-bias-gelu-fusion: has no effect with --swiglu"),
        ("--batch-size 2", "which refuses it, got --batch-size typed. Pass --micro-batch-size"),
        ("--padded-vocab-size 5000", "padded-vocab-size: has no effect here: it follows from --vocab-size"),
        ("--check-for-spiky-loss", "check-for-spiky-loss: has no effect here"),
        ("--inprocess-restart", "inprocess-restart: has no effect here: training is not wrapped for it"),
        ("--inprocess-restart --inprocess-max-iterations 2", "inprocess-max-iterations: has no effect here"),
        ("--async-save", "async-save: has no effect without --save"),
        ("--use-persistent-ckpt-worker", "use-persistent-ckpt-worker: has no effect without --async-save"),
    ],
)
def test_a_flag_without_its_companion_is_reported(flags: str, match: str) -> None:
    assert [problem for problem in find(*TINY, *flags.split()) if match in problem]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr_decay_iters", {"lr_decay_style": "constant", "lr_warmup_fraction": 0.1}),
        ("ckpt_step", {"load": None, "pretrained_checkpoint": "old"}),
        ("cuda_graph_modules", {"external_cuda_graph": True, "backend": "te", "platform": "cuda"}),
        ("async_save", {"save": "new"}),
        ("lion_beta1", {"optimizer": "muon", "muon_scalar_optimizer": "lion"}),
    ],
)
def test_flags_that_work_with_another_are_not_idle(name: str, values: dict[str, object]) -> None:
    assert list_idle(flag_of(name), with_flags(BASE, name, **values)) == []


def test_values_that_are_not_typed_are_silent() -> None:
    assert find_flag_problems(with_flags(BASE, lr_decay_style="constant", position_embedding_type="none")) == []
