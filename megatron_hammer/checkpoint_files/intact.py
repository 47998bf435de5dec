"""Whether the files of one iteration are those that were saved: first what can be told at once, then by reading them.

With hashes (torch_dist/content_hashes.py) every byte is covered. An iteration without them, as other trainers and older
versions of this package save it, is checked by the CRC32 that torch.save puts beside every tensor: that finds damage,
but not the file of another iteration. The legacy format has no hashes and is checked so too. No Megatron.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_hammer.checkpoint_files.legacy.rank_files import load_state
from megatron_hammer.checkpoint_files.open_checkpoint import is_legacy, open_checkpoint
from megatron_hammer.checkpoint_files.saved_archive import ArchiveDamage, open_archive
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import (
    FileHash,
    find_damage,
    find_wrong_files,
    read_hashes,
    select_share,
    select_small_files,
)
from megatron_hammer.checkpoint_files.torch_dist.reader import TorchDistReader
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError

_DESCRIPTIONS = ("metadata.json", ".metadata")  # of torch_dist; both are written after the shards
_NUM_THREADS = 8
_COPY_AGAIN = "The save was interrupted or the copy is incomplete; use another iteration or copy it again."


def has_hashes(directory: Path) -> bool:
    """Raises CheckpointError where they are damaged."""
    return read_hashes(directory) is not None


def find_visible_damage(directory: Path, *, has_hash_check: bool = True) -> list[str]:
    """What is wrong and can be told without reading the tensors: one sentence each.

    has_hash_check: False with --no-verify-checkpoint; sizes and descriptions must then still fit each other.
    """
    if is_legacy(directory):
        return []
    missing = [name for name in _DESCRIPTIONS if not (directory / name).is_file()]
    if missing:
        return [f"{directory / name}: must exist, got no such file. {_COPY_AGAIN}" for name in missing]
    hashes = None
    try:
        hashes = read_hashes(directory) if has_hash_check else None
        if hashes is not None:
            problems = find_wrong_files(directory, hashes) or find_damage(directory, select_small_files(hashes))
            if problems:
                return problems
        reader = open_checkpoint(directory)
        if hashes is None and isinstance(reader, TorchDistReader):
            reader.store.validate()  # of the optimizer's state too; with hashes, the sizes were compared above
    except CheckpointError as error:
        # What lies in a shard contradicts the rest. The hashes say which file it is.
        return find_damage(directory, hashes or {}, num_threads=_NUM_THREADS) or list(error.problems)
    return []


def find_hidden_damage(directory: Path, *, index: int = 0, num_shares: int = 1, num_threads: int = 1) -> list[str]:
    """What only reading shows, in share `index` of `num_shares` of the files; call find_visible_damage first."""
    hashes = None if is_legacy(directory) else read_hashes(directory)
    if hashes is not None:
        share = select_share(hashes, index=index, num_shares=num_shares)
        return find_damage(directory, share, num_threads=num_threads)
    paths = sorted(directory.glob("mp_rank_*/*.pt")) if is_legacy(directory) else sorted(directory.glob("*.distcp"))
    by_name = {str(path.relative_to(directory)): FileHash("", path.stat().st_size) for path in paths}
    share = select_share(by_name, index=index, num_shares=num_shares)
    if is_legacy(directory):
        with ThreadPoolExecutor(num_threads) as pool:
            found = pool.map(lambda name: list(_find_damaged_rank_file(directory / name)), sorted(share))
            return [problem for problems in found for problem in problems]
    return _find_damaged_archives(directory, share)


def _find_damaged_archives(directory: Path, share: Mapping[str, FileHash]) -> list[str]:
    try:
        store = TorchDistStore(directory)
    except CheckpointError as error:
        return list(error.problems)
    problems: list[str] = []
    for key, offsets, name in store.list_places():
        if name in share:
            try:
                store.check_content(key, offsets)
            except CheckpointError as error:
                problems += error.problems
    return problems


def _find_damaged_rank_file(path: Path) -> Iterator[str]:
    """The checksums of one file of the legacy format, and whether it names types that only code needs."""
    try:
        load_state(path, kind=object)
        archive = open_archive(path)
        if archive is not None:
            archive.check_all()
    except CheckpointError as error:
        yield from error.problems
    except (ArchiveDamage, OSError) as error:
        yield f"{path}: must have the bytes that were saved, got: {error}. The file is damaged; use another iteration."
