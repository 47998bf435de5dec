"""Whether the data sets are whole, big enough, and made with the tokenizer and the vocabulary of the model."""

import argparse
from pathlib import Path

import numpy as np

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.data_sources import SPLIT_FLAGS, DataPlan, read_data_plan
from megatron_hammer.config.preflight_checkpoint import find_unwritable
from megatron_hammer.config.preflight_layout import select_global_batch_size
from megatron_hammer.data.indexed import SCAN_CHUNK_TOKENS, IndexSummary, read_index
from megatron_hammer.data.manifest import Manifest, read_manifest
from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoder import Encoder, load_encoder

# Of a large .bin, spread over it, when looking for ids beyond the vocabulary.
NUM_SAMPLED_CHUNKS = 4
SAMPLED_CHUNK_TOKENS = 1 << 20


def find_data_problems(arguments: ParsedArguments) -> list[str]:
    """Everything about data sets and tokenizer that can be known without training; reads headers and samples.

    What reads more than headers is left to one process a node.
    """
    namespace = arguments.namespace
    plan, plan_problems = read_data_plan(namespace)
    problems = list(plan_problems)
    problems += _find_validation_set_problems(namespace, plan)
    if namespace.data_cache_path is not None:
        problems += find_unwritable("data_cache_path", namespace.data_cache_path)
    encoder, tokenizer_problems = _read_tokenizer(namespace)
    problems += tokenizer_problems
    problems += find_vocabulary_problems(arguments, encoder)
    indices, index_problems = read_indices(plan)
    problems += index_problems
    problems += _find_manifest_problems(arguments, indices, encoder)
    if namespace.local_rank == 0:
        for prefix, index in indices.items():
            problems += _find_content_problems(namespace, prefix, index)
        if namespace.seq_length is not None and not plan_problems and not index_problems:
            problems += _find_size_problems(namespace, plan, indices)
    return problems


def read_indices(plan: DataPlan) -> tuple[dict[str, IndexSummary], list[str]]:
    """Every prefix of the plan with what it holds, and a problem for each that cannot be read."""
    prefixes = [source.prefix for name in SPLIT_FLAGS for source in plan.sources_of(name)]
    prefixes += [source.prefix for source in plan.shared]
    indices: dict[str, IndexSummary] = {}
    problems: list[str] = []
    for prefix in dict.fromkeys(prefixes):
        try:
            indices[prefix] = read_index(prefix)
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{prefix}: data set cannot be read ({error.strerror}). Check its permissions.")
    return indices, problems


def count_split_tokens(index: IndexSummary, bounds: tuple[float, float]) -> int:
    """Tokens of the sequences between two shares of a data set, cut where megatron-core cuts it.

    Source: BlendedMegatronDatasetBuilder._build_megatron_dataset_splits (round of share x number of sequences).
    """
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    if (first, last) == (0, index.num_sequences):
        return index.num_tokens
    return int(np.sum(index.sequence_lengths[first:last], dtype=np.int64))


# --- tokenizer and vocabulary ---------------------------------------------------------------------------------------


def _read_tokenizer(namespace: argparse.Namespace) -> tuple[Encoder | None, list[str]]:
    if namespace.tokenizer_model is None:
        needs_eod = [
            name for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask") if namespace.__dict__[name]
        ]
        return None, [
            f"{name.replace('_', '-')}: needs a tokenizer that knows which token ends a document, got "
            "tokenizer_model=None. Pass --tokenizer-model."
            for name in needs_eod
        ]
    try:
        return load_encoder(namespace.tokenizer_model), []
    except DataError as error:
        return None, [f"tokenizer-model: {problem}" for problem in error.problems]


def find_vocabulary_problems(arguments: ParsedArguments, encoder: Encoder | None) -> list[str]:
    """The model's vocabulary is the tokenizer's; it may be larger where --vocab-size says so."""
    vocab_size = arguments.namespace.vocab_size
    if encoder is None or vocab_size is None or vocab_size == encoder.vocab_size:
        return []
    if "vocab_size" in arguments.typed and vocab_size > encoder.vocab_size:
        return []
    return [
        f"vocab-size: must be the tokenizer's, got vocab_size={vocab_size}, tokenizer={encoder.vocab_size} "
        f"({encoder.path}). Pass --vocab-size {encoder.vocab_size}."
    ]


def _find_content_problems(namespace: argparse.Namespace, prefix: str, index: IndexSummary) -> list[str]:
    if not np.issubdtype(index.dtype, np.integer):
        return [f"{prefix}.idx: tokens must be integers, got dtype={index.dtype}. Preprocess the corpus again."]
    if namespace.vocab_size is None or index.num_tokens == 0:
        return []
    largest, smallest = _sample_extreme_ids(index)
    if smallest >= 0 and largest < namespace.vocab_size:
        return []
    wrong = smallest if smallest < 0 else largest
    return [
        f"{prefix}.bin: token ids must be below vocab_size, got id={wrong}, vocab_size={namespace.vocab_size}. "
        "Pass the --vocab-size and --tokenizer-model that the corpus was preprocessed with, or preprocess it again."
    ]


