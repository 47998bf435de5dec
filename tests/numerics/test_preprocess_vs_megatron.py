"""Preprocessed bytes against megatron-core's builder, fed as Megatron-LM's preprocess_data.py is documented to feed it.

One item a sentence, or one a document; nothing for what has no ids; the end-of-document token belongs to the last item.
The texts are encoded by sentencepiece itself and the sentences cut by nltk itself.
"""

from collections.abc import Callable
from pathlib import Path

import nltk.data
import pytest
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from nltk.tokenize.punkt import PunktTokenizer

from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.preprocess import preprocess
from tests.helpers.punkt_model import write_punkt_model
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

HOSTILE_TEXTS = [
    "",
    " ",
    "\n\n",
    "\x00",
    "a\x00b literal <s> </s> <unk> 😀",
    "x" * 50_000,
    "中文 with English и русский, עברית, 한국어 😀👩‍👩‍👧 \u200b\ufeff\u2028",
    "\t\t  spaces   everywhere  ",
    "e\u0301 é ﬁ １２３ 1234567890",
    "Dr. Smith went home. He slept! Then he woke.\n\nNobody knew why? Mr. Brown did.",
]


def write_with_megatron(
    prefix: Path, model_path: Path, texts: list[str], split: Callable[[str], list[str]], append_eod: bool
) -> dict[str, bytes]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(processor.get_piece_size()))
    for text in texts:
        items = [ids for sentence in split(text) if (ids := processor.encode(sentence))]
        if items and append_eod:
            items[-1].append(processor.eos_id())
        builder.add_document(torch.tensor([token for ids in items for token in ids]), [len(ids) for ids in items])
    builder.finalize(f"{prefix}.idx")
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


def write_with_ours(folder: Path, model_path: Path, texts: list[str], **options) -> dict[str, bytes]:
    settings = PreprocessOptions(
        inputs=(str(write_jsonl(folder / "c.jsonl", texts)),),
        tokenizer_path=model_path,
        output_prefix=folder / "ours" / "c",
        **options,
    )
    (prefix,) = preprocess(settings).manifests
    assert prefix.name == ("c_text_sentence" if settings.split_sentences else "c_text_document")
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("append_eod", [False, True])
def test_documents(tmp_path: Path, model_path: Path, append_eod: bool, num_workers: int) -> None:
    texts = [*TOY_TEXTS, *HOSTILE_TEXTS] * 3
    theirs = write_with_megatron(tmp_path / "theirs", model_path, texts, lambda text: [text], append_eod)
    ours = write_with_ours(
        tmp_path, model_path, texts, append_eod=append_eod, num_workers=num_workers, block_bytes=3000
    )
    assert ours == theirs


@pytest.mark.parametrize("append_eod", [False, True])
def test_sentences(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, append_eod: bool) -> None:
    write_punkt_model(tmp_path / "nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    texts = [*TOY_TEXTS, *HOSTILE_TEXTS]
    split = PunktTokenizer("english").tokenize
    theirs = write_with_megatron(tmp_path / "theirs", model_path, texts, split, append_eod)
    assert write_with_ours(tmp_path, model_path, texts, append_eod=append_eod, split_sentences=True) == theirs


def test_a_token_that_begins_documents_is_noticed(tmp_path: Path, model_path: Path) -> None:
    """The broken twin: Megatron-LM's tool has no such token, so the bytes must differ."""
    theirs = write_with_megatron(tmp_path / "theirs", model_path, HOSTILE_TEXTS, lambda text: [text], True)
    ours = write_with_ours(tmp_path, model_path, HOSTILE_TEXTS, append_eod=True, prepend_bos=True)
    assert all(ours[suffix] != theirs[suffix] for suffix in theirs)


@needs_shared_data
@pytest.mark.parametrize("name", ["hammerllm", "llama2-7b"])
def test_real_text_with_real_tokenizers(tmp_path: Path, name: str) -> None:
    texts = list(HOSTILE_TEXTS)
    for language, count in (("zh", 200), ("en", 4)):
        documents = read_documents([SHARED_DATA / "corpus" / f"{language}.jsonl"])
        texts += [document.text for _, document in zip(range(count), documents, strict=False)]
    model_path = SHARED_DATA / "tokenizer" / f"{name}.model"
    theirs = write_with_megatron(tmp_path / "theirs", model_path, texts, lambda text: [text], True)
    assert write_with_ours(tmp_path, model_path, texts, append_eod=True, num_workers=2) == theirs
