"""Whether every split of the data holds what the run draws from it."""

from pathlib import Path

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.run_plan import RunPlan, RunSettings
from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.data.sources import SPLIT_FLAGS, DataPlan, count_split_tokens

Indices = dict[str, IndexSummary]
# Nobody plans to read the same text so often, not even to see a model learn one batch by heart (some hundred steps). It
# is a --train-iters that was forgotten: a recipe of two trillion tokens reads a demonstration's three million 650,000
# times, and an index of 10^9 samples is built before the first step.
MOST_EPOCHS = 1000


def find_size_problems(settings: RunSettings, plan: RunPlan | None, indices: Indices, seq_length: int) -> list[str]:
    """Without tokens in a split megatron-core counts epochs without end; without a sample it cannot draw any."""
    sources = settings.data.sources
    if sources.is_mock or (sources.own is None and sources.split is None):
        return []
    problems = []
    for name in SPLIT_FLAGS:
        # One sample takes seq_length + 1 tokens, because its labels are its tokens shifted by one. Megatron's sampler
        # refuses a split without one, be it evaluated or not.
        needed = seq_length + 1
        for source in sources.sources_of(name):
            tokens = count_split_tokens(indices[source.prefix], sources.bounds_of(name))
            if tokens < needed:
                problems.append(_describe_small_split(source.prefix, name, tokens, needed, sources))
    problems += find_missing_validation(settings)
    if not problems and plan is not None:
        problems += find_idle_blend_problems(plan)
        problems += _find_short_epoch_problems(plan, indices)
        problems += _find_single_pass_problems(plan, indices)
        problems += _find_repetition_problems(plan, indices)
        problems += _find_whole_pass_problems(plan, indices)
    return problems


def find_missing_validation(settings: RunSettings) -> list[str]:
    """An evaluation without data to evaluate on."""
    evaluation = settings.evaluation
    if not evaluation.is_on or settings.data.sources.sources_of("valid") or settings.schedule.skips_training:
        return []
    return [
        f"eval-iters: evaluation needs a validation set, got eval_iters={evaluation.num_steps} and none. "
        "Pass --eval-iters 0, or give validation a share: --split 98,2,0, or --valid-data-path."
    ]


def _describe_small_split(prefix: str, name: str, tokens: int, needed: int, sources: DataPlan) -> str:
    remedy = (
        "Give it a larger share in --split, no share (0), or more documents"
        if sources.own is None
        else f"Take it out of --{flag_of(SPLIT_FLAGS[name])}, or give it more text"
    )
    return (
        f"{Path(prefix)}: its {name} split must hold one sample (seq_length + 1 tokens), got {tokens} tokens of "
        f"{needed} needed. "
        f"{remedy}, or lower --seq-length."
    )


def _count_tokens(plan: RunPlan, indices: Indices, name: str) -> list[int]:
    """Tokens that the split has in each of its sources."""
    sources = plan.data.sources
    return [count_split_tokens(indices[source.prefix], sources.bounds_of(name)) for source in sources.sources_of(name)]


def _find_short_epoch_problems(plan: RunPlan, indices: Indices) -> list[str]:
    tokens = _count_tokens(plan, indices, "train")
    batch = plan.batch.global_batch_size
    # Less data than one step would repeat tokens within one batch.
    if plan.schedule.skips_training or not tokens or sum(tokens) >= batch * plan.seq_length:
        return []
    return [
        f"data-path: training data must fill one step, got {sum(tokens)} tokens, global_batch_size={batch}, "
        f"seq_length={plan.seq_length} ({batch * plan.seq_length} tokens per step). "
        "Add data, or lower --global-batch-size."
    ]


def find_idle_blend_problems(plan: RunPlan) -> list[str]:
    """A blend of which nothing is drawn has no samples, and Megatron's sampler refuses it once all ranks are up."""
    problems = []
    for name in ("valid", "test"):
        is_drawn = plan.num_samples[name] > 0 or (name == "valid" and plan.evaluation.is_whole)
        if plan.data.sources.is_blend(name) and not is_drawn:
            problems.append(
                f"eval-iters: a blend needs evaluations in its {name} split, got "
                f"eval_iters={plan.evaluation.num_steps} and {len(plan.data.sources.sources_of(name))} sources. "
                "Give the split no share, as in --split 100,0,0, or pass --eval-iters 10."
            )
    return problems


