"""inspect_checkpoint.py as a user runs it: tables or JSON on stdout, one summary line, exit codes 0, 1 and 2.

Loading torch takes seconds, so one test starts the tool in a process of its own, the others in this one.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.tool_runs import Finished, run_tool, run_tool_here
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_pair import write_toy_pair
from tests.helpers.toy_training_checkpoint import model_tensors, optimizer_tensors, write_training_checkpoint

pytestmark = pytest.mark.integration

TOOL = "checkpoint_convert/inspect_checkpoint.py"


def run(*arguments: str | Path) -> Finished:
    return run_tool_here(TOOL, *arguments)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return write_toy_pair(tmp_path_factory.mktemp("pair"), {})


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("changed"), toy_llama_tensors(seed=5), iteration=20).parent


def test_the_command_compares_values_and_logits(pair):
    result = run_tool(TOOL, pair[0], "--compare", pair[1], "--forward", "auto")
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stderr == ""
    assert "logits, LlamaForCausalLM in float32 on 5 sequences of random ids" in result.stdout
    assert "equal at 160 of 160 positions" in result.stdout
    assert result.stdout.count(" passed ") == 4
    assert result.stdout.splitlines()[-1].startswith("equal; 30 of 30 tensors equal, 0 arguments differ: ")


def test_a_checkpoint_is_shown_and_measured(pair):
    megatron_dir, hf_dir = pair
    code, output, errors = run(megatron_dir, "--statistics", "--names", "*final_layernorm*")
    assert (code, errors) == (0, "")
    assert "decoder.final_layernorm.weight" in output
    *_, measured, last = output.splitlines()
    assert measured == "1 tensors measured, 24 elements, 0 with NaN or infinity"
    assert last.startswith(f"{megatron_dir}/iter_0000010: torch_dist, iteration 10, 1,280 tokens, 11,640 parameters, ")
    code, output, errors = run(hf_dir, "--json")
    found = json.loads(output)
    assert (code, errors) == (0, "")
    assert (found["format"], found["num_parameters"], found["iteration"]) == ("Hugging Face", 11_640, None)


def test_master_weights_are_those_of_every_megatron_checkpoint(tmp_path):
    model = model_tensors(dtype=torch.bfloat16)
    masters = optimizer_tensors(model)
    name = "optimizer.state.param.decoder.final_layernorm.weight"
    others = masters | {name: masters[name] * (1 + 1e-6)}  # rounds to the same weights of the model
    for folder, state in (("first", masters), ("same", masters), ("other", others)):
        write_training_checkpoint(tmp_path / folder, tensors=model | state)
    first, same, other = (tmp_path / folder for folder in ("first", "same", "other"))
    assert run(first, "--compare", other).returncode == 0
    assert run(first, "--compare", same, "--weights", "master").returncode == 0
    code, output, _ = run(first, "--compare", other, "--weights", "master", "--json")
    assert code == 1
    assert [found["name"] for found in json.loads(output)["differences"]] == ["decoder.final_layernorm.weight"]


def test_master_weights_are_compared_with_a_folder(pair):
    code, output, _ = run(pair[1], "--compare", pair[0], "--weights", "master")
    assert code == 0, output  # the toy's weights are fp32, so they are their own masters
    assert run(pair[1], "--compare", pair[1], "--weights", "master").returncode == 2


def test_a_difference_is_exit_code_1(pair, changed):
    code, output, _ = run(pair[0], "--compare", changed)
    assert code == 1
    assert output.splitlines()[-1].startswith("different: 21 value; 0 of 21 tensors equal, 1 arguments differ: ")
    code, output, _ = run(pair[1], "--compare", changed, "--json")
    found = json.loads(output)
    assert (code, found["is_equal"]) == (1, False)
    assert {difference["kind"] for difference in found["differences"]} == {"value"}


def test_user_errors_are_sentences_with_exit_code_2(pair, tmp_path):
    write_toy_checkpoint(tmp_path / "short", toy_llama_tensors())
    shard = tmp_path / "short" / "iter_0000010" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:5000])
    cases = {
        (tmp_path / "nowhere",): "nowhere: checkpoint directory does not exist",
        (tmp_path / "short",): "__0_0.distcp: must hold at least",
        (pair[0], "--iteration", "7"): "iter_0000007: iteration does not exist, got ['iter_0000010'].",
        (pair[0], "--optimizer", "--names", "x"): "--optimizer: works with --compare only, got no --compare.",
        (
            pair[0],
            "--compare",
            pair[0],
            "--forward",
            "auto",
        ): "--forward: one checkpoint must be Megatron's and the other",
        (
            pair[0],
            "--compare",
            pair[0],
            "--optimizer",
        ): "must hold the optimizer's state as torch_dist has it, got none.",
        (pair[0], "--compare", pair[1], "--statistics"): "--statistics: is about one checkpoint, got --compare too.",
    }
    for arguments, message in cases.items():
        code, output, errors = run(*arguments)
        assert (code, output) == (2, ""), arguments
        assert message in errors
        assert all(line.startswith("error: ") for line in errors.splitlines())


def test_every_file_is_verified(tmp_path, pair):
    write_training_checkpoint(tmp_path / "run")
    directory = tmp_path / "run" / "iter_0000010"
    code, output, _ = run(directory, "--files")
    assert code == 0
    assert "files: all as saved, by their hashes" in output
    assert json.loads(run(pair[0], "--files", "--json").stdout)["files"].startswith("all as saved, by the checksums")
    shard = max(directory.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output, errors = run(directory, "--files")
    assert (code, output) == (2, "")
    assert f"error: {shard}: must have the contents that were saved" in errors
    assert run(pair[1], "--files").returncode == 2
    assert "--files: is about one checkpoint" in run(pair[0], "--files", "--compare", pair[1]).stderr


def test_no_tensor_of_a_file_that_has_changed_is_used(tmp_path):
    """A shard of another save: torch's own checksums are right, the hashes of the folder are not."""
    for name, seed in (("run", 1), ("other", 2)):
        torch.manual_seed(seed)
        write_training_checkpoint(tmp_path / name, tensors=model_tensors() | {"extra": torch.randn(3)})
    directory = tmp_path / "run" / "iter_0000010"
    for shard in directory.glob("*.distcp"):
        shard.write_bytes((tmp_path / "other" / "iter_0000010" / shard.name).read_bytes())
    assert run(directory).returncode == 0  # shows descriptions only
    code, _, errors = run(directory, "--statistics")
    assert code == 2
    assert ".distcp: must have the contents that were saved" in errors
