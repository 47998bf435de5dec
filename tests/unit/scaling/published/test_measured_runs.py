"""A row becomes the plan that it describes; every blank is filled by a named assumption or makes it unpredictable."""

from pathlib import Path

import pytest

from megatron_hammer.model.accounting import count_active_parameters, count_parameters
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.layout_ranking import rank_layouts
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH, PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH
from tests.helpers.messages import assert_problem
from tests.helpers.run_tables import COLUMNS, read_one, read_plan, write_table


def test_a_complete_row(tmp_path: Path) -> None:
    run = read_one(tmp_path)
    plan, layout = run.plan, run.plan.layout
    assert (plan.model.num_layers, plan.model.hidden_size, plan.model.ffn_hidden_size) == (24, 2048, 8192)
    assert (plan.model.activation, plan.model.num_query_groups, plan.model.vocab_size) == ("gelu_tanh", 16, 51200)
    sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size)
    assert sizes == (2, 1, 8)
    assert layout.has_sequence_parallel
    assert (plan.micro_batch_size, plan.global_batch_size, plan.num_microbatches) == (2, 64, 4)
    assert (plan.gpu.name, plan.cluster.name, plan.precision, plan.recompute) == (
        "h100-sxm",
        "dgx-h100",
        "bf16",
        "none",
    )
    assert (plan.sharding, plan.shard_size, plan.has_flash_attention) == ("distributed_optimizer", None, True)
    assert (run.step_time_s, run.measured_as, run.row_number) == (0.7, "iteration_time_s", 2)
    assert run.is_megatron_style


@pytest.mark.parametrize(
    ("text", "gpu", "precision"),
    [
        ("mixed fp16", "A100-80GB", "fp16"),
        ("amp_bf16", "H100", "bf16"),
        ("FP8-CS", "H100", "fp8"),
        ("fp8 tensorwise", "H100", "fp8"),
        ("FP8-MX / fine-grained", "GB200", "mxfp8"),
        ("FP8-MX / fine-grained", "H100", "fp8_blockwise"),
        ("NVFP4", "GB300", "nvfp4"),
        ("", "H100", "bf16"),
    ],
)
def test_precisions(tmp_path: Path, text: str, gpu: str, precision: str) -> None:
    assert read_plan(tmp_path, precision=text, gpu_type=gpu).precision == precision


@pytest.mark.parametrize(
    ("text", "sharding", "shard_size"),
    [
        ("", "distributed_optimizer", None),
        ("DDP/dist-opt", "distributed_optimizer", None),
        ("ZeRO-1 within 4", "distributed_optimizer", 4),
        ("ZeRO-0", "none", None),
        ("none", "none", None),
        ("DDP", "none", None),
        ("ZeRO-2", "distributed_optimizer", None),
        ("by hand", "distributed_optimizer", None),  # unknown: the stack's, and that is said
        ("ZeRO-3", "fsdp", None),
        ("FSDP=4+DP", "fsdp", 4),
        ("FSDP=8", "fsdp", None),  # all of the data-parallel ranks
        ("FSDP HYBRID_SHARD", "fsdp", None),
        ("FSDP SHARD_GRAD_OP", "distributed_optimizer", None),
    ],
)
def test_shardings(tmp_path: Path, text: str, sharding: str, shard_size: int | None) -> None:
    plan = read_plan(tmp_path, sharding=text)
    assert (plan.sharding, plan.shard_size) == (sharding, shard_size)
    assert plan.layout.has_distributed_optimizer == (sharding == "distributed_optimizer")


def test_a_model_that_cannot_fit_whole_is_sharded(tmp_path: Path) -> None:
    shape = {"layers": "", "hidden": "", "heads": "", "kv_heads": "", "ffn": "", "vocab": "", "model": "llama3-70b"}
    cells = {"tp": "1", "gpus": "64", "dp": "64", "global_batch": "128", "sharding": "DDP/dist-opt"}
    run = read_one(tmp_path, **shape, **cells, recompute="full")
    assert run.plan.sharding == "fsdp"
    assert any(text.startswith("sharding fsdp: weights, gradients and buffers") for text in run.assumptions)
    assert read_plan(tmp_path, **shape, tp="8", gpus="64", dp="8").sharding == "distributed_optimizer"


