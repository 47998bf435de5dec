"""The zip archive that torch.save writes, checked: the CRC32 of its members, and every byte between them.

torch.load reads the numbers of a tensor without comparing the checksum that lies beside them. Here it is compared, when
a member is read for the first time; the headers are compared when the archive is opened. Where torch was told to
compute no checksums (`set_crc32_options(False)`), all of them are 0 and only the headers can be checked.
"""

import mmap
import struct
import zipfile
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DESCRIPTORS = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))  # after the data; the second of more than 4 GB
_END, _ZIP64_LOCATOR, _ZIP64_END = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_DIRECTORY_ENTRY_BYTES, _DIRECTORY_LENGTHS = 46, struct.Struct("<3H")  # of name, extra field and comment
_ZIP64_EXTRA = b"\x01\x00"
_TORCH_PADDING = b"FB"  # the extra field with which torch aligns the data; the rest of it is the letter Z
_TORCH_ZIP64_VERSIONS = (0x31E, 45)
_HAS_DESCRIPTOR = 8  # a flag of a member: sizes and checksum follow its data
_BLOCK_BYTES = 1 << 19  # of a checksum: stays in the processor's cache
_SMALL_BYTES = 1 << 16


class ArchiveDamage(Exception):
    """What is wrong with an archive, for a sentence that names its file: `X must be A, got B`."""


@dataclass(frozen=True, slots=True)
class Member:
    """Bytes [start, start + num_bytes) of the file, and the checksum that they must have."""

    name: str
    start: int
    num_bytes: int
    crc: int | None  # None of compressed bytes, whose checksum zipfile compares


class SeekableMap(mmap.mmap):
    """What zipfile asks for and mmap has only from Python 3.13."""

    def seekable(self) -> bool:
        return True


def open_archive(path: Path) -> "SavedArchive | None":
    """The whole file as an archive; None if it is none, as torch wrote before version 1.6."""
    return SavedArchive(path) if zipfile.is_zipfile(path) else None


class SavedArchive:
    """Bytes [offset, offset + length) of a file, which torch.save wrote; they stay mapped as long as this lives.

    Raises ArchiveDamage where its headers or its small members are not as written, OSError where it cannot be mapped.
    """

    def __init__(self, path: Path, offset: int = 0, length: int | None = None):
        self.path = path
        length = path.stat().st_size - offset if length is None else length
        # A memory map can only begin at a multiple of the granularity.
        self._first_byte = offset - offset % mmap.ALLOCATIONGRANULARITY
        with path.open("rb") as file:
            end = offset + length - self._first_byte
            self._map = SeekableMap(file.fileno(), end, access=mmap.ACCESS_READ, offset=self._first_byte)
        try:
            members = _list_members(self._map, offset - self._first_byte, self._first_byte)
        except ArchiveDamage:
            raise
        except Exception as error:  # zipfile, and numbers that point outside the file, can raise nearly anything
            raise ArchiveDamage(
                f"the archive must be what torch.save writes, got {type(error).__name__}: {error}"
            ) from error
        self._members = sorted(members, key=lambda member: member.start)
        # A torch that computes no checksums writes 0 for all. A single 0 among others is a checksum like every other.
        self.has_checksums = any(member.crc for member in members)
        self._checked: set[str] = set()
        for member in members:
            if member.num_bytes <= _SMALL_BYTES:
                self._check(member)

    def check_at(self, position: int) -> None:
        """Check the member that holds this byte of the file, unless it was checked before; raises ArchiveDamage."""
        index = bisect_right([member.start for member in self._members], position) - 1
        if index >= 0:
            self._check(self._members[index])

    def check_all(self) -> None:
        """Check every member; raises ArchiveDamage."""
        for member in self._members:
            self._check(member)

    def _check(self, member: Member) -> None:
        if member.name in self._checked or member.crc is None or not self.has_checksums:
            return
        crc, start, end = 0, member.start - self._first_byte, member.start - self._first_byte + member.num_bytes
        with memoryview(self._map) as data:
            for first in range(start, end, _BLOCK_BYTES):
                crc = zlib.crc32(data[first : min(end, first + _BLOCK_BYTES)], crc)
        if crc != member.crc:
            raise ArchiveDamage(f"{member.name} must have the CRC32 {member.crc:08x} that was saved, got {crc:08x}")
        self._checked.add(member.name)


def _list_members(data: SeekableMap, begin: int, first_byte: int) -> list[Member]:
    """The members, in the order of the directory; raises ArchiveDamage if headers contradict each other."""
    with zipfile.ZipFile(cast(IO[bytes], data)) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    position, members, extras = begin, [], set()
    for entry in entries:
        _require(entry.header_offset == position, f"the header of {entry.filename}", position, entry.header_offset)
        wanted, found = _list_attributes(entries[0]), _list_attributes(entry)
        # All members are written alike, so one that differs is damaged.
        _require(found == wanted, f"the attributes of {entry.filename}", wanted, found)
        start, extra = _check_local_header(data, entry)
        extras.add(extra)
        crc = entry.CRC if entry.compress_type == zipfile.ZIP_STORED else None
        members.append(Member(entry.filename, first_byte + start, entry.compress_size, crc))
        position = _check_descriptor(data, entry, start + entry.compress_size)
    _require(len(extras - {_ZIP64_EXTRA}) <= 1, "the kind of padding before the data", _TORCH_PADDING, extras)
    _require(directory == position, "the directory of the archive", position, directory)
    _check_end(data, begin, directory, len(entries), is_torch=_TORCH_PADDING in extras)
    return members


