"""Whether the data sets are whole, big enough, and made with the tokenizer and the vocabulary of the model."""

import os
from collections.abc import Iterable

import numpy as np

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.preflight.conversations import (
    find_conversation_problems,
    find_epoch_problems,
    find_mask_problems,
)
from megatron_hammer.config.preflight.data_cache import find_cache_problems
from megatron_hammer.config.preflight.data_sizes import find_size_problems
from megatron_hammer.config.preflight.paths import find_unwritable
from megatron_hammer.config.run_plan import Data, Evaluation, RunPlan, RunSettings
from megatron_hammer.corpus.file_search import identify_file
from megatron_hammer.data.indexed.manifest import Manifest, read_manifest
from megatron_hammer.data.indexed.pair import IndexSummary, bin_path, read_index
from megatron_hammer.data.sources import SPLIT_FLAGS, DataPlan
from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder

# Of a large .bin, spread over it, when looking for ids beyond the vocabulary.
NUM_SAMPLED_CHUNKS = 4
MAX_WHOLE_TOKENS = 1 << 24  # up to here all tokens are read
SAMPLED_CHUNK_TOKENS = 1 << 20


def find_data_problems(settings: RunSettings, plan: RunPlan | None) -> list[str]:
    """Everything about data sets and tokenizer that can be known without training; reads headers and samples.

    What reads more than headers is left to one process of each node.
    """
    data = settings.data
    if not data.flags and settings.machine.is_planned:
        return []  # a cluster can be planned before there is a corpus; the report says that none is named
    problems = list(data.problems)
    if "multiple_validation_sets" in settings.flags.typed:
        problems += _find_validation_set_problems(settings.evaluation, data.sources)
    else:
        problems += _find_whole_pass_problems(settings.evaluation, data.sources)
    if data.cache_dir is not None:
        problems += find_unwritable("data_cache_path", data.cache_dir)
    problems += _find_test_set_problems(settings.evaluation, data.sources)
    encoder, tokenizer_problems = _read_tokenizer(data)
    problems += tokenizer_problems
    problems += find_vocabulary_problems(settings, encoder)
    indices, index_problems = read_indices(data.sources)
    problems += index_problems
    problems += _find_other_spellings(indices)
    problems += _find_manifest_problems(settings, indices, encoder)
    problems += find_epoch_problems(settings.sft) if settings.sft else find_mask_problems(list(indices))
    if settings.machine.local_rank == 0:
        for prefix, index in indices.items():
            problems += _find_content_problems(settings.vocab_size, prefix, index)
        if settings.sft is not None:
            problems += [] if index_problems else find_conversation_problems(settings, plan, list(indices))
        elif settings.seq_length is not None and not data.problems and not index_problems:
            problems += find_size_problems(settings, plan, indices, settings.seq_length)
            is_needed = bool(settings.flags.values.get("dataloader_fast_cache_load"))
            problems += find_cache_problems(data, indices, settings.seq_length, is_needed=is_needed)
    return problems


def read_indices(sources: DataPlan) -> tuple[dict[str, IndexSummary], list[str]]:
    """Every prefix of the plan with what it holds, and a problem for each that cannot be read."""
    prefixes = [source.prefix for name in SPLIT_FLAGS for source in sources.sources_of(name)]
    prefixes += [source.prefix for source in sources.shared]
    indices: dict[str, IndexSummary] = {}
    problems: list[str] = []
    # Each prefix once: a shared prefix is a source of every split.
    for prefix in dict.fromkeys(prefixes):
        try:
            indices[prefix] = read_index(prefix)
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{prefix}: data set cannot be read ({error.strerror}). Check its permissions.")
    return indices, problems


def _find_other_spellings(prefixes: Iterable[str]) -> list[str]:
    """A pair has one name in a run: sample caches, weights and the record of the order go by it."""
    names: dict[object, str] = {}
    problems = []
    for prefix in prefixes:
        known = names.setdefault(identify_file(bin_path(prefix)), prefix)
        if known != prefix:
            problems.append(
                f"data-path: a data set must be named by one spelling, got it as {known} and {prefix}. Use one of them "
                "for both, or drop one."
            )
    return problems


# --- tokenizer and vocabulary ---------------------------------------------------------------------------------------


