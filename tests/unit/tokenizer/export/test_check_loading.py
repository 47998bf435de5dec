"""A copied tokenizer folder is compared with its source as transformers loads both, fact by fact."""

import json
import shutil

import pytest
import transformers

from megatron_hammer.errors import ConversionError, DataError
from megatron_hammer.tokenizer.encoding.encoder import HuggingFaceEncoder, SentencePieceEncoder, load_encoder
from megatron_hammer.tokenizer.export.check_loading import require_loaded_alike
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer_folder
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import LLAMA_ADDED_TOKENS, write_llama_folder

TEXT = "the<|im_end|> fox <tool>x"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return train_model(tmp_path_factory.mktemp("model") / "tokenizer.model", **MODEL_OPTIONS["dummy prefix"])


@pytest.fixture
def folder(tmp_path, model_path):
    return write_llama_folder(tmp_path / "llama", model_path, SentencePieceEncoder(model_path).vocab_size)


def test_a_folder_without_tokenizer_json_survives_as_transformers_loads_it(folder, tmp_path):
    exported = export_tokenizer_folder(folder, tmp_path / "copy")
    source, copy = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "copy"))
    assert source("the fox")["input_ids"][0] == source.bos_token_id  # it begins a text by default
    assert copy(TEXT)["input_ids"] == source(TEXT)["input_ids"]
    assert (copy.pad_token, copy.chat_template, len(copy)) == ("<pad>", source.chat_template, len(source))
    assert (exported.tokenizer.vocab_size, exported.tokenizer.eos_id) == (len(source), source.eos_token_id)
    assert require_loaded_alike(folder, tmp_path / "copy") > 20


def test_it_is_encoded_as_transformers_does(folder, model_path):
    encoder = load_encoder(folder)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(encoder, HuggingFaceEncoder)
    assert encoder.encode(TEXT).tolist() == oracle(TEXT, add_special_tokens=False)["input_ids"]
    assert (encoder.vocab_size, encoder.bos_id, encoder.eod_id) == (len(oracle), 1, oracle.eos_token_id)
    # The model alone is still sentencepiece.
    assert isinstance(load_encoder(folder / "tokenizer.model"), SentencePieceEncoder)


@pytest.mark.parametrize("eos_token", ["</s>", "<unk>", None])
def test_a_folder_that_adds_nothing_is_sentencepiece_with_the_ends_that_it_names(tmp_path, model_path, eos_token):
    shutil.copyfile(model_path, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": eos_token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = load_encoder(tmp_path)
    assert isinstance(encoder, SentencePieceEncoder)
    assert encoder.eod_id == transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def change_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_added_tokens_that_transformers_cannot_load_are_refused(folder):
    change_config(folder, added_tokens_decoder={"400": 7})
    with pytest.raises(DataError, match=r"beside tokenizer\.model must be known to transformers"):
        load_encoder(folder)


def leave_out_an_added_token(folder):
    added = json.loads((folder / "added_tokens.json").read_text())
    del added[LLAMA_ADDED_TOKENS[-1]]
    (folder / "added_tokens.json").write_text(json.dumps(added))


@pytest.mark.parametrize(
    "damage, fact",
    [
        (lambda folder: change_config(folder, add_bos_token=False), "ids of texts"),
        (leave_out_an_added_token, "number of tokens"),
        (
            lambda folder: (
                (folder / "special_tokens_map.json").write_text("{}") and change_config(folder, pad_token=None)
            ),
            "pad_token",
        ),
        (lambda folder: change_config(folder, chat_template="{{ bos_token }}"), "chat template, conversation 1"),
        (lambda folder: change_config(folder, model_max_length=78), "model_max_length"),
        (lambda folder: change_config(folder, tokenizer_class="GemmaTokenizer"), "normalizer"),
        (lambda folder: change_config(folder, legacy=True, add_prefix_space=False), "pre_tokenizer"),
    ],
)
def test_twin_every_fact_that_is_lost_is_named(folder, tmp_path, damage, fact):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert require_loaded_alike(folder, copy) is not None
    damage(copy)
    with pytest.raises(ConversionError, match=rf"{fact} must be that of "):
        require_loaded_alike(folder, copy)


def test_a_class_that_only_config_json_names_survives(folder, tmp_path):
    """The folder of a checkpoint's tokenizer has no model beside it."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma", "hidden_size": 64}))
    export_tokenizer_folder(folder, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {"model_type": "gemma"}
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")).__name__ == "GemmaTokenizer"
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(ConversionError, match="normalizer must be that of"):
        require_loaded_alike(folder, tmp_path / "copy")
