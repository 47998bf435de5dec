"""The header of a GGUF file, against the package gguf, and files that are not one."""

import struct
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from megatron_hammer.checkpoint.gguf.header import read_gguf_header
from megatron_hammer.errors import ConversionError
from tests.helpers.messages import raises_problem


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Every type of value, and arrays of numbers, of texts and of truths between them."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_token_list(["a", "春", ""])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_array("truths", [True, False])
    writer.add_bool("is", True)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -7)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.25)
    writer.add_float64("f64", 1e300)
    writer.add_chat_template("{{ 春 }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_number_and_text_is_that_of_the_package_gguf(path: Path) -> None:
    fields = GGUFReader(path).fields
    arrays = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "truths"}
    names = {name for name in fields if not name.startswith("GGUF.")}
    header = read_gguf_header(path)
    assert set(header) == names - arrays
    assert header == {name: fields[name].contents() for name in header}


def test_arrays_that_are_asked_for_are_there(path: Path) -> None:
    names = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "truths")
    header = read_gguf_header(path, arrays=names)
    assert [header[name] for name in names] == [["a", "春", ""], [0.5, -1.0, 0.0], [True, False]]
    assert header.keys() - names == read_gguf_header(path).keys()


@pytest.mark.parametrize("length", [9, 2**40])
def test_an_array_of_a_damaged_length_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.gguf"
    # One entry, of the name "a": an array of one number of 32 bits, which says that it has more.
    entry = struct.pack("<Q1sIIQI", 1, b"a", 9, 4, length, 7)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with raises_problem(ConversionError, f"{path}:", "damaged or cut off"):
        read_gguf_header(path, arrays=("a",))


def test_a_file_of_another_kind_is_named_with_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04")
    with raises_problem(ConversionError, f"{path}:", "must be a GGUF file", "PK"):
        read_gguf_header(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with raises_problem(ConversionError, f"{path}:", "version must be 2 or 3", "got 1"):
        read_gguf_header(path)
    with raises_problem(ConversionError, f"{tmp_path / 'gone'}:", "No such file"):
        read_gguf_header(tmp_path / "gone")


def test_a_header_that_is_cut_off_anywhere_is_one_error(path: Path) -> None:
    content = path.read_bytes()
    cut = path.with_name("cut.gguf")
    for length in range(4, len(content) - 1, 7):
        cut.write_bytes(content[:length])
        with raises_problem(ConversionError, f"{cut}:", "damaged or cut off"):
            read_gguf_header(cut)


def test_a_damaged_length_allocates_nothing(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[24:32] = struct.pack("<Q", 2**62)  # of the first name
    path.write_bytes(content)
    with raises_problem(ConversionError, f"{path}:", "damaged or cut off"):
        read_gguf_header(path)
