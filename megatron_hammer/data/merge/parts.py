"""Which pairs are to be merged, in which order, and whether they may be: same dtype, tokenizer, options, all shards."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.corpus.file_search import FileSearch, describe_unreachable, identify_file
from megatron_hammer.data.conversations.manifest import mask_prefix
from megatron_hammer.data.indexed.index_format import bin_path, idx_path
from megatron_hammer.data.indexed.manifest import Manifest, manifest_path, read_manifest, show_option
from megatron_hammer.data.indexed.pair import IndexSummary, read_index
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import partial_path
from megatron_hammer.files.read import cannot_read

PAIR_SUFFIXES = (".idx", ".bin")
COMPANION_SUFFIXES = (".bin", ".manifest.json")
# A job may have thousands of shards; ten show which part of them is missing.
MAX_SHARDS_SHOWN = 10
# Options that may differ between parts: they say where the documents come from, not how they were made into ids.
SOURCE_OPTIONS = ("json_key", "shuffle", "seed")
OPTION_REMEDY = "Preprocess it again with the options of the others."
OPTION_REMEDIES = {"json_key": "Merge the shards of each key by themselves, naming them with a pattern."}


@dataclass(frozen=True, slots=True)
class Part:
    """A pair to be merged; manifest is None if another tool wrote it."""

    prefix: Path
    index: IndexSummary
    manifest: Manifest | None


def find_part_prefixes(inputs: Sequence[str], output_prefix: Path) -> list[Path]:
    """Resolve prefixes, files of pairs, glob patterns of either, and directories (sorted, not searched deeper).

    Raises DataError listing every input that stands for no pair or for an unfinished one, every pair that is named
    twice, and the output if it is among the inputs.
    """
    prefixes: dict[object, Path] = {}
    problems = []
    output = _identify(output_prefix)
    for item in _drop_companions(inputs):
        found, item_problems = _resolve_input(item, output_prefix)
        problems += item_problems
        for prefix in found:
            identity = _identify(prefix)
            if identity in prefixes:
                problems.append(
                    f"{prefix}: part must be named once, got it as {prefixes[identity]} before. Drop one of them."
                )
            elif identity == output:
                problems.append(
                    f"{prefix}: output must not be one of its parts, got it as --output-prefix and from {item}. "
                    "Choose another --output-prefix, or remove an older output."
                )
            else:
                prefixes[identity] = prefix
    if problems:
        raise DataError(*problems)
    return list(prefixes.values())


def read_parts(prefixes: Sequence[Path]) -> list[Part]:
    """Read headers and manifests; raises DataError naming every part that cannot be read."""
    parts: list[Part] = []
    problems: list[str] = []
    for prefix in prefixes:
        if idx_path(mask_prefix(prefix)).exists():
            problems.append(
                f"{prefix}: part must not be conversations, got some, whose masks a merge would lose. Pass several "
                "prefixes to --data-path, or preprocess their inputs together."
            )
            continue
        try:
            parts.append(Part(prefix, read_index(prefix), read_manifest(prefix)))
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems += cannot_read(error.filename, error).problems
    if problems:
        raise DataError(*problems)
    return parts


def order_parts(parts: Sequence[Part]) -> list[Part]:
    """Return the shards of a job in their order, other parts as they come; raises DataError if they do not match."""
    problems = _find_index_problems(parts)
    with_manifest = [part for part in parts if part.manifest is not None]
    if with_manifest:
        problems += [
            f"{part.prefix}: part must have a manifest like {with_manifest[0].prefix}, got none. "
            f"Copy {manifest_path(part.prefix).name} beside it, or move the manifests of all parts away to merge them "
            "unchecked."
            for part in parts
            if part.manifest is None
        ]
        problems += _find_manifest_problems(with_manifest)
        # Shards of different jobs would only add messages that follow from the first ones.
        problems += [] if problems else _find_shard_problems(with_manifest)
    if problems:
        raise DataError(*problems)
    # Stable: parts that are not shards all have index 0 and stay in the order given.
    return sorted(parts, key=_shard_index)


def is_sharded(parts: Sequence[Part]) -> bool:
    return any(part.manifest is not None and part.manifest.shard is not None for part in parts)


def _shard_index(part: Part) -> int:
    return part.manifest.shard.index if part.manifest is not None and part.manifest.shard is not None else 0


# --- inputs ----------------------------------------------------------------------------------------------------------


def _identify(prefix: Path) -> object:
    """Return what a pair is known by, whatever the spelling and the links of its prefix."""
    real_path = Path(os.path.realpath(bin_path(prefix)))
    try:
        return identify_file(real_path)
    except OSError:  # there is none yet; where it is to be read, reading says so
        return real_path


def _drop_companions(inputs: Sequence[str]) -> list[str]:
    """Leave out the other files of a pair whose .idx is named too, as when a shell has expanded `parts/*`."""
    pairs = [item.removesuffix(".idx") for item in inputs if item.endswith(".idx")]
    companions = {f"{prefix}{suffix}" for prefix in pairs for suffix in COMPANION_SUFFIXES}
    return [item for item in inputs if item not in companions]


def _resolve_input(text: str, output_prefix: Path) -> tuple[list[Path], list[str]]:
    path = Path(text)
    # os.path, since pathlib raises where a folder on the way may not be entered: the search below says which one.
    if os.path.isdir(path):
        return _search_directory(path, output_prefix)
    # A prefix may contain a character such as [ itself. Where a pair of that name exists, it is no pattern.
    if glob.has_magic(text) and not os.path.exists(idx_path(_drop_suffix(text))):
        # The pattern may end with .idx or without it, as prefixes do.
        search = FileSearch()
        matches = [str(found.path) for pattern in (text, f"{text}.idx") for found in search.expand(pattern)]
        prefixes = sorted({_drop_suffix(match) for match in matches if match.endswith(PAIR_SUFFIXES)})
        if not prefixes and not search.problems:
            return [], [f"{text}: pattern must match an .idx, got none. Check the folder and the pattern."]
        return prefixes, list(dict.fromkeys(search.problems))
    return [_drop_suffix(text)], []


def _drop_suffix(text: str) -> Path:
    return Path(text[: -len(".idx")] if text.endswith(PAIR_SUFFIXES) else text)


def _search_directory(directory: Path, output_prefix: Path) -> tuple[list[Path], list[str]]:
    """Every pair in the folder; one that is not finished is a problem, unless an earlier merge left it."""
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        return [], [describe_unreachable(directory, error)]
    own_partial_path = partial_path(bin_path(output_prefix)).resolve()
    problems = []
    for name in sorted(names):
        path = directory / name
        if name.endswith(".bin.partial") and path.resolve() != own_partial_path:
            problems.append(
                f"{path}: part must be finished, got one that is being written or was interrupted. "
                "Finish it with the command that began it, or remove its partial files."
            )
        elif name.endswith(".bin") and f"{name[: -len('.bin')]}.idx" not in names:
            problems.append(f"{path}: part must have an .idx beside it, got none. Copy it, or move this file away.")
    prefixes = sorted(_drop_suffix(str(directory / name)) for name in names if name.endswith(".idx"))
    if not prefixes and not problems:
        problems.append(f"{directory}: directory must hold a .bin/.idx pair, got none. Check the path.")
    return prefixes, problems


# --- do the parts match? ---------------------------------------------------------------------------------------------


def _find_index_problems(parts: Sequence[Part]) -> list[str]:
    first = parts[0]
    problems = [
        f"{part.prefix}: dtype must be {first.index.dtype}, as of {first.prefix}, got {part.index.dtype}. "
        "It was made with a vocabulary of another size; preprocess it again with the tokenizer of the others."
        for part in parts
        if part.index.dtype != first.index.dtype
    ]
    return problems + [
        f"{part.prefix}: part must hold text alone, got an index with modes. Multimodal pairs cannot be merged here."
        for part in parts
        if part.index.has_modes
    ]


def _find_manifest_problems(parts: Sequence[Part]) -> list[str]:
    """Tokenizer and options of each part against those of the first, and its counts against its own pair."""
    first = _manifest_of(parts[0])
    problems: list[str] = []
    for part in parts:
        manifest = _manifest_of(part)
        if manifest.tokenizer.sha256 != first.tokenizer.sha256:
            problems.append(
                f"{part.prefix}: tokenizer must be that of {parts[0].prefix}, {_describe_tokenizer(first)}, got "
                f"{_describe_tokenizer(manifest)}. Preprocess it again with the tokenizer of the others."
            )
        problems += [
            f"{part.prefix}: option {name} must be {show_option(first.options.get(name))}, as of {parts[0].prefix}, "
            f"got {show_option(manifest.options.get(name))}. {OPTION_REMEDIES.get(name, OPTION_REMEDY)}"
            for name in sorted(first.options | manifest.options)
            if (manifest.shard is not None or name not in SOURCE_OPTIONS)
            and first.options.get(name) != manifest.options.get(name)
        ]
        for name in ("num_documents", "num_sequences", "num_tokens"):
            stated, actual = getattr(manifest, name), getattr(part.index, name)
            if stated is not None and stated != actual:
                problems.append(
                    f"{manifest_path(part.prefix)}: {name} must be that of the pair, got {stated} where the pair has "
                    f"{actual}. It is the manifest of another pair; copy all three files again."
                )
    return problems


def _find_shard_problems(parts: Sequence[Part]) -> list[str]:
    """Parts 0 to n - 1 of n must all be there, once, and must have read the same files."""
    sharded = [part for part in parts if _manifest_of(part).shard is not None]
    if not sharded:
        return []
    problems = [
        f"{part.prefix}: part must be a shard like {sharded[0].prefix}, got a whole job. Merge the shards first."
        for part in parts
        if _manifest_of(part).shard is None
    ]
    count = _shard_of(sharded[0])[1]
    seen: dict[int, Part] = {}
    for part in sharded:
        index, own_count = _shard_of(part)
        if own_count != count:
            problems.append(
                f"{part.prefix}: shard must be one of {count}, as {sharded[0].prefix} is, got {index}/{own_count}. "
                "Merge the shards of one job at a time."
            )
        elif index in seen:
            problems.append(
                f"{part.prefix}: shard {index}/{count} must come once, got {seen[index].prefix} too. Drop one of them."
            )
        else:
            seen[index] = part
    missing = [str(index) for index in range(count) if index not in seen]
    # Where a part is refused above, its shard would be named as missing too.
    if missing and not problems:
        more = f" and {len(missing) - MAX_SHARDS_SHOWN} more" if len(missing) > MAX_SHARDS_SHOWN else ""
        problems.append(
            f"input: shards 0 to {count - 1} of {count} must all be there, got no "
            f"{', '.join(missing[:MAX_SHARDS_SHOWN])}{more}. Preprocess them with --shard, or add them to --input."
        )
    return problems + _find_source_problems(sharded)


def _find_source_problems(parts: Sequence[Part]) -> list[str]:
    """A file that two shards read from must be the same for both."""
    seen: dict[str, tuple[Part, str]] = {}
    problems = []
    for part in parts:
        for source in _manifest_of(part).sources:
            other, sha256 = seen.setdefault(source.path, (part, source.sha256))
            if sha256 != source.sha256:
                problems.append(
                    f"{part.prefix}: source {source.path} must be the one that {other.prefix} read, got SHA-256 "
                    f"{source.sha256[:12]} where that is {sha256[:12]}. It changed in between; preprocess both again."
                )
    return problems


def _manifest_of(part: Part) -> Manifest:
    assert part.manifest is not None
    return part.manifest


def _shard_of(part: Part) -> tuple[int, int]:
    shard = _manifest_of(part).shard
    assert shard is not None
    return shard.index, shard.count


def _describe_tokenizer(manifest: Manifest) -> str:
    return f"{manifest.tokenizer.name} ({manifest.tokenizer.sha256[:12]})"
