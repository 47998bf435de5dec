"""Every flipped bit of a file that torch.save wrote is noticed, and sound archives of every kind are accepted."""

import io
import random
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_hammer.checkpoint_files.saved_archive import ArchiveDamage, SavedArchive, open_archive


def save(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def find_damage(path: Path, content: bytes, offset: int = 0, length: int | None = None) -> str | None:
    path.write_bytes(content)
    try:
        SavedArchive(path, offset, length).check_all()
    except ArchiveDamage as damage:
        return str(damage)
    return None


def zip_by_python(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in ("archive/data.pkl", "archive/data/0"):
            archive.writestr(name, name.encode() * 40)
    return file.getvalue()


SOUND = {
    "one tensor": save(torch.arange(24.0)),
    "no elements": save(torch.empty(0)),
    "many tensors": save({str(number): torch.randn(number, 7) for number in range(1, 9)}),
    "zeros, whose bytes have no checksum of their own": save(torch.zeros(3, dtype=torch.uint8)),
    "another writer": zip_by_python(zipfile.ZIP_STORED),
    "compressed": zip_by_python(zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("before", [0, 64, 70_001])
def test_sound_archives_are_accepted_wherever_they_begin(name, before, tmp_path):
    content = SOUND[name]
    assert find_damage(tmp_path / "file", bytes(before) + content + b"more", before, len(content)) is None


def test_every_flipped_bit_is_noticed(tmp_path):
    """One bit of every byte: of headers, padding, checksums, directory and data."""
    content, drawn = SOUND["one tensor"], random.Random(5)
    missed = []
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << drawn.randrange(8)
        if find_damage(tmp_path / "file", bytes(damaged)) is None:
            missed.append(position)
    assert missed == []


def test_the_member_is_named_when_it_is_first_read_and_not_before(tmp_path):
    content = bytearray(save({"a": torch.ones(40_000), "b": torch.ones(50_000)}))
    start = content.index(torch.ones(50_000).numpy().tobytes())
    content[start + 99] ^= 4
    (tmp_path / "file").write_bytes(content)
    archive = open_archive(tmp_path / "file")
    archive.check_at(content.index(torch.ones(40_000).numpy().tobytes()))
    with pytest.raises(ArchiveDamage, match=r"data/1 must have the CRC32 \w+ that was saved, got \w+"):
        archive.check_at(start + 5_000)


def test_an_archive_without_checksums_is_accepted_and_says_so(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "file").write_bytes(save(torch.arange(24.0)))
    finally:
        torch.serialization.set_crc32_options(True)
    archive = SavedArchive(tmp_path / "file")
    archive.check_all()
    assert not archive.has_checksums


def test_a_file_of_before_archives_is_none(tmp_path):
    torch.save(torch.ones(3), tmp_path / "file", _use_new_zipfile_serialization=False)
    assert open_archive(tmp_path / "file") is None
