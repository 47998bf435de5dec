"""The command for vLLM, and that vLLM loads what was exported, where it is installed."""

import importlib.util
import os
from pathlib import Path

import pytest

from megatron_hammer.cli.serve import main
from megatron_hammer.errors import ConfigError, PlatformError
from megatron_hammer.serving.vllm import build_vllm_command, build_vllm_environment
from tests.helpers.gguf_models import write_gguf_source
from tests.helpers.messages import raises_problem
from tests.helpers.toy_hf_folder import write_toy_folder


def test_every_setting_reaches_vllm() -> None:
    command = build_vllm_command(
        Path("hf/toy"),
        name="toy",
        host="0.0.0.0",
        port=81,
        context_tokens=1024,
        num_slots=7,
        batch_tokens=4096,
        chat_template=Path("chat.jinja"),
    )
    words = command[command.index("serve") + 1 :]
    assert words[0] == "hf/toy"
    assert dict(zip(words[1::2], words[2::2], strict=True)) == {
        "--served-model-name": "toy",
        "--host": "0.0.0.0",
        "--port": "81",
        "--max-num-seqs": "7",
        "--max-model-len": "1024",
        "--max-num-batched-tokens": "4096",
        "--chat-template": "chat.jinja",
    }


def test_what_is_not_given_is_left_to_vllm_and_the_key_is_no_argument() -> None:
    command = build_vllm_command(
        Path("hf"),
        name="m",
        host="127.0.0.1",
        port=80,
        context_tokens=None,
        num_slots=4,
        batch_tokens=None,
        chat_template=None,
    )
    assert not {"--max-model-len", "--max-num-batched-tokens", "--chat-template", "--api-key"} & set(command)
    environment = build_vllm_environment({"PATH": "x"}, ("secret",))
    assert environment == {"PATH": "x", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": "secret"}
    assert "VLLM_API_KEY" not in build_vllm_environment({}, ())


def test_the_command_replaces_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_folder(tmp_path / "hf")
    (tmp_path / "keys").write_text("secret\n")
    started = []
    monkeypatch.setattr("megatron_hammer.cli.serve.require_vllm", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    main(["--engine", "vllm", "--model", str(tmp_path / "hf"), "--port", "0", "--api-key-file", str(tmp_path / "keys")])
    ((program, command, environment),) = started
    assert (program, command[-1], environment["VLLM_API_KEY"]) == (command[0], "4", "secret")
    assert command[command.index("serve") + 1] == str(tmp_path / "hf")


def test_flags_that_vllm_has_not_are_refused(tmp_path: Path) -> None:
    write_toy_folder(tmp_path / "hf")
    with raises_problem(ConfigError, "engine:", "vllm has no --no-chat"):
        main.__wrapped__.__wrapped__(["--engine", "vllm", "--model", str(tmp_path / "hf"), "--no-chat"])
    (tmp_path / "run").mkdir()
    with raises_problem(ConfigError, "cache-dir:", "must be given", "vllm"):
        main.__wrapped__.__wrapped__(["--engine", "vllm", "--model", str(tmp_path / "run")])


def test_without_vllm_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_folder(tmp_path / "hf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_problem(PlatformError, "engine:", "vllm must be installed", "pip install vllm"):
        main.__wrapped__.__wrapped__(["--engine", "vllm", "--model", str(tmp_path / "hf")])


def test_vllm_loads_an_exported_folder(tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is missing; pip install vllm in an environment of its own")
    folder = write_gguf_source(tmp_path / "hf")
    model = vllm.LLM(str(folder), max_model_len=64, enforce_eager=True, dtype="float32")
    (answer,) = model.generate([{"prompt_token_ids": [1, 5, 9]}], vllm.SamplingParams(temperature=0, max_tokens=4))
    assert len(answer.outputs[0].token_ids) >= 1
