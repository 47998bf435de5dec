"""tokenizer_export.py as a user runs it."""

from pathlib import Path

import pytest
import transformers

from tests.helpers.messages import assert_errors
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.tool_runs import run_tool, run_tool_here
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

pytestmark = pytest.mark.integration


TOOL = "tools/tokenizer_export.py"


def test_a_tokenizer_is_exported_and_compared(tmp_path: Path) -> None:
    model = train_toy_tokenizer(tmp_path)
    write_jsonl(tmp_path / "c.jsonl", TOY_TEXTS)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    arguments = ("--tokenizer-model", model, "--save", "out/hf", "--model-max-length", "77")
    code, stdout, stderr = run_tool(
        TOOL, *arguments, "--input", "c.jsonl", "--chat-template", "chat.jinja", cwd=tmp_path
    )
    assert code == 0
    assert stderr == "note: no conversation was compared: the template has no {% generation %} marks\n"
    assert stdout.startswith("out/hf: 347 ids; ")
    assert " sample texts and 3 documents (0.00 MB, " in stdout
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")
    assert (tokenizer.model_max_length, tokenizer.chat_template) == (77, "{{ messages }}")
    code, stdout, stderr = run_tool_here(TOOL, *arguments, cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert_errors(stderr, ("out/hf:", "target must be absent", "got 4 entries", "--save"))


def test_a_chat_template_is_proven_and_compared(tmp_path: Path) -> None:
    arguments = ("--tokenizer-model", train_toy_tokenizer(tmp_path), "--save", "hf", "--chat-template", "chatml")
    code, stdout, stderr = run_tool_here(TOOL, *arguments, cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert_errors(stderr, (f"{tmp_path}/toy.model:", "must have the control tokens", "got none for <|im_end|>"))
    bindings = ("--bind-token", "<|im_start|>=<s>", "--bind-token", "<|im_end|>=</s>")
    code, stdout, stderr = run_tool_here(TOOL, *arguments, *bindings, cwd=tmp_path)
    assert code == 0
    assert " conversations have the same ids and masks" in stdout
    assert stderr.startswith("note: split_special_tokens is off in this folder")


def test_a_binding_without_a_template_is_refused(tmp_path: Path) -> None:
    code, _, stderr = run_tool_here(TOOL, "--tokenizer-model", "t", "--save", "hf", "--bind-token", "a=b", cwd=tmp_path)
    assert code == 2
    assert_errors(stderr, ("command line:", "--bind-token must come with --chat-template"))


@needs_shared_data
def test_hammerllm_encodes_the_whole_corpus_alike(tmp_path: Path) -> None:
    model = SHARED_DATA / "tokenizer" / "hammerllm.model"
    code, stdout, _ = run_tool(
        TOOL, "--tokenizer-model", model, "--save", "hf", "--input", SHARED_DATA / "corpus", cwd=tmp_path
    )
    assert code == 0
    assert stdout.startswith("hf: 105,789 ids; 105,546 sample texts and 8,780 documents (9.21 MB, 2,790,855 tokens)")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tokenizer-model", "none.model"), "none.model: tokenizer does not exist."),
        (("--tokenizer-model", "toy.model", "--input", "none.jsonl"), "none.jsonl: input file does not exist."),
        (
            ("--tokenizer-model", "toy.model", "--chat-template", "c.jinja"),
            "chat-template: must be chatml, llama3, qwen, tiny_llm_zh or a Jinja file",
        ),
        (("--tokenizer-model", "toy.model", "--input", "bad.jsonl"), "bad.jsonl:2: line must be one JSON object,"),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    train_toy_tokenizer(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    code, stdout, stderr = run_tool_here(TOOL, *arguments, "--save", "hf", cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("hf")] == []
