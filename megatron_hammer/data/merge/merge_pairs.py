"""Join pairs into one, in constant memory: what Megatron-LM's merge_datasets.py gives, with the parts checked first.

The shards of a job, in any order, give the .bin, .idx and manifest of the job run as a whole; other
parts are joined in the order in which they come. A part that has a manifest is compared with the hashes in it while it
is read.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_hammer.data.indexed.documents import Documents, read_pair_documents
from megatron_hammer.data.indexed.index_format import (
    DOCUMENT_BYTES,
    LENGTH_BYTES,
    bin_path,
    count_index_bytes,
    idx_path,
)
from megatron_hammer.data.indexed.manifest import Manifest, SourceFile, encode_manifest, hash_file, manifest_path
from megatron_hammer.data.indexed.pair_writer import IndexedWriter, remove_partial_files
from megatron_hammer.data.indexed.shuffle import (
    CHUNKS_IN_MEMORY,
    DOCUMENT_RECORD,
    count_buckets,
    select_memory_bytes,
    shuffle_documents,
)
from megatron_hammer.data.merge.parts import SOURCE_OPTIONS, Part, find_part_prefixes, order_parts, read_parts
from megatron_hammer.data.preprocess.journal import lock_outputs
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import cannot_write, partial_path, publish_file

# Large enough for sequential reads at full speed, and small beside the memory of a shuffle.
COPY_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedPair:
    """The result: parts in their order; warnings: one sentence each; manifest is None if no part has one."""

    prefix: Path
    parts: tuple[Path, ...]
    dtype: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    manifest: Manifest | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields, ready for a JSON encoder."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "prefix": str(self.prefix),
            "parts": [str(part) for part in self.parts],
            "manifest": None if self.manifest is None else self.manifest.to_json(),
        }


def merge_pairs(
    inputs: Sequence[str],
    output_prefix: Path,
    *,
    seed: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> MergedPair:
    """Join the pairs that the inputs stand for into `output_prefix`, and write a manifest if the parts have some.

    seed: shuffle the documents of all parts with it; None keeps their order. on_progress: gets the bytes moved so far,
    of all that will be. Raises DataError, and leaves nothing, if parts are missing, damaged or do not match, if the
    disk is too small, or if another process is writing the same output.
    """
    parts = order_parts(read_parts(find_part_prefixes(inputs, output_prefix)))
    refuse_small_disk(parts, output_prefix, is_shuffled=seed is not None)
    dtype = parts[0].index.dtype
    total_bytes = sum(part.index.num_tokens for part in parts) * dtype.itemsize * (1 if seed is None else 2)
    done_bytes = 0

    def count(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        on_progress(done_bytes, total_bytes)

    with ExitStack() as stack:
        # Two merges with the same output would write into the same partial files.
        stack.enter_context(lock_outputs(Path(f"{output_prefix}.lock")))
        stack.callback(remove_partial_files, output_prefix)  # Ctrl-C may come before the writer's `with` block begins
        writer = stack.enter_context(IndexedWriter(output_prefix, dtype))
        if seed is None:
            _copy(parts, writer, count)
        else:
            _shuffle(parts, writer, seed, count)
        writer.finish()
        # `order_parts` refuses parts of which only some have a manifest, so the first stands for all.
        manifest = None if parts[0].manifest is None else _describe(parts, writer, seed)
        _publish(writer, manifest)
    return MergedPair(
        prefix=output_prefix,
        parts=tuple(part.prefix for part in parts),
        dtype=dtype.name,
        num_documents=writer.num_documents,
        num_sequences=writer.num_sequences,
        num_tokens=writer.num_tokens,
        manifest=manifest,
        warnings=tuple(_find_warnings(parts)),
    )


def refuse_small_disk(parts: Sequence[Part], output_prefix: Path, *, is_shuffled: bool) -> None:
    """Raise DataError if the result, and what is needed on the way, does not fit where it is to be written."""
    num_sequences = sum(part.index.num_sequences for part in parts)
    num_documents = sum(part.index.num_documents for part in parts)
    needed_bytes = sum(part.index.num_tokens * part.index.dtype.itemsize for part in parts)
    needed_bytes += count_index_bytes(num_sequences, num_documents)
    needed_bytes += num_sequences * LENGTH_BYTES + num_documents * DOCUMENT_BYTES  # the index, while it is collected
    if is_shuffled:  # a bucket is removed once it is written, so the ids are there once, and one bucket twice
        needed_bytes += num_sequences * LENGTH_BYTES + num_documents * DOCUMENT_RECORD.itemsize
        needed_bytes += select_memory_bytes([part.index for part in parts])
    folder = output_prefix.absolute().parent
    # The output folder is made later; its disk is that of the nearest folder that exists.
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DataError(
            f"{output_prefix}: folder must have {needed_bytes} bytes free, got {free_bytes}. "
            "Free space, or choose another --output-prefix."
        )


def _copy(parts: Sequence[Part], writer: IndexedWriter, count: Callable[[int], None]) -> None:
    for documents in _read_checked(parts, COPY_CHUNK_BYTES):
        writer.add_documents(documents.ids, documents.sequence_lengths, documents.sequences_per_document)
        count(documents.ids.nbytes)


def _shuffle(parts: Sequence[Part], writer: IndexedWriter, seed: int, count: Callable[[int], None]) -> None:
    indices = [part.index for part in parts]
    memory_bytes = select_memory_bytes(indices)
    shuffle_documents(
        _read_checked(parts, memory_bytes // CHUNKS_IN_MEMORY),
        writer,
        seed=seed,
        num_buckets=count_buckets(indices, memory_bytes),
        work_dir=partial_path(f"{writer.prefix}.buckets"),
        max_memory_bytes=memory_bytes,
        on_moved=count,
    )


def _read_checked(parts: Sequence[Part], chunk_bytes: int) -> Iterator[Documents]:
    """Yield the documents of all parts in order; raises DataError where a part's hashes are not its manifest's."""
    for part in parts:
        bin_sha256 = None if part.manifest is None else part.manifest.bin_sha256
        idx_sha256 = None if part.manifest is None else part.manifest.idx_sha256
        digest = hashlib.sha256()
        try:
            if idx_sha256 is not None:
                # Before the documents are read, which trust the index.
                _refuse_damaged(part.index.idx_path, idx_sha256, hash_file(part.index.idx_path))
            for documents in read_pair_documents(part.index, chunk_bytes=chunk_bytes):
                if bin_sha256 is not None:
                    # Chunks are read from front to end without gaps, so their hash is the hash of the file.
                    digest.update(documents.ids.data)
                yield documents
        except OSError as error:
            raise DataError(
                f"{part.prefix}: part cannot be read ({error.strerror}). Check the disk and the permissions."
            ) from error
        if bin_sha256 is not None:
            _refuse_damaged(part.index.bin_path, bin_sha256, digest.hexdigest())


def _refuse_damaged(path: Path, expected: str, actual: str) -> None:
    if expected != actual:
        raise DataError(
            f"{path}: content must have the SHA-256 {expected[:12]}..., as in the manifest, got {actual[:12]}.... "
            "It is damaged or of another pair; preprocess or copy it again."
        )


# --- manifest --------------------------------------------------------------------------------------------------------


def _describe(parts: Sequence[Part], writer: IndexedWriter, seed: int | None) -> Manifest:
    """Hash the finished pair, and return the manifest of the same job run as a whole."""
    return dataclasses.replace(
        merge_manifests([part.manifest for part in parts if part.manifest is not None], seed),
        num_documents=writer.num_documents,
        num_sequences=writer.num_sequences,
        num_tokens=writer.num_tokens,
        bin_sha256=hash_file(partial_path(bin_path(writer.prefix))),
        idx_sha256=hash_file(partial_path(idx_path(writer.prefix))),
    )


def merge_manifests(manifests: Sequence[Manifest], seed: int | None = None) -> Manifest:
    """Return what all say together, in order; counts and hashes of the pair itself are left to the caller.

    Options that may differ between parts become the list of their values where they do.
    """
    first = manifests[0]
    options = dict(first.options)
    for name in SOURCE_OPTIONS:
        values = [manifest.options.get(name) for manifest in manifests]
        # By their JSON: values may be lists, which no dictionary takes as keys.
        distinct = list({orjson.dumps(value): value for value in values}.values())
        if len(distinct) > 1:
            options[name] = distinct
    if seed is not None:
        options |= {"shuffle": True, "seed": seed}
    elif len(manifests) > 1 and any(manifest.options.get("shuffle") for manifest in manifests):
        # Shuffled parts joined in order are not one shuffled whole, and the manifest must not say so.
        options["shuffle"] = "within each part"
    return dataclasses.replace(
        first,
        sources=_merge_sources(manifests),
        ignored_files=tuple(dict.fromkeys(name for manifest in manifests for name in manifest.ignored_files)),
        options=options,
        shard=None,
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
        num_empty_documents=sum(manifest.num_empty_documents for manifest in manifests),
        problems=tuple(problem for manifest in manifests for problem in manifest.problems),
        tool_version=", ".join(dict.fromkeys(manifest.tool_version for manifest in manifests)),
    )


def _merge_sources(manifests: Sequence[Manifest]) -> tuple[SourceFile, ...]:
    """Every source in order; a file that is cut between shards is listed by each of them, and named once here."""
    sources = [source for manifest in manifests for source in manifest.sources]
    return tuple(sources if manifests[0].shard is None else dict.fromkeys(sources))


def _find_warnings(parts: Sequence[Part]) -> list[str]:
    manifests = [part.manifest for part in parts if part.manifest is not None]
    if not manifests:
        return ["parts: no part has a manifest, so whether all were made with the same tokenizer could not be checked."]
    warnings = []
    versions = sorted({manifest.tool_version for manifest in manifests})
    if len(versions) > 1:
        warnings.append(f"parts: were made with different versions of megatron_hammer: {', '.join(versions)}.")
    seen: dict[str, Path] = {}
    for part, manifest in zip(parts, manifests, strict=True):
        # Two parts without tokens have the same hash, and are no duplicates.
        if manifest.bin_sha256 is None or manifest.num_tokens == 0:
            continue
        other = seen.setdefault(manifest.bin_sha256, part.prefix)
        if other != part.prefix:
            warnings.append(f"{part.prefix}: holds the same ids as {other}, so its documents are now there twice.")
    return warnings


def _publish(writer: IndexedWriter, manifest: Manifest | None) -> None:
    """Give the files their names: the old .idx goes first and the new one comes last, the manifest in between.

    A crash at any point leaves no pair that opens with the manifest of another.
    """
    own_manifest_path = manifest_path(writer.prefix)
    try:
        if manifest is None:
            idx_path(writer.prefix).unlink(missing_ok=True)
            own_manifest_path.unlink(missing_ok=True)
        else:
            with publish_file(own_manifest_path) as file:
                file.write(encode_manifest(manifest))
                idx_path(writer.prefix).unlink(missing_ok=True)
        writer.publish()
    except OSError as error:
        raise cannot_write(writer.prefix, error) from error
    except BaseException:
        # Without an .idx the manifest describes a pair that cannot be opened.
        if manifest is not None and not idx_path(writer.prefix).exists():
            with suppress(OSError):
                own_manifest_path.unlink(missing_ok=True)
        raise
