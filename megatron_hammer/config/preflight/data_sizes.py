"""Whether every split of the data holds what the run draws from it."""

import argparse
from pathlib import Path

from megatron_hammer.config.samples import count_needed_samples, select_global_batch_size
from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.data.sources import SPLIT_FLAGS, DataPlan, count_split_tokens


def find_size_problems(namespace: argparse.Namespace, plan: DataPlan, indices: dict[str, IndexSummary]) -> list[str]:
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
    if not problems and namespace.micro_batch_size is not None:
        problems += _find_idle_blend_problems(namespace, plan)
        problems += _find_short_epoch_problems(namespace, plan, indices)
        problems += _find_single_pass_problems(namespace, plan, indices)
    return problems


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
    namespace: argparse.Namespace, plan: DataPlan, indices: dict[str, IndexSummary]
) -> list[str]:
    if namespace.skip_train:
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


def _find_idle_blend_problems(namespace: argparse.Namespace, plan: DataPlan) -> list[str]:
    """A blend of which nothing is drawn has no samples, and Megatron's sampler refuses it once all ranks are up."""
    needed = count_needed_samples(namespace)
    problems = []
    for name in ("valid", "test"):
        sources = plan.sources_of(name)
        is_blend = len(sources) > 1 or (plan.own is None and any(source.weight is not None for source in sources))
        if is_blend and needed[name] == 0 and not (name == "valid" and namespace.full_validation):
            problems.append(
                f"eval-iters: a blend needs evaluations in its {name} split, got eval_iters={namespace.eval_iters} and "
                f"{len(sources)} sources. Give the split no share, as in --split 100,0,0, or pass --eval-iters 10."
            )
    return problems


def _find_single_pass_problems(
    namespace: argparse.Namespace, plan: DataPlan, indices: dict[str, IndexSummary]
) -> list[str]:
    """Several prefixes without weights are read once at most; the run would stop at the end, without a checkpoint.

    Source: BlendedMegatronDatasetBuilder._build_blended_dataset_splits, size = min(requested, one epoch).
    """
    needed = count_needed_samples(namespace)
    problems = []
    for name in SPLIT_FLAGS:
        sources = plan.sources_of(name)
        if len(sources) < 2 or any(source.weight is not None for source in sources):
            continue
        if name == "valid" and namespace.multiple_validation_sets:
            continue
        tokens = [count_split_tokens(indices[source.prefix], plan.bounds_of(name)) for source in sources]
        available = sum((size - 1) // namespace.seq_length for size in tokens)
        if available < needed[name]:
            weighted = " ".join(
                f"{size / sum(tokens):.3g} {source.prefix}" for size, source in zip(tokens, sources, strict=True)
            )
            problems.append(
                f"data-path: several prefixes without weights are read once, got {available} samples in the {name} "
                f"split of {needed[name]} that the run draws. Pass weights, which repeat them: {weighted}."
            )
    return problems
