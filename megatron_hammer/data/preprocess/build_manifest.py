"""The description of a run of the preprocessor for its journal and manifests, and whether its outputs exist already."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.corpus.blocks import FileSlice
from megatron_hammer.corpus.input_files import InputFiles, find_input_files, show_path
from megatron_hammer.data.indexed.manifest import (
    Manifest,
    SourceFile,
    TokenizerIdentity,
    describe_source,
    hash_file,
    read_manifest,
    read_tool_version,
)
from megatron_hammer.data.indexed.pair import bin_path, idx_path
from megatron_hammer.data.preprocess.journal import InputState, Job
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.run import PreprocessRun
from megatron_hammer.data.preprocess.sentences import hash_sentence_model
from megatron_hammer.data.preprocess.sharding import select_slices
from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """files: all inputs, and what directories hold besides. slices: what this run reads of them, `paths` of which."""

    files: InputFiles
    slices: tuple[FileSlice, ...]
    paths: tuple[Path, ...]
    total_bytes: int


def select_sources(options: PreprocessOptions) -> Sources:
    """Find the inputs and this run's part of them; raises DataError as `find_input_files`."""
    files = find_input_files(options.inputs, options.build_output_test())
    slices = select_slices(files.files, options.shard)
    return Sources(
        files=files,
        slices=slices,
        paths=tuple(part.path for part in slices),
        total_bytes=sum(part.size_bytes for part in slices),
    )


def describe_job(options: PreprocessOptions, encoder: Encoder, sources: Sources) -> Job:
    """Return everything that shapes the bytes; raises DataError if the model of sentences is missing."""
    flags = describe_flags(options)
    return Job(
        # All keys together: they are read in one pass, so a run cannot be continued with other ones.
        flags={"json_keys": list(options.json_keys)} | flags,
        tokenizer_sha256=encoder.sha256,
        shard=options.shard,
        inputs=tuple(InputState.of(path) for path in sources.files.files),
        tool_version=read_tool_version(),
    )


def describe_flags(options: PreprocessOptions) -> dict[str, Any]:
    """Return the options that every manifest of the run records, and the hash of the model of sentences."""
    model = hash_sentence_model(options.language) if options.split_sentences else None
    return options.describe() | {"sentence_model_sha256": model}


def describe_outputs(
    options: PreprocessOptions,
    encoder: Encoder,
    sources: Sources,
    run: PreprocessRun,
    described_sources: Sequence[SourceFile],
    described_outputs: Sequence[SourceFile],
) -> list[Manifest]:
    """Return the manifest of each key; described_outputs: its .bin and its .idx."""
    flags = describe_flags(options)
    return [
        Manifest(
            sources=tuple(described_sources),
            ignored_files=tuple(map(show_path, sources.files.ignored)),
            tokenizer=identify_tokenizer(encoder),
            options={"json_key": key} | flags,
            shard=options.shard,
            dtype=writer.dtype.name,
            num_documents=writer.num_documents,
            num_sequences=writer.num_sequences,
            num_tokens=writer.num_tokens,
            text_bytes=run.text_bytes[k],
            num_empty_documents=run.num_empty_documents[k],
            problems=tuple(run.problems),
            bin_sha256=described_outputs[2 * k].sha256,
            idx_sha256=described_outputs[2 * k + 1].sha256,
            tool_version=read_tool_version(),
        )
        for k, (key, writer) in enumerate(zip(options.json_keys, run.writers, strict=True))
    ]


def find_complete_outputs(
    options: PreprocessOptions, encoder: Encoder, sources: Sources
) -> dict[Path, Manifest] | None:
    """Return the manifests if every output of exactly this job exists and is undamaged, else None.

    Inputs and outputs are hashed only if everything that is cheaper to compare is equal.
    """
    flags = describe_flags(options)
    manifests: dict[Path, Manifest] = {}
    for key in options.json_keys:
        prefix = options.prefix_of(key)
        try:
            manifest = read_manifest(prefix)
        except DataError:
            return None
        if manifest is None or not _is_for(manifest, {"json_key": key} | flags, options, encoder, sources):
            return None
        manifests[prefix] = manifest
    # After the manifests of all keys: hashing takes minutes, and a difference in one manifest decides at once.
    if any(not _is_whole(prefix, manifest) for prefix, manifest in manifests.items()):
        return None
    described = tuple(describe_source(path) for path in sources.paths)
    return manifests if all(manifest.sources == described for manifest in manifests.values()) else None


def identify_tokenizer(encoder: Encoder) -> TokenizerIdentity:
    return TokenizerIdentity(name=encoder.path.name, sha256=encoder.sha256, vocab_size=encoder.vocab_size)


def _is_for(
    manifest: Manifest, flags: dict[str, Any], options: PreprocessOptions, encoder: Encoder, sources: Sources
) -> bool:
    found_sources = [(source.path, source.size_bytes) for source in manifest.sources]
    return (
        manifest.options == flags
        and manifest.shard == options.shard
        and manifest.tokenizer == identify_tokenizer(encoder)
        and manifest.tool_version == read_tool_version()
        # An earlier run may have been allowed more errors than this one.
        and manifest.num_dropped_documents <= options.max_errors
        and found_sources == [(str(path), path.stat().st_size) for path in sources.paths]
        and manifest.ignored_files == tuple(map(show_path, sources.files.ignored))
    )


def _is_whole(prefix: Path, manifest: Manifest) -> bool:
    # A file may have been cut or overwritten after its manifest was written.
    hashes = {bin_path(prefix): manifest.bin_sha256, idx_path(prefix): manifest.idx_sha256}
    return all(path.is_file() and hash_file(path) == sha256 for path, sha256 in hashes.items())
