"""The exported tokenizer encodes as sentencepiece does, through transformers as users load it."""

import io
import json
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers

from megatron_hammer.corpus.readers import Document
from megatron_hammer.errors import ConversionError, DataError, OutputError
from megatron_hammer.tokenizer.encoding import hugging_face_tokenizer
from megatron_hammer.tokenizer.encoding.encoder import SentencePieceEncoder, load_encoder
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import (
    SAMPLE_TEXTS,
    build_fast_tokenizer,
    check_same_encoding,
)
from megatron_hammer.tokenizer.encoding.sentencepiece_model import PieceType, read_sentencepiece_model
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers
from megatron_hammer.tokenizer.export import export_tokenizer as tokenizer_export
from megatron_hammer.tokenizer.export.chat_format import ChatFormat
from megatron_hammer.tokenizer.export.export_tokenizer import (
    export_tokenizer,
    export_tokenizer_folder,
)
from megatron_hammer.tokenizer.vocabulary.recipes import TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import TextSource
from megatron_hammer.tokenizer.vocabulary.train import train_tokenizer
from tests.helpers.hostile_text import build_hostile_texts
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer

TEXTS = (*SAMPLE_TEXTS, *TOY_TEXTS)


def train(path, **options):
    """A sentencepiece model with settings that our own trainer does not offer."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 347, "byte_fallback": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOY_TEXTS * 5), model_writer=model, minloglevel=2, **defaults | options
    )
    path.write_bytes(model.getvalue())
    return path


def export_and_load(source, folder):
    folder.mkdir()
    exported = export_tokenizer(source, folder, max_length=99)
    return exported, transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(tokenizer, source, texts):
    encoder = load_encoder(source)
    for text in texts:
        ids = encoder.encode(text).tolist()
        assert tokenizer(text)["input_ids"] == ids, text
        if tokenizer.unk_token_id not in ids:  # sentencepiece decodes it to another sign
            assert tokenizer.decode(ids) == encoder.decode(ids), text


def test_our_own_models_encode_alike_through_transformers(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    exported, tokenizer = export_and_load(source, tmp_path / "hf")
    assert_same(tokenizer, source, TEXTS)
    assert (exported.vocab_size, exported.bos_id, exported.eos_id) == (347, 1, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.model_max_length == 99
    assert exported.num_checked_texts > 347 - 256
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == source.read_bytes()


def test_saving_again_with_transformers_changes_nothing(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    _, tokenizer = export_and_load(source, tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "again")
    assert_same(transformers.AutoTokenizer.from_pretrained(tmp_path / "again"), source, TEXTS)


def test_user_defined_symbols_are_never_taken_apart(tmp_path):
    symbols = ("<tool>", "<tool_call>", "==", "7", "ﬁ")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TOY_TEXTS * 5))
    recipe = TokenizerRecipe(vocab_size=355, user_defined_symbols=symbols)
    source = train_tokenizer([TextSource(inputs=(corpus,))], tmp_path / "symbols.model", recipe).path
    _, tokenizer = export_and_load(source, tmp_path / "hf")
    texts = ("<tool_call><tool>x===7 77 <tool_calls> ﬁ", " == == the dog<tool> sleeps", *TEXTS)
    assert_same(tokenizer, source, texts)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
        {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 120, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"split_digits": True, "allow_whitespace_only_pieces": True, "remove_extra_whitespaces": False},
    ],
    ids=["llama 2", "sentencepiece's default whitespace", "no prefix", "no byte fallback", "digits"],
)
def test_other_settings_of_sentencepiece_encode_alike(tmp_path, options):
    source = train(tmp_path / "other.model", **options)
    _, tokenizer = export_and_load(source, tmp_path / "hf")
    assert_same(tokenizer, source, TEXTS)


def test_a_model_that_normalises_is_exported_exactly(tmp_path):
    """Half-width kana, marks, ligatures and joiners, of which ordinary samples have none."""
    source = train(tmp_path / "nfkc.model", normalization_rule_name="nfkc_cf", add_dummy_prefix=True)
    _, tokenizer = export_and_load(source, tmp_path / "hf")
    parts = ["ｶﾞ", "ﾊﾟﾟ", "e\u0301\u0323", "ﬁ\u0301", "한", "\u1112\u1161\u11ab", "\u200d", "\u3000", "Ἂ\u0345", "fox"]
    assert_same(tokenizer, source, build_hostile_texts(parts, num_texts=300, seed=8))


def test_twin_the_samples_tell_a_normaliser_that_is_nearly_right(tmp_path, monkeypatch):
    """As `tokenizers` reads the map by itself; it passed when the samples held nothing that the map replaces."""
    source = train(tmp_path / "nfkc.model", normalization_rule_name="nfkc_cf")
    monkeypatch.setattr(
        hugging_face_tokenizer,
        "list_charsmap_steps",
        lambda precompiled, name: [tokenizers.normalizers.Precompiled(precompiled)],
    )
    with pytest.raises(ConversionError, match="both must encode"):
        export_tokenizer(source, tmp_path, max_length=99)


def test_control_tokens_in_text_are_text(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    _, tokenizer = export_and_load(source, tmp_path / "hf")
    ids = tokenizer("</s>")["input_ids"]
    assert 2 not in ids
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == "</s>"


def test_twin_transformers_own_conversion_is_noticed(tmp_path):
    """Its LlamaTokenizer puts a space before the text, which these models were not trained with."""
    source = train_toy_tokenizer(tmp_path)
    own = transformers.LlamaTokenizer.from_pretrained(str(tmp_path), vocab_file=str(source))
    with pytest.raises(ConversionError, match="both must encode 'Hello, world!' alike"):
        check_same_encoding(load_encoder(source), own.backend_tokenizer, ["Hello, world!"])


def test_twin_special_tokens_that_split_text_are_noticed(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    fast = build_fast_tokenizer(read_sentencepiece_model(source), name="toy")
    fast.encode_special_tokens = False
    with pytest.raises(ConversionError, match="literal control tokens"):
        check_same_encoding(load_encoder(source), fast, list(SAMPLE_TEXTS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram", "vocab_size": 320}, "model_type=unigram: only BPE merges are mapped"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix: whitespace must lead"),
        ({"user_defined_symbols": ["<x>"]}, "add_dummy_prefix with user-defined symbols"),
    ],
)
def test_settings_that_transformers_cannot_express_are_refused(tmp_path, options, message):
    source = train(tmp_path / "other.model", **options)
    with pytest.raises(ConversionError, match=message):
        export_tokenizer(source, tmp_path, max_length=99)
    with pytest.raises(ConversionError, match=rf"{message}.*\. Encode with sentencepiece"):
        export_tokenizer_folder(source, tmp_path / "hf")


def test_a_hugging_face_tokenizer_is_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    fast.train_from_iterator(TOY_TEXTS, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>").save_pretrained(source)
    exported, tokenizer = export_and_load(source, tmp_path / "hf")
    assert exported.eos_id == tokenizer.eos_token_id == 0
    assert exported.bos_id is None
    assert_same(tokenizer, source, TEXTS)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "broken.model"
    path.write_bytes(b"\x0a\xff\xff\xff no model")
    with pytest.raises(DataError, match="file must be a SentencePiece model"):
        read_sentencepiece_model(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_sentencepiece_model(tmp_path / "missing.model")


def test_the_parsed_pieces_are_sentencepieces_own(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    model = read_sentencepiece_model(source)
    assert len(model.pieces) == processor.get_piece_size()
    for token_id, piece in enumerate(model.pieces):
        assert piece.text == processor.id_to_piece(token_id)
        assert piece.score == processor.get_score(token_id)
        assert (piece.type is PieceType.BYTE) == processor.is_byte(token_id)
        assert (piece.type is PieceType.CONTROL) == processor.is_control(token_id)


@needs_shared_data
@pytest.mark.parametrize("name", ["hammerllm", "internlm-7b", "llama2-7b"])
def test_published_models_encode_real_text_alike(tmp_path, name):
    source = SHARED_DATA / "tokenizer" / f"{name}.model"
    _, tokenizer = export_and_load(source, tmp_path / "hf")
    documents = [
        json.loads(line)["text"]
        for language, step in (("en", 20), ("zh", 200))
        for line in (SHARED_DATA / "corpus" / f"{language}.jsonl").read_text().splitlines()[::step]
    ]
    assert len(documents) > 50
    assert_same(tokenizer, source, [*SAMPLE_TEXTS, *documents])


DOCUMENTS = [Document(text, "c.jsonl", line) for line, text in enumerate(TEXTS, start=1)]


def test_a_folder_is_written_once_every_document_is_the_same(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    counts = []
    exported = export_tokenizer_folder(
        source, tmp_path / "hf", iter(DOCUMENTS), chat=ChatFormat(template="{{ messages }}"), on_document=counts.append
    )
    assert (exported.num_conversations, exported.notes) == (0, ())
    assert exported.tokenizer.vocab_size == 347
    assert exported.samples.num_documents == exported.tokenizer.num_checked_texts > 90
    assert exported.corpus.num_documents == counts[-1] == len(TEXTS)
    assert exported.corpus.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert exported.corpus.num_tokens == sum(len(load_encoder(source).encode(text)) for text in TEXTS)
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.model_max_length > 10**9
    assert_same(tokenizer, source, TEXTS)


def test_twin_the_default_conversion_of_transformers_leaves_nothing(tmp_path, monkeypatch):
    """With transformers' own LlamaTokenizer each text gets a space first: the files are the same, the ids are not."""
    source = train_toy_tokenizer(tmp_path)
    own_config = tokenizer_export._tokenizer_config
    monkeypatch.setattr(
        tokenizer_export, "_tokenizer_config", lambda *args: own_config(*args) | {"tokenizer_class": "LlamaTokenizer"}
    )
    monkeypatch.setattr(tokenizer_export, "SAMPLE_TEXTS", ())
    monkeypatch.setattr(tokenizer_export, "list_texts_of", lambda model: ())
    message = r"c.jsonl:3: transformers must encode the text as the original does, got .* at token 0 of 'Hello, world!'"
    with pytest.raises(ConversionError, match=message):
        export_tokenizer_folder(source, tmp_path / "hf", DOCUMENTS[2:3])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("hf")] == []


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("encode", lambda ids: ids[:-1], r"c.jsonl:17: transformers must encode .* got .* for nothing at token \d+ of"),
        ("encode", lambda ids: ids + 5, r"c.jsonl:17: .* for .* at token 0 of 'the quick brown fox"),
        (
            "decode",
            lambda text: text.upper(),
            r"c.jsonl:17: transformers must decode the ids as the original does, got",
        ),
    ],
)
def test_twin_one_different_document_leaves_nothing(tmp_path, monkeypatch, method, change, message):
    source = train_toy_tokenizer(tmp_path)
    original = getattr(SentencePieceEncoder, method)

    def changed(self, value):
        result = original(self, value)
        text = value if method == "encode" else result
        return change(result) if text == TOY_TEXTS[0] else result

    monkeypatch.setattr(SentencePieceEncoder, method, changed)
    with pytest.raises(ConversionError, match=message):
        export_tokenizer_folder(source, tmp_path / "hf", DOCUMENTS)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("hf")] == []


