"""From a base model and two published tokenizers to a model that transformers loads, as a user does it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.messages import assert_errors
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.tool_runs import run_tool, run_tool_here
from tests.helpers.toy_tokenizer import train_toy_tokenizer

pytestmark = pytest.mark.integration

TOOL = "tools/resize_embeddings.py"
MODELS = SHARED_DATA / "tokenizer"


def write_model(folder: Path, vocab_size: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@needs_shared_data
def test_internlm_becomes_hammerllm(tmp_path: Path) -> None:
    write_model(tmp_path / "base", 103_168)
    tokenizers = ("--old-tokenizer", MODELS / "internlm-7b.model", "--new-tokenizer", MODELS / "hammerllm.model")
    code, stdout, _ = run_tool(TOOL, "--model", "base", *tokenizers, "--save", "new", cwd=tmp_path)
    assert code == 0
    assert stdout.startswith(
        "new: model.embed_tokens.weight, lm_head.weight from 103,168 to 105,789 rows; 2,621 new pieces, "
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert model.config.vocab_size == len(tokenizer) == 105_789
    before = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    after = load_file(tmp_path / "new" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(after[:103_168], before)
    old, new = load_encoder(MODELS / "internlm-7b.model"), load_encoder(MODELS / "hammerllm.model")
    for token_id in range(103_168, 105_789, 97):
        ids = old.encode(new.decode([token_id]))
        assert torch.equal(after[token_id], before[ids.tolist()].float().mean(dim=0).bfloat16())


def test_a_tokenizer_that_adds_nothing_is_refused(tmp_path: Path) -> None:
    train_toy_tokenizer(tmp_path)
    write_model(tmp_path / "base", 347)
    code, stdout, stderr = run_tool_here(
        TOOL,
        *("--model", "base", "--old-tokenizer", "toy.model", "--new-tokenizer", "toy.model", "--save", "new"),
        cwd=tmp_path,
    )
    assert (code, stdout) == (2, "")
    assert_errors(stderr, ("toy.model:", "tokenizer must have more", "got 347 for 347"))
    assert not (tmp_path / "new").exists()


@needs_shared_data
def test_json_is_the_report(tmp_path: Path) -> None:
    write_model(tmp_path / "base", 103_200)
    tokenizers = ("--old-tokenizer", MODELS / "internlm-7b.model", "--new-tokenizer", MODELS / "hammerllm.model")
    flags = ("--model", "base", *tokenizers, "--save", "new", "--no-tokenizer", "--json")
    code, stdout, _ = run_tool_here(TOOL, *flags, cwd=tmp_path)
    assert code == 0
    report = json.loads(stdout)
    assert (report["num_reused_padding_rows"], report["num_added_pieces"], report["has_tokenizer"]) == (32, 2621, False)