def _find_single_pass_problems(plan: RunPlan, indices: Indices) -> list[str]:
    """Several prefixes without weights are read once at most; the run would stop at the end, without a checkpoint.

    Source: BlendedMegatronDatasetBuilder._build_blended_dataset_splits, size = min(requested, one epoch).
    """
    problems = []
    for name, needed in plan.num_samples.items():
        sources = plan.data.sources.sources_of(name)
        if len(sources) < 2 or any(source.weight is not None for source in sources):
            continue
        # Each set is then read by itself and is not blended.
        if name == "valid" and plan.evaluation.has_several_sets:
            continue
        tokens = _count_tokens(plan, indices, name)
        # The last label of a sample is the first token of the next one, so only the last sample needs a token more.
        available = sum((size - 1) // plan.seq_length for size in tokens)
        if available < needed:
            weighted = " ".join(
                f"{size / sum(tokens):.3g} {source.prefix}" for size, source in zip(tokens, sources, strict=True)
            )
            problems.append(
                f"data-path: several prefixes without weights are read once, got {available} samples in the {name} "
                f"split of {needed} that the run draws. Pass weights, which repeat them: {weighted}."
            )
    return problems


def _find_repetition_problems(plan: RunPlan, indices: Indices) -> list[str]:
    """The source that is repeated most, if that is too often. Without weights, sources are read in equal measure."""
    tokens = _count_tokens(plan, indices, "train")
    if plan.schedule.skips_training or plan.data.accepts_many_epochs or not tokens:
        return []
    sources = plan.data.sources.sources_of("train")
    # Without a weight, a source is drawn in proportion to its size.
    weights = [size if source.weight is None else source.weight for source, size in zip(sources, tokens, strict=True)]
    num_samples = plan.num_samples["train"]
    total = sum(weights) or 1
    epochs, source, size = max(
        (
            (num_samples * plan.seq_length * weight / total / size, source, size)
            for weight, source, size in zip(weights, sources, tokens, strict=True)
        ),
        # Only the epochs: equal numbers must not make Python compare the sources.
        key=lambda entry: entry[0],
    )
    if epochs <= MOST_EPOCHS:
        return []
    one_pass = max(1, sum(tokens) // (plan.batch.global_batch_size * plan.seq_length))
    remedy = f"Pass --train-iters ({one_pass:,} is one pass over all data)"
    if len(sources) > 1:
        remedy += " or lower the weight of this source"
    return [
        f"train-iters: training data must not be read more than {MOST_EPOCHS:,} times, got {epochs:,.0f} epochs of the "
        f"{size:,} tokens in {Path(source.prefix)} ({num_samples:,} samples of {plan.seq_length} tokens). {remedy}. If "
        "it is meant so, pass --accept-many-epochs and build the sample index beforehand: tools/build_data_cache.py."
    ]


def _find_whole_pass_problems(plan: RunPlan, indices: Indices) -> list[str]:
    """A data-parallel rank that gets no sample of a validation set fails at the first evaluation.

    Source: megatron.training's MegatronFullValidationSampler (sample i goes to rank i mod dp) and cyclic_iter.
    """
    if not plan.evaluation.is_whole:
        return []
    problems, num_ranks = [], plan.layout.data_parallel_size
    tokens = _count_tokens(plan, indices, "valid")
    for source, size in zip(plan.data.sources.sources_of("valid"), tokens, strict=True):
        num_samples = (size - 1) // plan.seq_length
        if num_samples < num_ranks:
            problems.append(
                f"full-validation: needs a sample for each data-parallel rank, got {num_samples} samples of "
                f"{plan.seq_length} tokens in {Path(source.prefix)}, dp={num_ranks}. "
                "Give it more text, or drop --full-validation."
            )
    return problems
