"""The compiled encoder: its kernel is built once and cached, merges as sentencepiece does, and is optional."""

import importlib.util
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.errors import ConversionError, PlatformError
from megatron_hammer.tokenizer.encoding import fast_encoder, native_encoder
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.fast_encoder import select_encoder
from megatron_hammer.tokenizer.encoding.native_encoder import NativeEncoder, build_kernel_tables, compile_kernel
from megatron_hammer.tokenizer.encoding.sentencepiece_model import read_sentencepiece_model
from tests.helpers.repository import ROOT
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import TOY_TEXTS


@pytest.fixture(scope="module")
def symbols_path(tmp_path_factory) -> Path:
    return train_model(tmp_path_factory.mktemp("models") / "symbols.model", **MODEL_OPTIONS["symbols"])


@pytest.fixture(scope="module")
def encoder(symbols_path) -> NativeEncoder:
    return NativeEncoder(load_encoder(symbols_path), build_kernel_tables(read_sentencepiece_model(symbols_path)))


def test_the_kernel_is_compiled_once_into_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compile_kernel()
    assert path is not None
    assert path.parent == tmp_path / "megatron_hammer"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setenv("CC", "false")  # a compiler that fails: the cache needs none
    assert compile_kernel() == path


def test_without_a_compiler_another_encoder_is_used(symbols_path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(native_encoder, "find_built_kernel", lambda: None)
    native_encoder.load_kernel.cache_clear()
    try:
        assert compile_kernel() is None
        choice = select_encoder(load_encoder(symbols_path))
        assert (choice.tables, choice.warning) == (None, None)
        assert choice.definition is not None
        with pytest.raises(PlatformError, match=r"the kernel must be compiled, got none\. Install a C compiler\."):
            NativeEncoder(load_encoder(symbols_path), build_kernel_tables(read_sentencepiece_model(symbols_path)))
    finally:
        native_encoder.load_kernel.cache_clear()


@pytest.fixture(scope="module")
def built_path(tmp_path_factory) -> Path:
    """The kernel as pip builds it, with its source beside it."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("needs Python.h: install the development package of this Python")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    subprocess.run(command, cwd=ROOT, check=True)
    (path,) = folder.glob("megatron_hammer/**/*.so")
    shutil.copy(native_encoder.SOURCE_PATH, path.parent)
    return path


def test_the_kernel_that_pip_built_comes_first(built_path, symbols_path, monkeypatch):
    assert built_path.name == "bpe_kernel.abi3.so"
    monkeypatch.setattr(native_encoder, "SOURCE_PATH", built_path.with_name("bpe_kernel.c"))
    monkeypatch.setattr(native_encoder, "compile_kernel", lambda: pytest.fail("nothing is to be compiled"))
    assert native_encoder.find_built_kernel() == built_path
    native_encoder.load_kernel.cache_clear()
    try:
        encoder = NativeEncoder(load_encoder(symbols_path), build_kernel_tables(read_sentencepiece_model(symbols_path)))
        reference = load_encoder(symbols_path)
        assert all(np.array_equal(encoder.encode(text), reference.encode(text)) for text in draw_letters())
    finally:
        native_encoder.load_kernel.cache_clear()


def test_the_kernel_that_pip_built_is_a_module(built_path):
    spec = importlib.util.spec_from_file_location("bpe_kernel", built_path)
    assert spec is not None
    assert importlib.util.module_from_spec(spec).__name__ == "bpe_kernel"


def test_a_kernel_built_from_another_source_is_not_used(built_path, tmp_path, monkeypatch):
    shutil.copy(built_path, tmp_path)
    source = native_encoder.SOURCE_PATH.read_text()
    (tmp_path / "bpe_kernel.c").write_text(source.replace("#define MAX_PASSES 64", "#define MAX_PASSES 65"))
    monkeypatch.setattr(native_encoder, "SOURCE_PATH", tmp_path / "bpe_kernel.c")
    assert native_encoder.find_built_kernel() is None
    monkeypatch.setattr(native_encoder, "compile_kernel", lambda: None)
    native_encoder.load_kernel.cache_clear()
    try:
        assert native_encoder.load_kernel() is None
    finally:
        native_encoder.load_kernel.cache_clear()


@pytest.mark.parametrize("num_chars", [1, 63, 64, 65, 66, 5000, 1 << 20, (1 << 20) + 5])
@pytest.mark.parametrize("letters", ["o", "th", "o ", "the quick"])
def test_stretches_of_every_length_are_merged_alike(encoder, symbols_path, letters, num_chars):
    """Scanned, from a heap, and in passes: what sentencepiece returns."""
    reference = load_encoder(symbols_path)
    text = (letters * num_chars)[:num_chars]
    assert np.array_equal(encoder.encode(text), reference.encode(text))


def draw_letters() -> list[str]:
    draw = random.Random(5)
    letters = "".join(TOY_TEXTS)
    return ["".join(draw.choices(letters, k=draw.randint(0, 200))) for _ in range(3000)]


def test_random_letters_of_the_vocabulary(encoder, symbols_path):
    reference = load_encoder(symbols_path)
    texts = draw_letters()
    ids, lengths = encoder.encode_batch(texts)
    expected = [reference.encode(text) for text in texts]
    assert lengths.tolist() == [len(part) for part in expected]
    assert np.array_equal(ids, np.concatenate(expected))
    again, _ = encoder.encode_batch(texts)  # from the cache
    assert np.array_equal(again, ids)


def test_twin_other_scores_give_other_ids(symbols_path):
    model = read_sentencepiece_model(symbols_path)
    tables = build_kernel_tables(model)
    tables.rank_of_piece[:] = tables.rank_of_piece[::-1].copy()
    wrong = NativeEncoder(load_encoder(symbols_path), tables)
    reference = load_encoder(symbols_path)
    assert any(not np.array_equal(wrong.encode(text), reference.encode(text)) for text in draw_letters())


@pytest.mark.parametrize(
    "name, message",
    [
        ("unigram", "model_type=unigram: only BPE merges are mapped"),
        ("no byte fallback", "no byte fallback: unknown characters have no bytes"),
        ("symbols of whitespace", "user-defined symbols with white space: they are looked for in raw text"),
    ],
)
def test_models_that_the_kernel_would_encode_differently_are_refused(tmp_path, name, message):
    path = train_model(tmp_path / "a.model", **MODEL_OPTIONS[name])
    with pytest.raises(ConversionError, match=message):
        build_kernel_tables(read_sentencepiece_model(path))


def test_twin_a_wrong_kernel_is_noticed_at_start_up(symbols_path, monkeypatch):
    def build_wrongly(model):
        tables = build_kernel_tables(model)
        tables.merged[-1] = tables.merged[0]
        return tables

    monkeypatch.setattr(fast_encoder, "build_kernel_tables", build_wrongly)
    choice = select_encoder(load_encoder(symbols_path), kinds=("native",))
    assert choice.tables is None
    assert choice.warning is not None
    assert "is encoded otherwise by the fast encoder near" in choice.warning
