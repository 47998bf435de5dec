"""The tokenizer and the weights of a Hugging Face folder, as transformers has them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from megatron_hammer.errors import ConversionError
from megatron_hammer.evaluation.scorers.hugging_face import load_folder_encoder, load_model, read_max_length, score_rows
from tests.helpers.scored_models import TEXTS, write_hf_model
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer, write_llama_folder


def test_a_folder_is_encoded_as_auto_tokenizer_does(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama", train_toy_tokenizer(tmp_path), TOY_VOCAB_SIZE)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_folder_encoder(folder)
    for text in (*TEXTS, "<tool> and <s>", " two  spaces", ""):
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
    assert (ours.bos_id, ours.eod_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_a_class_that_changes_the_file_is_followed(tmp_path: Path) -> None:
    """LlamaTokenizer takes vocabulary and merges from tokenizer.json and its own rules for the rest."""
    folder = write_hf_model(tmp_path / "hf")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [load_folder_encoder(folder).encode(text).tolist() for text in TEXTS] == expected


def test_what_transformers_does_not_load_is_one_sentence(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match="hf: transformers must load the model, got"):
        load_model(folder, torch.float32)
    other = write_hf_model(tmp_path / "other", num_hidden_layers=2)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    # transformers would fill the missing layers with random numbers.
    with pytest.raises(ConversionError, match=r"must hold every tensor of the model, got none that fits for"):
        load_model(folder, torch.float32)
    config = transformers.BloomConfig()  # of ALiBi, which has no longest sequence
    with pytest.raises(ConversionError, match=r"config\.json: max_position_embeddings must be a positive number"):
        read_max_length(config, folder)


def test_scores_are_those_of_the_whole_softmax_in_fp32() -> None:
    logits = torch.randn(600, 7, generator=torch.Generator().manual_seed(0)).mul(4).to(torch.bfloat16)
    logits[3] = 1.0  # all equally likely: the first is the choice
    targets = torch.arange(600) % 7
    scores = score_rows(logits, targets)
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(scores.log_probabilities), expected, rtol=1e-5, atol=1e-6)
    assert scores.is_greedy[0:7].tolist() == [bool(logits[row].argmax() == row) for row in range(7)]
    assert not scores.is_greedy[3]
