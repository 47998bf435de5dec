"""The command: tables, JSON or CSV on stdout, progress on stderr, files once they are complete, a summary last."""

import argparse
import csv
import io
import json
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import project
from megatron_hammer.errors import ConfigError, OutputError
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.report.projection_file import read_projection
from tests.helpers.run_tables import write_table

SMALL = ("--preset", "hammer-tiny", "--gpu", "a100-sxm-80gb", "--gpus", "1,2", "--top", "2")
FILES = ["breakdown.png", "memory.png", "projection.csv", "projection.json", "report.html", "scaling.png"]


def run(*flags: str) -> None:
    parser = argparse.ArgumentParser()
    project.add_arguments(parser)
    parser.set_defaults(read_hf_model=lambda path: select_preset("hammer-tiny").model)
    project.run(parser.parse_args(flags))


def test_tables_end_in_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    run(*SMALL)
    output = capsys.readouterr()
    assert "The layout to start from at each size" in output.out
    last = output.out.splitlines()[-1]
    assert last.startswith("2 sizes, 2 feasible; ")
    assert last.endswith(" candidates, 4 layouts shown")
    assert [line.split(":")[0] for line in output.err.splitlines()] == [
        "strong scaling, 1 GPUs",
        "strong scaling, 2 GPUs",
        "weak scaling, 1 GPUs",
        "weak scaling, 2 GPUs",
    ]


def test_json_and_csv_are_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    run(*SMALL, "--json")
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert [size["gpus"] for size in document["sizes"]] == [1, 2]
    assert document["companion"]["batch"]["samples_per_gpu"] == 4.0
    assert output.err.splitlines()[-1].startswith("2 sizes, 2 feasible; ")
    run(*SMALL, "--csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["id"] for row in rows] == [row["id"] for row in document["rows"]]


def test_the_same_command_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    run(*SMALL, "--json")
    first = capsys.readouterr().out
    run(*SMALL, "--json")
    assert capsys.readouterr().out == first


def test_the_folder_gets_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "study"
    run(*SMALL, "--output-dir", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len(read_projection(folder / "projection.json").rows) == 4
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; written to {folder}")
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/projection\.json: file cannot be written \(.* is not a folder\)\."):
        run(*SMALL, "--output-dir", str(tmp_path / "file"))


def test_a_study_in_which_nothing_fits_is_written_and_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"gpus: one GPU must hold its share of hammer-tiny, got .*GiB are missing"):
        run(*SMALL, "--memory-gib", "0.5", "--output-dir", str(tmp_path))
    output = capsys.readouterr().out
    assert "2 sizes, 0 feasible; " in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["projection.csv", "projection.json", "report.html"]


def test_measured_runs_are_overlaid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = select_preset("hammer-tiny").model
    cells = {
        "model": "hammer-tiny",
        "layers": str(model.num_layers),
        "hidden": str(model.hidden_size),
        "heads": str(model.num_attention_heads),
        "kv_heads": str(model.num_query_groups),
        "ffn": str(model.ffn_hidden_size),
        "vocab": str(model.vocab_size),
        "seq": "256",
        "gpus": "2",
        "gpu_type": "A100-80GB",
        "tp": "1",
        "dp": "2",
        "global_batch": "8",
        "iteration_time_s": "0.01",
    }
    path = write_table(tmp_path / "runs.csv", cells, cells | {"gpu_type": "H100"})
    run(*SMALL, "--overlay", str(path))
    output = capsys.readouterr().out
    assert "Measured runs, each predicted with its own layout" in output
    assert "it ran on h100-sxm, the projection is of a100-sxm-80gb" in output


def test_a_cpu_host_is_projected(capsys: pytest.CaptureFixture[str]) -> None:
    run("--preset", "hammer-tiny", "--gpu", "cpu-core", "--gpus", "1,2,4", "--top", "1", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["study"]["cluster"]["name"] == "cpu-host"
    for row in document["rows"]:
        assert row["layout"]["context_parallel_size"] == 1
        assert row["plan"]["sharding"] != "fsdp"
        assert not row["plan"]["overlaps_grad_reduce"]
        assert not row["plan"]["overlaps_tensor_parallel"]


def test_a_model_of_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    run("--hf-config", "x/config.json", "--gpu", "h100-sxm", "--gpus", "2", "--samples-per-gpu", "4", "--json")
    study = json.loads(capsys.readouterr().out)["study"]
    assert (study["preset"], study["hf_config"], study["seq_length"]) == (None, "x/config.json", 256)
    assert study["batch"] == {"global_batch_size": None, "samples_per_gpu": 4.0}


def test_a_price_without_tokens_would_be_ignored() -> None:
    hf = ("--hf-config", "x/config.json", "--gpu", "h100-sxm", "--gpus", "2", "--samples-per-gpu", "4")
    with pytest.raises(ConfigError, match="usd-per-gpu-hour: must come with a number of tokens, got 2 "):
        run(*hf, "--usd-per-gpu-hour", "2")
