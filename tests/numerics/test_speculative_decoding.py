"""Speculative decoding changes no token: llama.cpp with a draft, transformers' assisted generation, and neither."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_hammer.checkpoint.gguf.llama_cpp import open_llama_cpp
from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
from megatron_hammer.serving.speculative import DraftOptions, build_draft_parameters
from tests.helpers.gguf_models import write_gguf_source

PROMPT = (1, 45, 133, 29, 71, 211, 98, 17)
NUM_TOKENS = 40
NUM_DRAFT_TOKENS = 3
# Of the standard deviation of each weight: the draft is a worse model that is often right.
NOISE = 0.06


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders and files of a target, and of a draft that is the target with noise."""
    folder = tmp_path_factory.mktemp("pair")
    target = write_gguf_source(folder / "target", num_hidden_layers=2)
    draft = folder / "draft"
    draft.mkdir()
    for path in target.iterdir():
        (draft / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    for model in (target, draft):
        export_to_gguf(
            GgufOptions(load_dir=model, save_path=folder / f"{model.name}.gguf", file_type="f32", is_verified=False)
        )
    return folder


def complete(path: Path, *, draft: Path | None = None) -> tuple[str, dict[str, int]]:
    parameters = {}
    if draft is not None:
        options = DraftOptions(path=draft, num_tokens=NUM_DRAFT_TOKENS)
        parameters = build_draft_parameters(path, options, context_tokens=96, num_threads=1)
        f32 = {"cache_type_k": "GGML_TYPE_F32", "cache_type_v": "GGML_TYPE_F32"}
        parameters |= {f"speculative.draft.{name}": value for name, value in f32.items()}
    with open_llama_cpp(path, num_context_tokens=96, num_threads=1, more=parameters) as llama_cpp:
        answer = llama_cpp.continue_text(PROMPT, num_tokens=NUM_TOKENS)
    return answer["content"], answer["timings"]


def generate(folder: Path, **assistant: object) -> list[int]:
    model = load(folder)
    model.generation_config.eos_token_id = None  # so that every answer has NUM_TOKENS tokens
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, **assistant)
    return ids[0, len(PROMPT) :].tolist()


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_all_give_the_same_greedy_tokens(pair) -> None:
    plain = generate(pair / "target")
    assert generate(pair / "target", assistant_model=load(pair / "draft")) == plain
    with open_llama_cpp(pair / "target.gguf", num_context_tokens=96, num_threads=1) as llama_cpp:
        expected = llama_cpp.detokenize(plain)
    text, timings = complete(pair / "target.gguf")
    assert text == expected
    assert "draft_n" not in timings
    text, timings = complete(pair / "target.gguf", draft=pair / "draft.gguf")
    assert text == expected
    # The draft was asked, and was right and wrong: otherwise nothing was shown.
    assert 0 < timings["draft_n_accepted"] < timings["draft_n"]
    # A twin: tokens of the draft that nobody verified.
    assert generate(pair / "draft") != plain


def test_a_model_that_drafts_for_itself_is_always_right(pair) -> None:
    """The upper limit: every proposed token is accepted."""
    text, timings = complete(pair / "target.gguf", draft=pair / "target.gguf")
    assert timings["draft_n_accepted"] == timings["draft_n"] > NUM_TOKENS / 2
    assert text == complete(pair / "target.gguf")[0]
