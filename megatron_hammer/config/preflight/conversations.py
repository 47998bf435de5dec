"""Whether the data sets of --sft are conversations that fit, teach something, and fill what the run draws."""

from collections.abc import Iterator, Sequence

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.preflight.data_sizes import (
    MOST_EPOCHS,
    find_idle_blend_problems,
    find_missing_validation,
)
from megatron_hammer.config.run_plan import RunPlan, RunSettings, Sft, build_row_layout
from megatron_hammer.data.conversations.counts import RowCounts, count_rows, find_unlearned, has_masks
from megatron_hammer.data.conversations.packing import RowLayout
from megatron_hammer.data.conversations.pair import open_conversations
from megatron_hammer.data.sources import SPLIT_FLAGS, DataSource
from megatron_hammer.errors import DataError

WRITE_AGAIN = "Write the conversations again with hammer preprocess-conversations"


def find_mask_problems(prefixes: Sequence[str]) -> list[str]:
    """Without --sft: conversations, whose masks pretraining would not read."""
    return [
        f"{prefix}: holds conversations with a loss mask, which pretraining would ignore, got sft=off. Pass --sft."
        for prefix in prefixes
        if has_masks(prefix)
    ]


def find_conversation_problems(settings: RunSettings, plan: RunPlan | None, prefixes: Sequence[str]) -> list[str]:
    """With --sft: what is wrong with the files, then with their sizes; reads all lengths and masks."""
    assert settings.sft is not None
    problems = [problem for prefix in prefixes for problem in _find_file_problems(prefix)]
    if settings.seq_length is None or settings.layout is None or settings.data.problems or problems:
        return problems
    layout = build_row_layout(settings.sft, settings.seq_length, settings.layout.context_parallel_size)
    if layout.seq_length % layout.granularity:
        return problems  # Megatron says that context parallelism must divide the sequence
    for prefix in prefixes:
        problems += _find_length_problems(prefix, count_rows(prefix, (0.0, 1.0), layout), layout)
        problems += _find_cut_to_nothing(prefix, layout)
    if problems:
        return problems
    problems += _find_empty_splits(settings, layout)
    problems += find_missing_validation(settings)
    if not problems and plan is not None:
        problems += find_idle_blend_problems(plan)
        problems += _find_amount_problems(plan, layout)
    return problems


def find_epoch_problems(sft: Sft | None) -> list[str]:
    if sft is None or sft.num_epochs is None or 0 < sft.num_epochs < float("inf"):
        return []
    return [f"sft-epochs: must be above 0, got sft_epochs={sft.num_epochs:g}. Pass --sft-epochs 2."]


def _find_file_problems(prefix: str) -> list[str]:
    try:
        conversations = open_conversations(prefix)
    except DataError as error:
        return list(error.problems)
    except OSError as error:
        return [f"{prefix}: conversations cannot be read ({error.strerror}). Check their permissions."]
    unlearned = find_unlearned(conversations)
    if not len(unlearned):
        return []
    examples = ", ".join(map(str, unlearned[:3].tolist()))
    return [
        f"{prefix}: every conversation must have a token to learn, got {len(unlearned):,} of {len(conversations):,} "
        f"with none in their masks (conversations {examples}{', ...' if len(unlearned) > 3 else ''}, from 0). "
        f"{WRITE_AGAIN}."
    ]


def _find_length_problems(prefix: str, counts: RowCounts, layout: RowLayout) -> list[str]:
    if not counts.num_too_long or layout.is_truncated:
        return []
    return [
        f"seq-length: must hold every conversation (seq_length + 1 tokens), got seq_length={layout.seq_length}, "
        f"{counts.num_too_long:,} of {counts.num_conversations:,} conversations in {prefix} are longer, the longest "
        f"has {counts.longest_tokens:,} tokens. Raise --seq-length, or pass --sft-truncate to cut them at their end."
    ]


def _find_cut_to_nothing(prefix: str, layout: RowLayout) -> Iterator[str]:
    """A batch of such conversations has no loss: 0 / 0."""
    if not layout.is_truncated:
        return
    conversations = open_conversations(prefix)
    if num_lost := len(find_unlearned(conversations, seq_length=layout.seq_length)):
        yield (
            f"sft-truncate: must leave every conversation a token to learn, got seq_length={layout.seq_length}, which "
            f"{num_lost:,} of {len(conversations):,} conversations in {prefix} need for what comes before the first "
            f"answer. Raise --seq-length, or leave them out: hammer preprocess-conversations --max-length "
            f"{layout.seq_length + 1}, with --overlong cut-turns to keep the answers that fit."
        )


def _find_empty_splits(settings: RunSettings, layout: RowLayout) -> Iterator[str]:
    sources = settings.data.sources
    for name in SPLIT_FLAGS:
        for source in sources.sources_of(name):
            if count_rows(source.prefix, sources.bounds_of(name), layout).num_conversations:
                continue
            remedy = (
                "Give it a larger share in --split, no share (0), or more conversations"
                if sources.own is None
                else f"Take it out of --{flag_of(SPLIT_FLAGS[name])}"
            )
            yield f"{source.prefix}: its {name} split must hold a conversation, got none. {remedy}."


def count_split_rows(plan: RunPlan, layout: RowLayout, name: str) -> list[tuple[DataSource, RowCounts]]:
    """The sources of a split with what they hold."""
    sources = plan.data.sources
    return [(source, count_rows(source.prefix, sources.bounds_of(name), layout)) for source in sources.sources_of(name)]


def _find_amount_problems(plan: RunPlan, layout: RowLayout) -> Iterator[str]:
    """Rows against what the run draws; the same questions as data_sizes.py asks of text."""
    for name, needed in plan.num_samples.items():
        rows = count_split_rows(plan, layout, name)
        held = sum(counts.num_rows for _, counts in rows)
        is_apart = name == "valid" and plan.evaluation.has_several_sets
        if len(rows) > 1 and rows[0][0].weight is None and held < needed and not is_apart:
            weighted = " ".join(f"{counts.num_rows / held:.3g} {source.prefix}" for source, counts in rows)
            yield (
                f"data-path: several prefixes without weights are read once, got {held} sequences in the {name} split "
                f"of {needed} that the run draws. Pass weights, which repeat them: {weighted}."
            )
        for source, counts in rows if name == "valid" and plan.evaluation.is_whole else ():
            if counts.num_rows < plan.layout.data_parallel_size:
                yield (
                    f"full-validation: needs a sequence for each data-parallel rank, got {counts.num_rows} in "
                    f"{source.prefix}, dp={plan.layout.data_parallel_size}. Give it more, or drop --full-validation."
                )
    if plan.schedule.skips_training:
        return
    held, batch = sum(counts.num_rows for _, counts in count_split_rows(plan, layout, "train")), plan.batch
    if 0 < held < batch.global_batch_size:
        yield (
            f"data-path: training data must fill one step, got {held} sequences of conversations, "
            f"global_batch_size={batch.global_batch_size}. Add data, or lower --global-batch-size."
        )
    epochs = plan.num_samples["train"] / max(1, held)
    if epochs > MOST_EPOCHS and not plan.data.accepts_many_epochs:
        yield (
            f"train-iters: conversations must not be read more than {MOST_EPOCHS:,} times, got {epochs:,.0f} epochs of "
            f"{held:,} sequences. Pass --sft-epochs instead, or --accept-many-epochs if it is meant so."
        )