def _read_tokenizer(data: Data) -> tuple[Encoder | None, list[str]]:
    if data.tokenizer_model is None:
        type_problems = _find_tokenizer_type_problems(data)
        if type_problems:
            return None, type_problems
        return None, [
            f"{flag_of(name)}: needs a tokenizer that knows which token ends a document, got "
            "tokenizer_model=None. Pass --tokenizer-model."
            for name in data.flags_of_document_ends
        ]
    try:
        return load_encoder(data.tokenizer_model), []
    except DataError as error:
        return None, [f"tokenizer-model: {problem}" for problem in error.problems]
    except OSError as error:
        path = data.tokenizer_model
        return None, [f"tokenizer-model: must be a file that can be read, got {path} ({error.strerror}). Check it."]


def _find_tokenizer_type_problems(data: Data) -> list[str]:
    """A type without its files, which Megatron looks for only once all ranks are up."""
    bpe_files = (data.vocab_file, data.merge_file)
    has_bpe_files = all(path is not None and os.path.isfile(path) for path in bpe_files)
    if data.tokenizer_type == "NullTokenizer" or (data.tokenizer_type == "GPT2BPETokenizer" and has_bpe_files):
        return []
    return [
        f"tokenizer-type: needs a tokenizer file that exists, got tokenizer_type={data.tokenizer_type}, "
        f"tokenizer_model=None, vocab_file={data.vocab_file}, merge_file={data.merge_file}. "
        "Pass --tokenizer-model, or drop --tokenizer-type."
    ]


def find_vocabulary_problems(settings: RunSettings, encoder: Encoder | None) -> list[str]:
    """The model's vocabulary is the tokenizer's; it may be larger where --vocab-size says so."""
    vocab_size = settings.vocab_size
    if encoder is None or vocab_size is None or vocab_size == encoder.vocab_size:
        return []
    # Published models often have spare rows after the tokenizer's last token, which no text uses.
    if settings.is_vocabulary_chosen and vocab_size > encoder.vocab_size:
        return []
    if settings.initial_model is not None:
        return [
            f"tokenizer-model: must have no more tokens than the model in {settings.initial_model.folder}, got "
            f"{encoder.vocab_size} in {encoder.path}, vocab_size={vocab_size}. Pass the model's own tokenizer, or add "
            "rows to the model with hammer resize-embeddings."
        ]
    return [
        f"vocab-size: must be the tokenizer's, got vocab_size={vocab_size}, tokenizer={encoder.vocab_size} "
        f"({encoder.path}). Pass --vocab-size {encoder.vocab_size}."
    ]


def _find_content_problems(vocab_size: int | None, prefix: str, index: IndexSummary) -> list[str]:
    # An .idx may declare floating-point values, which cannot be token ids.
    if not np.issubdtype(index.dtype, np.integer):
        return [f"{prefix}.idx: tokens must be integers, got dtype={index.dtype}. Preprocess the corpus again."]
    if vocab_size is None or index.num_tokens == 0:
        return []
    largest, smallest = _sample_extreme_ids(index)
    if smallest >= 0 and largest < vocab_size:
        return []
    wrong = smallest if smallest < 0 else largest
    return [
        f"{prefix}.bin: token ids must be below vocab_size, got id={wrong}, vocab_size={vocab_size}. "
        "Pass the --vocab-size and --tokenizer-model that the corpus was preprocessed with, or preprocess it again."
    ]