def test_known_models_fill_blanks(tmp_path: Path) -> None:
    shape = {"layers": "", "hidden": "", "heads": "", "kv_heads": "", "ffn": "", "vocab": ""}
    model = read_plan(tmp_path, **shape, model="Nemotron4-340B", tp="8", dp="2").model
    assert (model.num_layers, model.hidden_size, model.num_query_groups, model.vocab_size) == (96, 18432, 8, 256_000)
    assert (model.activation, model.has_tied_embeddings) == ("gelu_tanh", False)  # squared ReLU: two matrices
    run = read_one(tmp_path, **shape, model="llama3.1-8b", params_B="8.03")
    assert count_parameters(run.plan.model) == 8_030_261_248
    assert not any("parameters as built" in text for text in run.assumptions)
    hammer = read_plan(tmp_path, **shape, model="HammerLLM-1.4B")
    assert hammer.model.name == "hammer-1b4"


def test_a_proxy_keeps_its_layers_and_says_so(tmp_path: Path) -> None:
    cells = {"model": "llama3.1-405b", "layers": "7", "hidden": "16384", "heads": "128", "kv_heads": "8"}
    run = read_one(tmp_path, **cells, ffn="53248", vocab="128256")
    assert run.plan.model.num_layers == 7
    assert "7 layers as the row has them, a proxy of the 126 of its name" in run.assumptions


def test_blank_sizes_by_rule(tmp_path: Path) -> None:
    run = read_one(tmp_path, heads="", kv_heads="", ffn="", vocab="", micro_batch="")
    model = run.plan.model
    assert (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size) == (16, 16, 8192)
    assert (model.vocab_size, run.plan.micro_batch_size) == (51_200, 4)
    for text in (
        "heads 16: blank",
        "kv_heads 16: blank",
        "ffn 8192: blank",
        "vocab 51200: blank",
        "micro_batch 4: blan",
    ):
        assert any(assumption.startswith(text) for assumption in run.assumptions), text


def test_sizes_that_follow_from_the_others(tmp_path: Path) -> None:
    run = read_one(tmp_path, tp="", pp="2", gpus="32")
    assert run.plan.layout.tensor_model_parallel_size == 2
    assert "tp 2: the GPUs over the other sizes" in run.assumptions
    run = read_one(tmp_path, cp="2")  # dp 8 of 16 GPUs with tp 2 leaves no room for cp 2 beside it
    assert (run.plan.layout.data_parallel_size, run.plan.layout.context_parallel_size) == (4, 2)
    assert "dp 4: the row's 8 counts the context-parallel ranks" in run.assumptions
    run = read_one(tmp_path, global_batch="", tokens_per_s_per_gpu="11702.86")
    assert run.plan.global_batch_size == 64
    assert run.step_time_s == 0.7


def test_a_batch_that_does_not_divide_is_rounded_and_the_time_with_it(tmp_path: Path) -> None:
    run = read_one(tmp_path, micro_batch="3", global_batch="100", iteration_time_s="1.0")
    assert run.plan.global_batch_size == 96
    assert run.step_time_s == pytest.approx(0.96)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"iteration_time_s": ""}, "it holds no measured time, throughput or utilisation"),
        ({"gpu_type": "TPU v5"}, "its GPU 'TPU v5' is not known; describe it with --gpus-file"),
        ({"gpu_type": ""}, "gpu_type is blank"),
        ({"global_batch": ""}, "global_batch is blank, on which the time of a step depends"),
        ({"tp": "", "dp": ""}, "tp blank, and nothing says how its GPUs were laid out"),
        ({"gpus": "24"}, "its 24 GPUs are not tp 2 x pp 1 x cp 1 x dp 8"),
        ({"gpus": "15", "dp": ""}, "its 15 GPUs are no multiple of tp 2 x pp 1 x cp 1"),
        ({"gpus": "", "dp": ""}, "gpus and dp are blank"),
        ({"seq": ""}, "seq is blank and its source's sequence length is not known"),
        ({"layers": "", "model": "X-9B"}, "layers is blank and the model 'X-9B' is not known by its name"),
        ({"model": "Mixtral-8x7B"}, "its model has experts, and its row does not say how many"),
        ({"precision": "int8"}, "its precision 'int8' is not known"),
        ({"precision": "fp8", "gpu_type": "A100"}, "its GPU a100-sxm-80gb has no fp8"),
        ({"recompute": "clever"}, "its recomputation 'clever' is not known"),
        ({"sharding": "ZeRO-3+offload"}, "what of it is offloaded to the host is not stated: 'offload'"),
        ({"sharding": "FSDP within 7"}, "shards over 7 GPUs do not divide its 8 data ranks"),
        (
            {"micro_batch": "", "global_batch": "", "iteration_time_s": "", "mfu": "0.4"},
            "micro_batch and global_batch are blank",
        ),
        ({"micro_batch": "16"}, "its global batch 64 is below micro-batch 16 x dp 8"),
        ({"pp": "5", "gpus": "80"}, "its 24 layers cannot be split over pp 5 and vpp 7"),
        ({"tp": "32", "gpus": "256"}, "its layout cannot be built: tensor-model-parallel-size: must divide"),
    ],
)
def test_rows_that_cannot_be_predicted_have_a_reason(tmp_path: Path, cells: dict[str, str], reason: str) -> None:
    if "vpp 7" in reason:
        cells = cells | {"vpp": "7"}
    runs, unpredictable = read_runs(write_table(tmp_path / "one.csv", cells))
    assert runs == []
    assert unpredictable[0].reason.startswith(reason)
    assert (unpredictable[0].row_number, unpredictable[0].source) == (2, "team_a")


