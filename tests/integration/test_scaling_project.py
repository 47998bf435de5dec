"""tools/scaling_study.py project as a user runs it: the files it leaves, exit codes, and the speed of a search."""

import csv
import json
import re
from pathlib import Path

import pytest

from tests.helpers.messages import assert_errors
from tests.helpers.tool_runs import Finished, run_tool

pytestmark = pytest.mark.integration

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def project(*arguments: str | Path, cwd: Path) -> Finished:
    return run_tool("tools/scaling_study.py", "project", *arguments, cwd=cwd)


def test_a_study_of_llama3_70b(tmp_path: Path) -> None:
    flags = ("--preset", "llama3-70b", "--gpu", "h100-sxm", "--gpus", "8,64,512", "--output-dir", "study")
    code, stdout, stderr = project(*flags, "--usd-per-gpu-hour", "2.5", "--top", "2", cwd=tmp_path)
    assert code == 0, stderr
    assert re.search(r"^3 sizes, 2 feasible; [0-9,]+ candidates, 4 layouts shown; written to study$", stdout, re.M)
    assert "gpus: one GPU must hold its share of llama3-70b, got " in stdout
    folder = tmp_path / "study"
    assert sorted(path.name for path in folder.iterdir()) == [
        "breakdown.png",
        "memory.png",
        "projection.csv",
        "projection.json",
        "report.html",
        "scaling.png",
    ]
    document = json.loads((folder / "projection.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in document["rows"]] == ["64-1", "64-2", "512-1", "512-2"]
    for row in document["rows"]:
        prediction = row["prediction"]
        assert prediction["low_s"] < prediction["step_time_s"] < prediction["high_s"]
        assert 0.2 < prediction["mfu_ratio"] < 0.7
        assert row["memory"]["total_bytes"] <= document["study"]["memory_limit_bytes"]
        assert prediction["cost_usd"] == pytest.approx(2.5 * prediction["gpu_hours"])
    with open(folder / "projection.csv", newline="", encoding="utf-8") as file:
        *layouts, first, second, third = [row["id"] for row in csv.DictReader(file)]
    assert layouts == [row["id"] for row in document["rows"]]
    assert [first, second, third] == ["8-published", "64-published", "512-published"]
    assert all(reference["measured_s"] > 0 < reference["predicted_s"] for reference in document["references"])
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    project(*flags, "--usd-per-gpu-hour", "2.5", "--top", "2", cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize(
    ("written", "passed", "name"),
    [
        ("small/config.json", "small/config.json", "small"),
        ("small/config.json", "small", "small"),
        ("own-config.json", "own-config.json", "own-config"),
    ],
)
def test_a_hugging_face_config(written: str, passed: str, name: str, tmp_path: Path) -> None:
    """In its folder, or alone under any name."""
    (tmp_path / written).parent.mkdir(exist_ok=True)
    (tmp_path / written).write_text(json.dumps(CONFIG))
    flags = ("--gpu", "a100-sxm-80gb", "--gpus", "4", "--samples-per-gpu", "2", "--train-tokens", "1B", "--json")
    code, stdout, stderr = project("--hf-config", passed, *flags, cwd=tmp_path)
    assert code == 0, stderr
    document = json.loads(stdout)
    assert (document["study"]["preset"], document["study"]["hf_config"]) == (None, passed)
    assert (document["study"]["model"]["name"], document["study"]["model"]["hidden_size"]) == (name, 512)
    assert document["rows"][0]["id"] == "4-1"


def test_problems_of_a_user_exit_2_without_a_trace(tmp_path: Path) -> None:
    code, stdout, stderr = project(
        *("--preset", "llama3-70b", "--gpu", "a100-sxm-80gb", "--gpus", "8,x", "--precision", "fp8"),
        *("--output-dir", "study"),
        cwd=tmp_path,
    )
    assert (code, stdout) == (2, "")
    assert_errors(
        stderr,
        ("gpus:", "must be whole numbers", "got '8,x'", "--gpus 8,64"),
        ("precision:", "must be a format", "got precision=fp8, gpu=a100-sxm-80gb"),
    )
    assert list(tmp_path.iterdir()) == []