def _sample_extreme_ids(index: IndexSummary) -> tuple[int, int]:
    """Largest and smallest id, of all tokens or of chunks spread evenly over a large file (its end included)."""
    size = index.num_tokens if index.num_tokens <= MAX_WHOLE_TOKENS else SAMPLED_CHUNK_TOKENS
    last_start = index.num_tokens - size
    # A set, since a small file has the same start, 0, four times.
    starts = {last_start * step // (NUM_SAMPLED_CHUNKS - 1) for step in range(NUM_SAMPLED_CHUNKS)}
    chunks = [index.tokens[start : start + size] for start in sorted(starts)]
    return max(int(chunk.max()) for chunk in chunks), min(int(chunk.min()) for chunk in chunks)


def _find_manifest_problems(
    settings: RunSettings, indices: dict[str, IndexSummary], encoder: Encoder | None
) -> list[str]:
    """What the manifest beside each data set says about its tokenizer, against the run's and the model's."""
    problems: list[str] = []
    manifests: dict[str, Manifest] = {}
    for prefix, index in indices.items():
        try:
            manifest = read_manifest(prefix)
        except DataError as error:
            problems += error.problems
            continue
        if manifest is None:
            continue
        manifests[prefix] = manifest
        if manifest.num_tokens != index.num_tokens:
            problems.append(
                f"{prefix}.manifest.json: must describe the data set beside it, got num_tokens={manifest.num_tokens}, "
                f"in the .idx {index.num_tokens}. Preprocess the corpus again."
            )
        problems += _find_tokenizer_mismatch(settings, prefix, manifest, encoder)
    # With a tokenizer, each data set has been compared with it above; without one, the data sets are compared together.
    by_hash = {manifest.tokenizer.sha256: prefix for prefix, manifest in manifests.items()}
    if encoder is None and len(by_hash) > 1:
        names = ", ".join(f"{prefix} ({manifests[prefix].tokenizer.name})" for prefix in by_hash.values())
        problems.append(
            f"data-path: all data sets must be made with one tokenizer, got {names}. Preprocess them with the same one."
        )
    return problems


def _find_tokenizer_mismatch(
    settings: RunSettings, prefix: str, manifest: Manifest, encoder: Encoder | None
) -> list[str]:
    made_with = manifest.tokenizer
    if encoder is not None:
        if made_with.sha256 == encoder.sha256:
            return []
        return [
            f"{prefix}: must be made with the run's tokenizer, got {made_with.name} (sha256 {made_with.sha256[:12]}), "
            f"tokenizer_model={encoder.path} (sha256 {encoder.sha256[:12]}). "
            "Pass the tokenizer that the corpus was preprocessed with, or preprocess it again."
        ]
    vocab_size = settings.vocab_size
    # A model may have more rows than the tokenizer has tokens, such as config.json's padded vocab_size; not fewer.
    is_larger_on_purpose = settings.is_vocabulary_chosen and vocab_size and vocab_size > made_with.vocab_size
    if vocab_size in (None, made_with.vocab_size) or is_larger_on_purpose:
        return []
    if settings.initial_model is not None:
        return [
            f"{prefix}: must be made with a tokenizer that fits the model in {settings.initial_model.folder}, got "
            f"{made_with.vocab_size} tokens ({made_with.name}), vocab_size={vocab_size}. "
            "Preprocess the corpus with the model's own tokenizer."
        ]
    return [
        f"vocab-size: must be that of the data's tokenizer, got vocab_size={vocab_size}, in {prefix}.manifest.json "
        f"{made_with.vocab_size} ({made_with.name}). Pass --vocab-size {made_with.vocab_size}."
    ]


# --- several validation sets ----------------------------------------------------------------------------------------


def _find_validation_set_problems(evaluation: Evaluation, data_sets: DataPlan) -> list[str]:
    sources = data_sets.own.get("valid", ()) if data_sets.own is not None else ()
    if not sources:
        return [
            "multiple-validation-sets: needs data sets of their own, got none. Pass --train-data-path and "
            "--valid-data-path with a prefix for each."
        ]
    names = evaluation.set_names
    problems = []
    # Weights blend sets into one, and here each set keeps a loss of its own.
    if any(source.weight is not None for source in sources):
        problems.append(
            "valid-data-path: several validation sets are evaluated one by one, got weights. Pass prefixes alone."
        )
    if names and len(names) != len(sources):
        problems.append(
            f"validation-set-names: must be one for each validation set, got {len(names)} names, {len(sources)} sets. "
            "Pass as many names as prefixes."
        )
    if not evaluation.is_whole:
        problems.append(
            "full-validation: must be on with several validation sets, got full_validation=off. Pass --full-validation."
        )
    return problems


def _find_test_set_problems(evaluation: Evaluation, data_sets: DataPlan) -> list[str]:
    """megatron-core evaluates it after the last step, as one more of the validation sets, which fails."""
    if not evaluation.is_whole or not data_sets.sources_of("test"):
        return []
    remedy = "Drop --test-data-path" if data_sets.own is not None else "Give it no share, as in --split 98,2,0"
    return [
        "full-validation: megatron-core cannot evaluate a test set beside whole validation sets, got both. "
        f"{remedy}, or drop --full-validation."
    ]


def _find_whole_pass_problems(evaluation: Evaluation, data_sets: DataPlan) -> list[str]:
    """megatron-core cannot weigh what it reads whole: its dataset builder raises after the run has started."""
    sources = data_sets.sources_of("valid")
    is_alone = data_sets.own is not None and len(sources) == 1
    if not evaluation.is_whole or is_alone or all(source.weight is None for source in sources):
        return []
    return [
        "full-validation: reads each validation set once, got weights. Pass the prefixes without weights, or drop "
        "--full-validation."
    ]