def _sample_extreme_ids(index: IndexSummary) -> tuple[int, int]:
    """Largest and smallest id, of all tokens or of chunks spread evenly over a large file (its end included)."""
    size = index.num_tokens if index.num_tokens <= SCAN_CHUNK_TOKENS else SAMPLED_CHUNK_TOKENS
    last_start = index.num_tokens - size
    starts = {last_start * step // (NUM_SAMPLED_CHUNKS - 1) for step in range(NUM_SAMPLED_CHUNKS)}
    chunks = [index.tokens[start : start + size] for start in sorted(starts)]
    return max(int(chunk.max()) for chunk in chunks), min(int(chunk.min()) for chunk in chunks)


def _find_manifest_problems(
    arguments: ParsedArguments, indices: dict[str, IndexSummary], encoder: Encoder | None
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
        problems += _find_tokenizer_mismatch(arguments, prefix, manifest, encoder)
    by_hash = {manifest.tokenizer.sha256: prefix for prefix, manifest in manifests.items()}
    if encoder is None and len(by_hash) > 1:
        names = ", ".join(f"{prefix} ({manifests[prefix].tokenizer.name})" for prefix in by_hash.values())
        problems.append(
            f"data-path: all data sets must be made with one tokenizer, got {names}. Preprocess them with the same one."
        )
    return problems


def _find_tokenizer_mismatch(
    arguments: ParsedArguments, prefix: str, manifest: Manifest, encoder: Encoder | None
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
    vocab_size = arguments.namespace.vocab_size
    is_larger_on_purpose = "vocab_size" in arguments.typed and vocab_size and vocab_size > made_with.vocab_size
    if vocab_size in (None, made_with.vocab_size) or is_larger_on_purpose:
        return []
    return [
        f"vocab-size: must be that of the data's tokenizer, got vocab_size={vocab_size}, in {prefix}.manifest.json "
        f"{made_with.vocab_size} ({made_with.name}). Pass --vocab-size {made_with.vocab_size}."
    ]


# --- sizes ----------------------------------------------------------------------------------------------------------


def _find_validation_set_problems(namespace: argparse.Namespace, plan: DataPlan) -> list[str]:
    if not namespace.multiple_validation_sets:
        return []
    sources = plan.own.get("valid", ()) if plan.own is not None else ()
    if not sources:
        return [
            "multiple-validation-sets: needs data sets of their own, got none. Pass --train-data-path and "
            "--valid-data-path with a prefix for each."
        ]
    names = namespace.validation_set_names
    problems = []
    if any(source.weight is not None for source in sources):
        problems.append(
            "valid-data-path: several validation sets are evaluated one by one, got weights. Pass prefixes alone."
        )
    if names and len(names) != len(sources):
        problems.append(
            f"validation-set-names: must be one for each validation set, got {len(names)} names, {len(sources)} sets. "
            "Pass as many names as prefixes."
        )
    if not namespace.full_validation:
        problems.append(
            "full-validation: must be on with several validation sets, got full_validation=off. Pass --full-validation."
        )
    return problems


def _find_size_problems(namespace: argparse.Namespace, plan: DataPlan, indices: dict[str, IndexSummary]) -> list[str]:
    """A split without tokens makes megatron-core count epochs for ever; one without a sample cannot be drawn from."""
    if plan.is_mock or (plan.own is None and plan.split is None):
        return []
    is_evaluated = bool(namespace.eval_iters) or namespace.full_validation
    problems = []
    for name in SPLIT_FLAGS:
        sources = plan.sources_of(name)
        needed = 1 if name != "train" and not is_evaluated else namespace.seq_length + 1
        for source in sources:
            tokens = count_split_tokens(indices[source.prefix], plan.bounds_of(name))
            if tokens < needed:
                problems.append(_too_small(source.prefix, name, tokens, needed, plan))
    if is_evaluated and not plan.sources_of("valid") and not namespace.skip_train:
        problems.append(
            f"eval-iters: evaluation needs a validation set, got eval_iters={namespace.eval_iters} and none. "
            "Pass --eval-iters 0, or give validation a share: --split 98,2,0, or --valid-data-path."
        )
    return problems + _find_short_epoch_problems(namespace, plan, indices, is_reported=bool(problems))


def _too_small(prefix: str, name: str, tokens: int, needed: int, plan: DataPlan) -> str:
    remedy = (
        "Give it a larger share in --split, no share (0), or more documents"
        if plan.own is None
        else f"Take it out of --{SPLIT_FLAGS[name].replace('_', '-')}, or give it more text"
    )
    what = "one sample (seq_length + 1 tokens)" if needed > 1 else "a token"
    return (
        f"{Path(prefix)}: its {name} split must hold {what}, got {tokens} tokens of {needed} needed. "
        f"{remedy}, or lower --seq-length."
    )


def _find_short_epoch_problems(
    namespace: argparse.Namespace, plan: DataPlan, indices: dict[str, IndexSummary], *, is_reported: bool
) -> list[str]:
    if is_reported or namespace.skip_train or namespace.micro_batch_size is None:
        return []
    tokens = sum(
        count_split_tokens(indices[source.prefix], plan.bounds_of("train")) for source in plan.sources_of("train")
    )
    batch = select_global_batch_size(namespace)
    if not plan.sources_of("train") or tokens >= batch * namespace.seq_length:
        return []
    return [
        f"data-path: training data must fill one step, got {tokens} tokens, global_batch_size={batch}, "
        f"seq_length={namespace.seq_length} ({batch * namespace.seq_length} tokens a step). "
        "Add data, or lower --global-batch-size."
    ]
