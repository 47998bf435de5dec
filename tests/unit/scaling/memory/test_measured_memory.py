"""Tables of memory figures: every row is a run or has its reason, blanks are filled by named assumptions."""

import csv
from dataclasses import fields

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.memory.measured_memory import read_measured_memory
from megatron_hammer.scaling.memory.software import MemorySoftware, load_known_memory_software, select_memory_software
from tests.helpers.messages import assert_problems

# A run that says everything; tests change what they are about.
COMPLETE = {
    "source": "somewhere",
    "model": "llama2-7b",
    "layers": "32",
    "hidden": "4096",
    "heads": "32",
    "kv_heads": "32",
    "ffn": "11008",
    "vocab": "32000",
    "seq": "4096",
    "gpus": "16",
    "gpu_type": "H100",
    "tp": "2",
    "pp": "4",
    "vpp": "2",
    "cp": "1",
    "ep": "",
    "dp": "2",
    "sequence_parallel": "yes",
    "micro_batch": "1",
    "global_batch": "64",
    "precision": "bf16",
    "sharding": "distributed optimizer",
    "recompute": "none",
    "quantity": "max allocated",
    "memory_value": "30",
    "unit": "GiB",
    "measured_or_model": "measured",
    "provenance": "",
    "notes": "",
}


def write_table(path, *changes):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COMPLETE)
        writer.writeheader()
        writer.writerows(COMPLETE | change for change in changes)
    return path


def read_one(tmp_path, **change):
    (row,), unpredictable = read_measured_memory(write_table(tmp_path / "memory.csv", change))
    assert unpredictable == []
    return row


def read_reason(tmp_path, **change):
    rows, (unpredictable,) = read_measured_memory(write_table(tmp_path / "memory.csv", change))
    assert rows == []
    return unpredictable.reason


def test_a_complete_row_is_read_as_it_stands(tmp_path):
    row = read_one(tmp_path)
    layout = row.layout
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size) == (2, 4)
    assert (layout.virtual_pipeline_model_parallel_size, layout.data_parallel_size) == (2, 2)
    assert layout.has_sequence_parallel
    assert (row.seq_length, row.micro_batch_size, row.num_microbatches) == (4096, 1, 32)
    assert (row.model.num_layers, row.model.ffn_hidden_size, row.model.activation) == (32, 11008, "swiglu")
    assert (row.kind, row.measured, row.stage, row.row_number) == ("allocated", 30 * 2**30, "heaviest", 2)
    assert (row.options.sharding, row.options.precision) == ("distributed_optimizer", "bf16")
    assert_problems(row.assumptions, ("model llama2-7b:", "preset", "(meta-llama/Llama-2-7b-hf config.json)"))


def test_blanks_are_filled_and_named(tmp_path):
    row = read_one(tmp_path, tp="", vpp="", dp="", precision="", sharding="", recompute="", gpus="8", global_batch="")
    assert row.layout.data_parallel_size == 2  # 8 GPUs over 4 stages
    assert row.num_microbatches == 8  # more than the pipeline holds
    assert_problems(
        row.assumptions[1:],
        ("tp 1:", "blank"),
        ("enough micro-batches", "global_batch is blank"),
        ("recompute none:", "blank"),
        ("sharding distributed_optimizer:", "blank"),
        ("precision bf16:", "blank"),
    )


@pytest.mark.parametrize(
    "quantity, unit, kind, measured",
    [
        ("max allocated bytes", "GiB", "allocated", 30 * 2**30),
        ("peak memory", "GB", "allocated", 30e9),
        ("max reserved", "MiB", "reserved", 30 * 2**20),
        ("nvidia-smi", "GB (approx)", "total", 30e9),
        ("activations per GPU (first stage)", "GiB", "activations", 30 * 2**30),
        ("params+grads+optimizer", "GiB", "state", 30 * 2**30),
        ("activation memory as % of tensor-parallel baseline", "%", "activation_ratio", 0.3),
    ],
)
def test_the_quantity_of_a_memory_figure(tmp_path, quantity, unit, kind, measured):
    row = read_one(tmp_path, quantity=quantity, unit=unit)
    assert (row.kind, row.measured) == (kind, measured)


@pytest.mark.parametrize(
    "recompute, mode, modules",
    [
        ("[]", "none", ("core_attn",)),
        ("full", "full", ("core_attn",)),
        ("selective", "selective", ("core_attn",)),
        ("core_attn (baseline)", "selective", ("core_attn",)),
        ("mlp+core_attn", "selective", ("mlp", "core_attn")),
        ("layernorm,moe_act", "selective", ("layernorm", "moe_act")),
    ],
)
def test_recomputation(tmp_path, recompute, mode, modules):
    options = read_one(tmp_path, recompute=recompute).options
    assert (options.recompute, options.recompute_modules) == (mode, modules)


@pytest.mark.parametrize(
    "sharding, expected",
    [("none", ("none", None)), ("ZeRO-0", ("none", None)), ("ZeRO-1", ("distributed_optimizer", None)),
     ("ZeRO-1 within 8", ("distributed_optimizer", 8)), ("FSDP=8", ("fsdp", 8)), ("FSDP FULL_SHARD", ("fsdp", None))],
)  # fmt: skip
def test_sharding(tmp_path, sharding, expected):
    options = read_one(tmp_path, sharding=sharding).options
    assert (options.sharding, options.shard_size) == expected


