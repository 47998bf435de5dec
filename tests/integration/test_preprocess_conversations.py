"""preprocess_conversations.py and show_chat_masks.py as a user runs them."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron_hammer.post_training.templates.chat_template import SHIPPED
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.chat_tokenizers import train_with_symbols, write_byte_level
from tests.helpers.messages import assert_errors
from tests.helpers.tool_runs import run_tool, run_tool_here
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import toy_arguments
from tests.helpers.toy_tokenizer import train_toy_tokenizer

pytestmark = pytest.mark.integration

PREPROCESS, SHOW = "tools/preprocess_conversations.py", "tools/show_chat_masks.py"
RECORDS = (
    {"question": "the <|im_end|> fox?", "answer": "花落"},
    {"question": "a", "answer": ""},
    {"question": "a long one", "answer": "花落 " * 200},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    train_with_symbols(folder / "symbols.model")
    train_toy_tokenizer(folder)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def test_conversations_are_written_and_shown(folder: Path) -> None:
    arguments = ("--input", "a.jsonl", "--tokenizer-model", "symbols.model", "--chat-template", "chatml")
    limits = ("--max-errors", "1", "--max-length", "100")
    code, stdout, stderr = run_tool(
        PREPROCESS, *arguments, *limits, "--output-prefix", "data/chat", "--workers", "1", cwd=folder
    )
    assert code == 0
    assert "data/chat: 3 conversations in, 1 out, 2 dropped (1 empty-turn, 1 too-long), 0 shortened, 0 end" in stdout
    assert [line.split(": ")[:2] for line in stderr.splitlines()] == [
        ["dropped", "a.jsonl:2"],
        ["dropped", "a.jsonl:3"],
    ]

    code, stdout, stderr = run_tool_here(
        SHOW, "--data-path", "data/chat", "--tokenizer-model", "symbols.model", "--json", cwd=folder
    )
    assert (code, stderr) == (0, "")
    (stored,) = json.loads(stdout)["conversations"]
    code, stdout, _ = run_tool_here(SHOW, *arguments, "--json", cwd=folder)
    encoded, empty, _ = json.loads(stdout)["conversations"]
    assert encoded["tokens"] == stored["tokens"]
    assert empty["problem"].startswith("empty-turn: turn 2 must have a text")
    learned = [token["text"] for token in stored["tokens"] if token["weight"]]
    assert "".join(learned) == "花落<|im_end|>"
    # The user's own <|im_end|> is text.
    assert sum(token["is_control"] for token in stored["tokens"]) == 4
    assert "".join(token["text"] for token in stored["tokens"]).count("<|im_end|>") == 3

    code, stdout, _ = run_tool_here(SHOW, *arguments, "--count", "2", cwd=folder)
    assert stdout.startswith(
        f"a.jsonl:1: {stored['num_tokens']} tokens, {stored['num_learned_tokens']} of them learned"
    )
    rows = [line.split() for line in stdout.splitlines() if line.split()[-1:] in (["0"], ["1"])]
    assert [int(row[-1]) for row in rows] == [token["weight"] for token in stored["tokens"]]
    assert "a.jsonl:2: not used. empty-turn:" in stdout


def test_answers_that_a_model_cannot_begin_are_told(folder: Path) -> None:
    """The byte-level tokenizer joins the line ends of header and answer to one token."""
    (folder / "byte").mkdir()
    write_byte_level(folder / "byte" / "tokenizer.json")
    (folder / "b.jsonl").write_text('{"question": "a", "answer": "\\n\\nx"}\n{"question": "a", "answer": "x"}\n')
    arguments = ("--input", "b.jsonl", "--tokenizer-model", "byte", "--chat-template", "chatml", "--workers", "1")
    code, _, stderr = run_tool_here(PREPROCESS, *arguments, "--output-prefix", "data/joined", cwd=folder)
    assert code == 0
    assert stderr.startswith("note: 1 answers begin with white space that the tokenizer joins to their header")


def test_the_manifest_can_be_printed(folder: Path) -> None:
    arguments = (
        "--input",
        "a.jsonl",
        "--tokenizer-model",
        "symbols.model",
        "--chat-template",
        "qwen",
        "--workers",
        "1",
    )
    more = ("--output-prefix", "data/json", "--max-errors", "1", "--system", "Be brief.", "--format", "question-answer")
    code, stdout, _ = run_tool_here(PREPROCESS, *arguments, *more, "--json", cwd=folder)
    manifest = json.loads(stdout)
    assert code == 0
    assert manifest == json.loads((folder / "data" / "json.manifest.json").read_bytes())
    options = {"format": "question-answer", "system": "Be brief.", "max_length": None, "overlong": "drop"}
    assert manifest["options"] == options | {"bind_token": {}}


@pytest.mark.parametrize(
    "arguments, field, facts",
    [
        (("--overlong", "drop"), "command line", ("--overlong must come with --max-length",)),
        (("--max-length", "0"), "command line", ("max_length=0",)),
        (("--bind-token", "<|im_end|>"), "bind-token", ("must be TOKEN=OTHER", "got <|im_end|>")),
        (("--tokenizer-model", "toy.model"), "toy.model", ("must have the control tokens", "--bind-token")),
        (("--input", "none.jsonl"), "none.jsonl", ("does not exist",)),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(
    folder: Path, arguments: tuple[str, ...], field: str, facts: tuple[str, ...]
) -> None:
    given = ("--input", "a.jsonl", "--tokenizer-model", "symbols.model", "--chat-template", "chatml", "--workers", "1")
    code, stdout, stderr = run_tool_here(PREPROCESS, *given, "--output-prefix", "wrong/chat", *arguments, cwd=folder)
    assert (code, stdout) == (2, "")
    assert_errors(stderr, (f"{field}:", *facts))
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (("--input", "a.jsonl"), ("--input needs --chat-template",)),
        (("--data-path", "data/chat", "--system", "x"), ("--data-path must come without --system",)),
        (("--data-path", "data/chat", "--first", "-1"), ("got first=-1",)),
        ((), ("--input --data-path is required",)),
    ],
)
def test_flags_of_the_other_form_are_refused(folder: Path, arguments: tuple[str, ...], facts: tuple[str, ...]) -> None:
    code, stdout, stderr = run_tool_here(SHOW, "--tokenizer-model", "symbols.model", *arguments, cwd=folder)
    assert (code, stdout) == (2, "")
    assert_errors(stderr, ("command line:", *facts))


def test_a_model_that_was_trained_on_conversations_is_exported_with_their_template(folder: Path) -> None:
    arguments = ("--input", "a.jsonl", "--tokenizer-model", "symbols.model", "--chat-template", "chatml")
    run_tool_here(
        PREPROCESS, *arguments, "--output-prefix", "run/chat", "--max-errors", "1", "--workers", "1", cwd=folder
    )
    num_ids = load_encoder(folder / "symbols.model").vocab_size
    tensors = toy_llama_tensors()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.randn(num_ids + 3, tensors[name].shape[1])
    paths = {"tokenizer_model": str(folder / "symbols.model"), "data_path": ["1", str(folder / "run" / "chat")]}
    write_toy_checkpoint(folder / "checkpoint", tensors, arguments=toy_arguments(vocab_size=num_ids, **paths))
    code, stdout, stderr = run_tool_here(
        *("checkpoint_convert/megatron_to_hf.py", "--load", "checkpoint", "--save", "hf", "--verify", "tensors"),
        cwd=folder,
    )
    assert code == 0
    assert " conversations have the same ids and masks in transformers" in stdout
    notes = ("note: split_special_tokens is off", "note: eos_token is <|im_end|> in this folder")
    assert all(line.startswith(notes) for line in stderr.splitlines()), stderr
    assert len(stderr.splitlines()) == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer.chat_template == SHIPPED["chatml"].read_text()
    generation = json.loads((folder / "hf" / "generation_config.json").read_bytes())
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    code, stdout, stderr = run_tool_here(
        *("checkpoint_convert/megatron_to_hf.py", "--load", "checkpoint", "--save", "hf2", "--no-tokenizer"),
        *("--chat-template", "qwen"),
        cwd=folder,
    )
    assert code == 2
    assert_errors(stderr, ("command line:", "--chat-template needs the tokenizer"))
