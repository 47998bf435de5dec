"""A configuration that cannot work ends with one message and exit code 2, before any process group forms."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.errors import USER_ERROR_EXIT_CODE
from tests.helpers.parsed_flags import find, write_data
from tests.helpers.training_runs import environment, run

SENTENCE = re.compile(r"^[\w./~+-]+: .+[^.]\. [A-Z].+[^.]\.$")
TINY = "--preset hammer-tiny --mock-data"
MOE = "--preset hammer-tiny-moe --mock-data"
LLAMA_70B = "--preset llama2-70b --mock-data"
PLAN = "--dry-run --world-size"
# name: (flags, part of the one sentence that must come out)
BAD = {
    # The pipeline: what Megatron trains wrong, or crashes on after it has started
    "80 layers at pp16 vp2 would train 64": (
        f"{LLAMA_70B} --pipeline-model-parallel-size 16 --num-virtual-stages-per-pipeline-rank 2 {PLAN} 4096",
        r"must divide the 5 layers of a stage, got vp=2, pp=16, num_layers=80 \(rounding down would build 64 of 80\)",
    ),
    "layers over stages": (
        f"{LLAMA_70B} --pipeline-model-parallel-size 3 {PLAN} 24",
        r"must divide num_layers, got pp=3, num_layers=80\. Use 1, 2, 4",
    ),
    "layers of a chunk": (
        f"{LLAMA_70B} --num-layers-per-virtual-pipeline-stage 3 {PLAN} 32",
        r"num-layers-per-virtual-pipeline-stage: must divide the 20 layers of a stage, .*=3",
    ),
    "chunks without stages": (
        f"{TINY} --num-virtual-stages-per-pipeline-rank 2",
        r"needs more than one pipeline stage, got vp=2, pp=1",
    ),
    "uneven stages that lose layers": (
        f"{TINY} --pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 1 {PLAN} 3",
        r"num_layers: the middle layers must divide over 2 stages, got num_layers=4, first=1, leaving 3",
    ),
    "interleaving with too few micro-batches": (
        f"{TINY} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        f"--global-batch-size 2 {PLAN} 2",
        r"at least as many micro-batches as stages, .* got 1 micro-batches, pp=2",
    ),
    "interleaving with a short last group": (
        f"{TINY} --num-layers 8 --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 "
        f"--global-batch-size 12 {PLAN} 4",
        r"takes micro-batches in groups of 4, .* got 6 micro-batches, pp=4.* Use 4 or 8 micro-batches",
    ),
    # Cuts
    "world size": (
        f"{TINY} --tensor-model-parallel-size 2 {PLAN} 5",
        r"world-size: must be a multiple of .* got world_size=5, tp=2",
    ),
    "heads over tensor ranks": (
        f"{TINY} --tensor-model-parallel-size 3 {PLAN} 3 --num-query-groups 1 --ffn-hidden-size 705",
        r"must divide num_attention_heads, got tp=3, num_attention_heads=16",
    ),
    "query groups over tensor ranks": (
        f"{TINY} --num-query-groups 4 --tensor-model-parallel-size 6 --num-attention-heads 24 "
        f"--kv-channels 16 --ffn-hidden-size 720 --hidden-size 384 {PLAN} 6",
        r"must divide num_query_groups or be a multiple of it, got tp=6, num_query_groups=4",
    ),
    "query groups over heads": (f"{TINY} --num-query-groups 3", r"must divide num_attention_heads, got .*=3"),
    "ffn over tensor ranks": (
        f"{TINY} --tensor-model-parallel-size 2 --ffn-hidden-size 705 {PLAN} 2",
        r"must divide ffn_hidden_size",
    ),
    "odd rotary heads": (f"{TINY} --kv-channels 15", r"rotary embeddings turn pairs of channels, got kv_channels=15"),
    "heads that the preset sized": (
        f"{TINY} --num-attention-heads 8",
        r"kv-channels: the preset's no longer follows .* Pass --kv-channels 32\.",
    ),
    "sequence over tensor ranks": (
        f"{TINY} --tensor-model-parallel-size 2 --sequence-parallel --seq-length 255 {PLAN} 2",
        r"seq-length: must be a multiple of tensor x context parallel sizes .* Use 256\.",
    ),
    "sequence beyond positions": (
        f"{TINY} --seq-length 512",
        r"got max_position_embeddings=256, seq_length=512\. Pass --max-position-embeddings 512\.",
    ),
    "experts without experts": (
        f"{TINY} --expert-model-parallel-size 2 {PLAN} 2",
        r"expert-model-parallel-size: needs a model with experts, got ep=2",
    ),
    "experts over ranks": (
        f"{MOE} --expert-model-parallel-size 3 {PLAN} 3 --global-batch-size 6",
        r"expert-model-parallel-size: must divide num_experts, got ep=3, num_experts=4\. Use 1, 2 or 4\.",
    ),
    "experts over the stage": (
        f"{MOE} --expert-model-parallel-size 4 {PLAN} 2",
        r"must divide the 2 ranks of a pipeline stage, got ep=4",
    ),
    "more experts a token than there are": (
        f"{MOE} --moe-router-topk 5",
        r"must be at most num_experts, got moe_router_topk=5, num_experts=4",
    ),
    "a number for each layer": (f"{MOE} --moe-layer-freq [0]+[1]*2", r"must have a number for each layer, got moe_lay"),
    "experts in no layer": (f"{MOE} --moe-layer-freq [0]*4", r"must be 0 or 1 for each layer, and 1 for some"),
    "experts every 0th layer": (f"{MOE} --moe-layer-freq 0", r"moe-layer-freq: must be at least 1"),
    # Batch
    "global batch over ranks": (
        f"{TINY} {PLAN} 3",
        r"got global_batch_size=8, micro_batch_size=2, dp=3\. Use --global-batch-size 6 or 12",
    ),
    "evaluation batch": (
        f"{TINY} --eval-global-batch-size 3",
        r"eval-global-batch-size: must be a multiple of eval_micro_batch_size .* got eval_global_batch_size=3",
    ),
    # Schedule
    "warm-up beyond the end": (
        f"{TINY} --train-iters 10",
        r"must be below the 10 iters .* got lr_warmup_iters=20\. Pass --lr-warmup-iters 1\.",
    ),
    "steps and samples": (
        f"{TINY} --train-iters 100 --train-samples 800 --lr-warmup-samples 8",
        r"a run has one length, got train_samples=800, train_iters=100",
    ),
    "warm-up in samples": (f"{TINY} --lr-warmup-samples 8", r"must be counted like the run, got lr_warmup_samples=8"),
    "two warm-ups": (
        f"{TINY} --lr-warmup-fraction 0.1 --lr-warmup-iters 20",
        r"a warm-up has one length, got lr_warmup_fraction=0\.1",
    ),
    "least rate above the rate": (f"{TINY} --min-lr 0.5", r"min-lr: must not be above lr, got min_lr=0\.5, lr="),
    # Values
    "a negative size": (f"{TINY} --micro-batch-size -2", r"must be at least 1, got micro_batch_size=-2"),
    "no tensor ranks": (f"{TINY} --tensor-model-parallel-size 0", r"at least 1, got tensor_model_parallel_size=0"),
    "no heads": (f"{TINY} --num-attention-heads 0", r"must be at least 1, got num_attention_heads=0"),
    "a rate that is no number": (f"{TINY} --lr nan", r"lr: must be finite and at least 0, got lr=nan"),
    "a decoupled rate below 0": (f"{TINY} --decoupled-lr -1e-3", r"decoupled-lr: must be finite and at least 0, got"),
    "a spread that is no number": (
        f"{TINY} --embedding-init-method-std nan",
        r"embedding-init-method-std: must be fin",
    ),
    "steps before the first": (f"{TINY} --iterations-to-skip 3 -1", r"at least 0, got iterations_to_skip=\[3, -1\]"),
    "a batch schedule that is none": (
        f"{TINY} --step-batch-size-schedule 8",
        r'step_batch_size_schedule=8: Invalid schedule entry "8"',
    ),
    "a later batch that nothing divides": (
        f"{TINY} --step-batch-size-schedule 0:8,1M:7",
        r"step_batch_size_schedule=0:8,1M:7: .*\(7\) is not divisible",
    ),
    "dropout of one": (f"{TINY} --hidden-dropout 1", r"at least 0 and below 1, got hidden_dropout=1"),
    "an infinite rate": (f"{TINY} --lr inf", r"lr: must be finite and at least 0, got lr=inf"),
    "a rate to begin with that is no number": (
        f"{TINY} --lr-warmup-init nan",
        r"must be finite .* got lr_warmup_init=nan",
    ),
    "no time to meet": (f"{TINY} --distributed-timeout-minutes 0", r"got distributed_timeout_minutes=0"),
    "memory that is no number": (
        f"{TINY} --dry-run --gpu-memory-gib nan",
        r"gpu-memory-gib: must be finite and at least 0, got gpu_memory_gib=nan",
    ),
    "a seed that megatron refuses": (f"{TINY} --seed 0", r"seed: must be at least 1 and below 2147483648, got seed=0"),
    "more layers than can be listed": (
        f"{TINY} --num-layers 99999999999",
        r"num-layers: must be at most 100000, got num_layers=99999999999",
    ),
    "a batch that nothing divides": (
        f"{TINY} --global-batch-size 9999999999999999",
        r"global-batch-size: must be at most 2147483647, got global_batch_size=9999999999999999",
    ),
    "samples that fill no step": (
        f"{TINY} --train-samples 7 --lr-warmup-samples 0",
        r"train-samples: must fill one step, got train_samples=7, global_batch_size=8",
    ),
    "a fall longer than the run": (
        f"{TINY} --lr-decay-style WSD --lr-wsd-decay-iters 500",
        r"lr-wsd-decay-iters: must be at most the 200 iters .* got lr_wsd_decay_iters=500\. Pass .* 20\.",
    ),
    "rotary shares": (
        f"{TINY} --rotary-percent 2",
        r"rotary-percent: must be a share of kv_channels .*=2, kv_channels=16",
    ),
    # Files
    "no prefix": ("--preset hammer-tiny --data-path", r"data-path: must name prefixes, got \[\]"),
    "a tokenizer type alone": (
        f"{TINY} --tokenizer-type SentencePieceTokenizer",
        r"tokenizer-type: needs a tokenizer file that exists, got tokenizer_type=SentencePieceTokenizer",
    ),
    "metrics in a folder's place": (f"{TINY} --metrics-path /tmp", r"metrics-path: must be a file, got a folder"),
    "metrics below a file": (f"{TINY} --metrics-path {__file__}/m.jsonl", r"metrics-path: must be a folder that can"),
    "tensorboard below a file": (
        f"{TINY} --tensorboard-dir {__file__}/tb",
        r"tensorboard-dir: must be a folder that can",
    ),
    "a name that is too long": (f"{TINY} --load {'a' * 300}", r"load: must be an existing folder, got load=aaa"),
    "no data": ("--preset hammer-tiny", r"a run needs data, got none \(Megatron would train on random tokens\)"),
    "two kinds of data": (
        f"{TINY} --data-path x --split 98,2,0",
        r"data comes from one place, got --mock-data, --data-path",
    ),
    "a data set that is not there": (
        "--preset hammer-tiny --data-path nowhere/corpus",
        r"nowhere/corpus\.bin: file does not exist",
    ),
    "a weight without its prefix": (
        "--preset hammer-tiny --data-path 0.7 a b",
        r"must be prefixes alone, or a weight before every prefix, got 0\.7 a b",
    ),
    "a tokenizer that is not there": (
        f"{TINY} --tokenizer-model nowhere/tokenizer.model",
        r"tokenizer-model: nowhere/tokenizer\.model: tokenizer does not exist",
    ),
    "a checkpoint that is not there": (
        f"{TINY} --load nowhere",
        r"load: must be an existing folder, got load=nowhere.*Megatron would start from random weights",
    ),
    # What this machine cannot do
    "memory": (f"{LLAMA_70B} {PLAN} 32 --gpu-memory-gib 40", r"memory: the estimate of pipeline stage 0 must fit"),
    "context parallelism on the cpu": (
        f"{TINY} --context-parallel-size 2 {PLAN} 2",
        r"does not work on the cpu platform, got context_parallel_size=2: context parallelism needs TransformerEngine",
    ),
    "fp8 on the cpu": (f"{TINY} --fp8-format hybrid", r"fp8-format: does not work on the cpu platform"),
    # Flags that would do nothing
    "sequence parallelism of one rank": (
        f"{TINY} --sequence-parallel",
        r"sequence-parallel: has no effect without tensor parallelism",
    ),
    "a ramp that Megatron ignores": (
        f"{TINY} --rampup-batch-size 2 2 8",
        r"rampup-batch-size: has no effect in megatron-core 0\.19, which trains at the full batch",
    ),
    "a model that is not counted": (
        f"{TINY} --mtp-num-layers 1",
        r"mtp-num-layers: is not supported here: .* got mtp_num_layers=1",
    ),
    # The last net: what only Megatron knows
    "what only Megatron refuses": (
        f"{TINY} --log-interval 2 --log-memory-interval 3",
        r"megatron: refuses this configuration: args\.log_memory_interval % args\.log_interval == 0 does not hold",
    ),
    "a file that only the te backend reads": (
        f"{TINY} --te-precision-config-file nowhere.yaml",
        r"te-precision-config-file: needs the te backend \(TransformerEngine\), got te_precision_config_file=nowhere",
    ),
    "a retired flag": (
        f"{TINY} --checkpoint-activations",
        r"checkpoint-activations: has no effect in megatron-core 0\.19, which refuses it, got --checkpoint-activations",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(name: str) -> None:
    flags, match = BAD[name]
    problems = find(*flags.split())
    assert len(problems) == 1, problems
    assert re.search(match, problems[0]), problems[0]
    assert SENTENCE.match(problems[0]), problems[0]


def test_all_problems_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    flags = f"--preset hammer-tiny --data-path {tmp_path}/corpus --save {tmp_path}/file/run --load {tmp_path}/empty"
    problems = find(*flags.split(), "--min-lr", "1", "--sequence-parallel", "--seq-length", "999")
    starts = [problem.split(":")[0] for problem in problems]
    expected = ["sequence-parallel", "max-position-embeddings", "min-lr", str(tmp_path / "corpus.bin"), "save", "load"]
    assert starts == expected


# Ten and more of them end to end, several to a process: it takes seconds to start.
COMMANDS = {
    "layout": (
        f"{LLAMA_70B} --pipeline-model-parallel-size 16 --num-virtual-stages-per-pipeline-rank 2 "
        "--world-size 4096 --mtp-num-layers 1",
        (
            "would build 64 of 80",
            "mtp-num-layers: is not supported here",
        ),
    ),
    "cuts and schedule": (
        f"{TINY} --tensor-model-parallel-size 3 --world-size 3 --min-lr 1 --train-iters 5 "
        "--rampup-batch-size 2 2 8 --context-parallel-size 1 --fp8-format hybrid",
        (
            "must divide num_attention_heads, got tp=3",
            "min-lr: must not be above lr",
            "rampup-batch-size: has no effect",
            "lr-warmup-iters: must be below the 5 iters",
            "fp8-format: does not work on the cpu platform",
        ),
    ),
    "files": (
        "--preset hammer-tiny --data-path nowhere/corpus --tokenizer-model nowhere/t.model "
        "--load nowhere/checkpoint --save new --sequence-parallel",
        (
            "nowhere/corpus.bin: file does not exist",
            "nowhere/t.model: tokenizer does not exist",
            "load: must be an existing folder",
            "sequence-parallel: has no effect",
        ),
    ),
    "no such flag": (
        f"{TINY} --no-such-flag",
        ("command line: unrecognized arguments: --no-such-flag",),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.integration
def test_command_ends_with_code_2_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank starts; the command is started as a user does below, and in test_dry_run.py."""
    flags, sentences = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    result = run(1, "--platform", "cpu", "--dry-run", *flags.split())
    assert result.returncode == USER_ERROR_EXIT_CODE, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for sentence in sentences:
        assert sum(sentence in error for error in errors) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_real_launch_stops_as_early(tmp_path: Path) -> None:
    """Without --dry-run, and before it makes any folder but that of its log."""
    data = write_data(tmp_path / "corpus", [300] * 20)
    (tmp_path / "corpus.bin").write_bytes(b"cut")
    flags = ("--preset", "hammer-tiny", "--data-path", data, "--platform", "cpu", "--verbose")
    result = subprocess.run(
        [sys.executable, "-m", "megatron_hammer.training.pretrain", *flags],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == USER_ERROR_EXIT_CODE
    assert "corpus.bin: size must be 12000 bytes" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]