def test_cpu_runs_of_measure(tmp_path: Path) -> None:
    cells = {"model": "hammer-tiny", "gpu_type": "cpu-core", "precision": "fp32", "sequence_parallel": "no"}
    blank = {name: "" for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    columns = [*COLUMNS, "sequence_parallel"]
    runs, unpredictable = read_runs(write_table(tmp_path / "cpu.csv", cells | blank, columns=columns))
    assert unpredictable == []
    plan = runs[0].plan
    assert (plan.cluster.name, plan.model.name, plan.precision) == ("cpu-host", "hammer-tiny", "fp32")
    assert not plan.layout.has_sequence_parallel
    assert not plan.overlaps_grad_reduce


def test_gpus_and_clusters_of_the_user_are_used(tmp_path: Path) -> None:
    gpus = tmp_path / "gpus.toml"
    gpus.write_text(
        '[abacus]\nsource = "ours"\naliases = ["Abacus 9"]\nfp32_tflops = 1\nfp16_tflops = 2\nbf16_tflops = 2\n'
        "memory_bytes = 100_000_000_000\nmemory_bytes_per_s = 1e12\npower_w = 100\n"
    )
    path = write_table(tmp_path / "runs.csv", {"gpu_type": "Abacus 9"})
    _, (row,) = read_runs(path, gpus_path=gpus)
    assert_problem(row.reason, "no cluster of abacus", "--clusters-file")
    clusters = tmp_path / "clusters.toml"
    clusters.write_text(
        '[ours]\nsource = "ours"\ngpu = "abacus"\ngpus_per_node = 4\nnvlink_domain_size = 4\n'
        "nvlink_bytes_per_s = 4e11\nnvlink_latency_s = 0\nnetwork_bytes_per_s = 1e10\nnetwork_latency_s = 1e-5\n"
    )
    (run,), _ = read_runs(path, gpus_path=gpus, clusters_path=clusters)
    assert (run.plan.gpu.name, run.plan.cluster.name) == ("abacus", "ours")


def test_experts_and_sequence_parallelism_of_measured_runs(tmp_path: Path) -> None:
    blank = {name: "" for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    cells = blank | {"model": "hammer-tiny-moe", "gpu_type": "cpu-core", "precision": "fp32"}
    columns = [*COLUMNS, "sequence_parallel", "ep"]
    rows = [cells | {"sequence_parallel": "yes", "ep": text} for text in ("1", "2", "")]
    runs, unpredictable = read_runs(write_table(tmp_path / "moe.csv", *rows, columns=columns))
    assert unpredictable == []
    assert [run.plan.layout.expert_model_parallel_size for run in runs] == [1, 2, 1]
    assert len({run.fingerprint for run in runs}) == 3


def test_a_fingerprint_depends_on_the_run_and_not_on_its_row(tmp_path: Path) -> None:
    first = read_one(tmp_path)
    again = read_one(tmp_path, source="team_b", notes="moved", hidden="2048.0")
    other = read_one(tmp_path, iteration_time_s="0.71")
    assert len(first.fingerprint) == 16
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_no_published_row_is_dropped() -> None:
    runs, unpredictable = read_runs(PUBLISHED_RUNS_PATH)
    assert len(runs) + len(unpredictable) == 495
    assert len(unpredictable) <= 21
    assert len({*(run.row_number for run in runs), *(row.row_number for row in unpredictable)}) == 495
    for run in runs:
        flops_per_s = 6 * count_parameters(run.plan.model) * run.plan.tokens_per_step / run.step_time_s
        utilisation = flops_per_s / run.plan.layout.world_size / (run.plan.gpu.fp16_tflops * 1e12)
        assert 0.02 < utilisation < 1.5, f"line {run.row_number}: {run.assumptions}"  # NVFP4 exceeds the 16-bit peak


def test_every_row_of_vtrain_is_predictable() -> None:
    runs, unpredictable = read_runs(VTRAIN_RUNS_PATH)
    assert (len(runs), unpredictable) == (1440, [])
    assert {run.plan.cluster.name for run in runs} == {"vtrain-a100"}
    assert not any(run.plan.has_flash_attention for run in runs)


def test_no_published_row_with_experts_is_dropped() -> None:
    runs, unpredictable = read_runs(PUBLISHED_MOE_PATH)
    assert len({*(run.row_number for run in runs), *(row.row_number for row in unpredictable)}) == 308
    assert len(runs) >= 174
    assert len(runs) - len({run.fingerprint for run in runs}) == 2  # printed again by a later release
    for run in runs:
        flops_per_s = 6 * count_active_parameters(run.plan.model) * run.plan.tokens_per_step / run.step_time_s
        utilisation = flops_per_s / run.plan.layout.world_size / (run.plan.gpu.fp16_tflops * 1e12)
        assert 0.02 < utilisation < 1.0, f"line {run.row_number}: {run.assumptions}"


def test_experts_of_published_rows() -> None:
    runs = {run.row_number: run.plan for run in read_runs(PUBLISHED_MOE_PATH)[0]}
    qwen = runs[7]  # qwen3-235b-a22b on 256 GB300
    assert (qwen.experts.dispatcher, qwen.cuda_graphs) == ("hybridep", "step")
    assert qwen.experts.overlaps_communication
    assert (qwen.layout.expert_model_parallel_size, qwen.layout.expert_tp) == (32, 1)
    grok = runs[234]
    assert (grok.layout.expert_tp, grok.experts.has_grouped_gemm) == (4, False)


def test_a_blank_precision_is_that_of_the_model_or_of_the_notes(tmp_path: Path) -> None:
    noted = read_one(tmp_path, precision="", notes="MFU of FP8 runs")
    assert noted.plan.precision == "fp8"
    assert "precision fp8: blank, the notes" in noted.assumptions
    assert read_one(tmp_path, precision="", model="GPT-tiny-fp16", notes="fp8 later").plan.precision == "fp16"
    undecided = read_one(tmp_path, precision="", notes="fp8, compared with bf16")
    assert undecided.plan.precision == "bf16"
    assert any(one.startswith("precision bf16: blank, Megatron") for one in undecided.assumptions)


def test_hybrid_sharding_keeps_to_a_node_of_the_cluster(tmp_path: Path) -> None:
    sizes = [
        read_one(tmp_path, sharding="FSDP HYBRID_SHARD", gpu_type=gpu, tp="1", dp="16").plan.shard_size
        for gpu in ("H100", "A100-64GB (Leonardo)")
    ]
    assert sizes == [8, 4]


def test_internevo_gathers_parameters_after_the_step() -> None:
    """Its configuration overlaps gradients only, so its ZeRO inside a node is the faster one."""
    runs = [run for run in read_runs(PUBLISHED_RUNS_PATH)[0] if run.source.startswith("InternEvo")]
    assert len(runs) > 20
    assert {(run.plan.overlaps_grad_reduce, run.plan.overlaps_param_gather) for run in runs} == {(True, False)}
    losses = [one.loss_ratio for one in rank_layouts(runs, [predict_step(run.plan) for run in runs])]
    assert len(losses) >= 12
    assert max(losses) < 0.02