@pytest.mark.parametrize(
    "precision, expected",
    [("fp16 mixed", "bf16"), ("fp8 current scaling", "fp8"), ("mxfp8", "mxfp8"), ("bf16 (system config)", "bf16")],
)
def test_precision(tmp_path, precision, expected):
    assert read_one(tmp_path, precision=precision).options.precision == expected


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"memory_value": "34sbh/t", "unit": "bytes formula"}, "it is a formula, 34sbh/t, of no run"),
        ({"memory_value": "much"}, "it is no figure but 'much'"),
        ({"memory_value": "-1"}, "its figure must be above 0, got -1"),
        ({"unit": "furlongs"}, "its unit 'furlongs' is not known"),
        ({"unit": "%"}, "a share of what, its quantity 'max allocated' does not say"),
        ({"seq": ""}, "seq is blank and not known of Megatron-style software"),
        ({"gpus": "", "dp": ""}, "gpus and dp are blank"),
        ({"gpus": "12", "dp": ""}, "its 12 GPUs are no multiple of the 8 ranks of a model copy"),
        (
            {"layers": "31"},
            "its layout cannot be built: pipeline-model-parallel-size: must divide num_layers, got pp=4",
        ),
        ({"precision": "int4"}, "its precision 'int4' is not known"),
        ({"recompute": "mla_up_proj"}, "its multi-latent attention is not modelled"),
        ({"recompute": "everything"}, "its recomputation 'everything' is not known"),
        ({"sharding": "magic"}, "its sharding 'magic' is not known"),
        ({"quantity": "peak with offload"}, "what of it is offloaded to the host is not stated"),
        ({"model": "DeepSeek-V3"}, "its multi-latent attention is not modelled"),
        ({"model": "Qwen3-8B LoRA"}, "adapters beside frozen weights are not modelled"),
        ({"model": "Mixtral-8x7B"}, "its model has experts, and its row does not say how many"),
    ],
)
def test_a_row_that_cannot_be_predicted_has_its_reason(tmp_path, change, reason):
    assert read_reason(tmp_path, **change).startswith(reason)


def test_every_malformed_cell_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_measured_memory(write_table(tmp_path / "memory.csv", {"seq": "many"}, {"tp": "1.5"}))
    first, second = caught.value.problems
    assert "memory.csv:2: seq: must be a whole number of at least 1, got 'many'" in first
    assert "memory.csv:3: tp: must be a whole number of at least 1, got '1.5'" in second


def test_facts_name_only_fields_that_exist():
    names = {field.name for kind in (ModelShape, MemorySoftware, ParallelLayout) for field in fields(kind)}
    known = load_known_memory_software()
    for rule in known.name_rule:
        assert set(rule.changes) <= names | {"moe_topk"}
    assert all(software.source and software.source_pattern for software in known.software)


def test_nothing_is_dropped(tmp_path):
    path = write_table(tmp_path / "memory.csv", {}, {"unit": "?"}, {"quantity": "peak"}, {"memory_value": ""})
    rows, unpredictable = read_measured_memory(path)
    assert [row.row_number for row in rows] == [2, 4]
    assert [row.row_number for row in unpredictable] == [3, 5]


def test_facts_of_a_source_and_words_of_a_name(tmp_path):
    row = read_one(
        tmp_path,
        source="MegatronLM_CI_golden_values",
        model="gpt3_mcore_te_tp2_pp4_resume_swiglu_cross_entropy_loss_fusion",
        hidden="512",
        heads="8",
        kv_heads="8",
        ffn="2048",
        vocab="",
    )
    assert (row.model.activation, row.model.ffn_hidden_size) == ("swiglu", 1344)  # 8/3 hidden, a multiple of 64
    assert row.model.vocab_size == 50_257
    assert (row.stage, row.options.cross_entropy) == ("last", "native")
    assert row.options.has_hidden_dropout
    assert row.options.has_flash_attention
    assert "--cross-entropy-loss-fusion (native): its name" in row.assumptions


def test_sources_that_are_not_known_run_megatrons_defaults():
    assert select_memory_software("somewhere") is load_known_memory_software().unknown
    assert select_memory_software("SimuMax_B200_v1.2").is_context_parallel_all_to_all


def test_a_file_that_is_no_table_of_memory_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("model,quantity,tp\n")
    with pytest.raises(
        ConfigError,
        match=r"runs.csv:1: must have the columns.*got no memory_value, unit",
    ):
        read_measured_memory(path)
    with pytest.raises(ConfigError, match=r"none.csv: file cannot be read \(No such file or directory\)\."):
        read_measured_memory(tmp_path / "none.csv")
    path.write_bytes(b"model,quantity,memory_value,unit\n\xff,,,\n")
    with pytest.raises(ConfigError, match=r"runs.csv: must be UTF-8 text, got invalid start byte at byte 33"):
        read_measured_memory(path)


def test_torchtitan_cuts_its_local_batch_and_has_expandable_segments(tmp_path):
    row = read_one(tmp_path, source="torchtitan_2024-12", micro_batch="32", global_batch="64", vpp="1")
    assert (row.micro_batch_size, row.num_microbatches) == (8, 4)  # as many as stages
    assert any("cuts the local batch" in assumption for assumption in row.assumptions)
    assert row.fragmentation_ratio < read_one(tmp_path).fragmentation_ratio
    assert (row.options.cross_entropy, row.options.master_bytes) == ("eager", 2)
    later = read_one(tmp_path, source="torchtitan_h200_202506", global_batch="64", vpp="1")
    assert later.options.cross_entropy == "compiled"


def test_an_optimizer_on_the_host_is_an_option_of_the_row(tmp_path):
    row = read_one(tmp_path, sharding="distributed optimizer, optimizer offload 50%")
    assert row.options.optimizer_offload_ratio == 0.5
    assert read_one(tmp_path).options.optimizer_offload_ratio == 0