def test_a_hugging_face_folder_whose_template_adds_tokens_is_copied(tmp_path):
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(TOY_TEXTS, vocab_size=300, special_tokens=["<|bos|>"], show_progress=False)
    fast.post_processor = tokenizers.processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    (tmp_path / "source").mkdir()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast._tokenizer, bos_token="<|bos|>").save_pretrained(
        tmp_path / "source"
    )
    exported = export_tokenizer_folder(tmp_path / "source", tmp_path / "hf", DOCUMENTS)
    assert exported.corpus.num_documents == len(TEXTS)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("the")["input_ids"][0] == 0


def test_code_in_a_folder_is_not_run(tmp_path):
    source = train_toy_tokenizer(tmp_path)
    export_and_load(source, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConversionError, match="transformers must load the tokenizer, got ValueError"):
        load_with_transformers(tmp_path / "hf")


@pytest.mark.parametrize("content", ["folder", "file"])
def test_a_target_that_holds_something_is_refused(tmp_path, content):
    target = tmp_path / "hf"
    if content == "file":
        target.write_text("")
    else:
        target.mkdir()
        (target / "a").write_text("")
    found = "a file" if content == "file" else "1 entries"
    with pytest.raises(OutputError, match=f"hf: target must be absent or an empty folder, got {found}"):
        export_tokenizer_folder(train_toy_tokenizer(tmp_path), target)


def test_where_auto_tokenizer_reads_the_source_otherwise_a_note_says_so(tmp_path):
    """A folder with a tokenizer.model alone, of which transformers loses the space prefix, and the rules of a class."""
    model = train(tmp_path / "tokenizer.model", add_dummy_prefix=True, remove_extra_whitespaces=False)
    exported, tokenizer = export_and_load(model, tmp_path / "of the model")
    assert exported.note is None
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(model, folder)
    noted, again = export_and_load(folder, tmp_path / "of the folder")
    assert noted.note.startswith(f"{folder}: transformers' AutoTokenizer is another tokenizer than tokenizer.model")
    assert again("fox")["input_ids"] == tokenizer("fox")["input_ids"]
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "fox"}
    (tmp_path / "of the model" / "tokenizer_config.json").write_text(json.dumps(named))
    noted, _ = export_and_load(tmp_path / "of the model", tmp_path / "copy")
    assert "than tokenizer.json" in noted.note