def _require(is_right: bool, what: str, wanted: Any, found: Any) -> None:
    if not is_right:
        raise ArchiveDamage(f"{what} must be {wanted!r}, got {found!r}")


def _list_attributes(entry: zipfile.ZipInfo) -> tuple[Any, ...]:
    flags = entry.flag_bits if entry.file_size else entry.flag_bits | _HAS_DESCRIPTOR  # torch puts none after nothing
    versions = (entry.create_version, entry.create_system, entry.extract_version, entry.reserved, entry.volume)
    return (*versions, flags, entry.compress_type, entry.internal_attr, entry.external_attr, entry.comment)


def _check_local_header(data: SeekableMap, entry: zipfile.ZipInfo) -> tuple[int, bytes]:
    """Where the data of a member begins, and the kind of the extra field before it."""
    where = entry.header_offset
    signature, version, flags, method, time, date, *numbers, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(
        data, where
    )
    name_start = where + _LOCAL_HEADER.size
    extra_start = name_start + name_bytes
    name, extra = data[name_start:extra_start], data[extra_start : extra_start + extra_bytes]
    day = ((date >> 9) + 1980, (date >> 5) & 0xF, date & 0x1F, time >> 11, (time >> 5) & 0x3F, (time & 0x1F) * 2)
    versions = entry.extract_version | entry.reserved << 8
    wanted = (b"PK\x03\x04", versions, entry.flag_bits, entry.compress_type, entry.date_time)
    found = (signature, version, flags, method, day)
    _require(found == wanted, f"the header of {entry.filename}", wanted, found)
    _require(name == entry.orig_filename.encode(), f"the name before {entry.filename}", entry.orig_filename, name)
    if extra.startswith(_TORCH_PADDING):
        padding = _TORCH_PADDING + (extra_bytes - 4).to_bytes(2, "little") + b"Z" * (extra_bytes - 4)
        _require(extra == padding, f"the padding of {entry.filename}", padding, extra)
    is_later = bool(entry.flag_bits & _HAS_DESCRIPTOR) and numbers == [0, 0, 0]
    written = [entry.CRC, entry.compress_size, entry.file_size]
    is_here = numbers == written or extra.startswith(_ZIP64_EXTRA)
    _require(is_later or is_here, f"checksum and sizes of {entry.filename}", written, numbers)
    return extra_start + extra_bytes, extra[:2]


def _check_descriptor(data: SeekableMap, entry: zipfile.ZipInfo, end: int) -> int:
    """Where the next member begins."""
    if not entry.flag_bits & _HAS_DESCRIPTOR:
        return end
    wanted = (b"PK\x07\x08", entry.CRC, entry.compress_size, entry.file_size)
    for kind in _DESCRIPTORS:
        if end + kind.size <= len(data) and kind.unpack_from(data, end) == wanted:
            return end + kind.size
    raise ArchiveDamage(f"checksum and sizes after {entry.filename} must be {wanted[1:]}, got other bytes")


def _check_end(data: SeekableMap, begin: int, directory: int, num_members: int, is_torch: bool) -> None:
    """The records after the directory. zipfile reads some of their fields, and torch others."""
    end = len(data) - _END.size
    signature, *disks, on_disk, in_all, num_bytes, offset, comment = _END.unpack_from(data, end)
    has_zip64 = end >= _ZIP64_LOCATOR.size and data[end - _ZIP64_LOCATOR.size : end][:4] == b"PK\x06\x07"
    last = end - (_ZIP64_LOCATOR.size + _ZIP64_END.size if has_zip64 else 0)
    after = directory
    for _ in range(num_members):  # zipfile cuts the last entry where the directory ends
        after += _DIRECTORY_ENTRY_BYTES + sum(_DIRECTORY_LENGTHS.unpack_from(data, after + 28))
    _require(after == last, "the length of the directory", last - directory, after - directory)
    wanted = [num_members, num_members, last - directory, directory - begin]
    limits = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    found = [on_disk, in_all, num_bytes, offset]
    is_right = all(number in (right, limit) for number, right, limit in zip(found, wanted, limits, strict=True))
    _require(
        signature == b"PK\x05\x06" and disks == [0, 0] and is_right and not comment,
        "the end of the archive",
        wanted,
        found,
    )
    if not has_zip64:
        return
    _, disk, position, num_disks = _ZIP64_LOCATOR.unpack_from(data, end - _ZIP64_LOCATOR.size)
    zip64 = _ZIP64_END.unpack_from(data, last)
    _require(
        (disk, position, num_disks) == (0, last - begin, 1), "the locator of the directory", last - begin, position
    )
    versions = _TORCH_ZIP64_VERSIONS if is_torch else zip64[2:4]
    right = (b"PK\x06\x06", _ZIP64_END.size - 12, *versions, 0, 0, *wanted)
    _require(zip64 == right, "the record of the directory", right[1:], zip64[1:])
