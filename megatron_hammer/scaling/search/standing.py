"""How sure a ranking is, and which layout to start from.

The errors of two layouts of one job are correlated (evidence/layout_ranking.py), so the question is not how wide the
band of each time is, but how far their difference may be off. From that follow ties, each layout's chance to be the
fastest, and the rule for ties: see `choose_start`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_hammer.scaling.evidence.layout_ranking import BAND_Z, measure_layout_distances
from megatron_hammer.scaling.plan import Plan, StepTime
from megatron_hammer.scaling.search.projection import Projection

# A layout is tied with the fastest one if its chance to be faster in reality is at least this.
TIE_CHANCE = 1 / 3
TIE_Z = NormalDist().inv_cdf(1 - TIE_CHANCE)
NUM_DRAWS = 4096
SEED = 20_240_301  # any number: the same study must give the same chances
MOST_COMPARED = 256  # layouts in the draws; slower ones have no chance worth a digit
# What a simpler layout, or one with less memory, may give up of the speed of a tie without more cautions.
MOST_GIVEN_UP_RATIO = 0.02
# What a layout within the memory margin may give up against a faster one that may not fit.
MOST_GIVEN_UP_FOR_MEMORY_RATIO = 0.05
# A tie is worth giving up speed for only if it frees at least this share of the GPU's memory.
FAR_LESS_MEMORY_RATIO = 0.25

# Of the fastest first, the correlation, and the narrowest spread: the position of the one that stands for them.
Choose = Callable[[Sequence[Projection], float, float | None], int]


def estimate_spread(step: StepTime) -> float:
    """The standard deviation of log(predicted / measured) that the step's band stands for."""
    return math.log(step.high_s / step.low_s) / 2 / BAND_Z


def find_widest_tie_ratio(step: StepTime) -> float:
    """A layout of the same band that takes more than this ratio of a step's time is never tied with it."""
    # The errors of two layouts are independent at most.
    return math.exp(TIE_Z * math.sqrt(2) * estimate_spread(step))


def build_error_covariance(
    projections: Sequence[Projection], correlation: float, narrowest: float | None = None
) -> NDArray[np.float64]:
    """Of log(predicted / measured) of every two layouts. correlation: Coefficients.layout_correlation.

    What the narrowest band stands for is shared as far as the layouts are alike. What a wider band stands for beyond
    that, as that of FSDP does, is an error of all layouts with this band together.
    narrowest: the spread of the narrowest band of the whole search, if these are only some of its layouts. Otherwise
    two layouts could be a tie among a few and none among all.
    """
    spreads = np.array([estimate_spread(one.step) for one in projections])
    narrowest = spreads.min() if narrowest is None else narrowest
    shared = narrowest**2 * correlation ** measure_layout_distances([one.plan for one in projections])
    is_same_band = np.isclose(spreads[:, None], spreads[None, :])
    return shared + is_same_band * (spreads[:, None] ** 2 - narrowest**2)


def find_ties(projections: Sequence[Projection], correlation: float, narrowest: float | None = None) -> list[bool]:
    """Which layouts are tied with the first one, the fastest: their chance to be faster is at least TIE_CHANCE.

    narrowest: as in build_error_covariance.
    """
    compared = projections[:MOST_COMPARED]
    covariance = build_error_covariance(compared, correlation, narrowest)
    variances = np.diag(covariance) + covariance[0, 0] - 2 * covariance[0]
    gaps = np.log([one.step.total_s / compared[0].step.total_s for one in compared])
    ties = (gaps <= TIE_Z * np.sqrt(np.clip(variances, 0, None))).tolist()
    return [*ties, *[False] * (len(projections) - len(compared))]


def estimate_chances(projections: Sequence[Projection], correlation: float) -> list[float]:
    """The chance of each layout to be the fastest of them in reality, from draws of correlated errors.

    projections: the fastest first. Layouts after the first MOST_COMPARED get 0. Equally fast ones share a draw's win
    at random, because their errors are drawn apart.
    """
    compared = projections[:MOST_COMPARED]
    covariance = build_error_covariance(compared, correlation)
    # Symmetric square root: layouts at distance 0 make the matrix singular, which Cholesky's method refuses.
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    noise = np.random.default_rng(SEED).standard_normal((NUM_DRAWS, len(compared)))
    times = np.log([one.step.total_s for one in compared]) + noise @ root.T
    wins = np.bincount(np.argmin(times, axis=1), minlength=len(compared))
    return [*(wins / NUM_DRAWS).tolist(), *[0.0] * (len(projections) - len(compared))]


def count_kinds(plan: Plan) -> int:
    """How many mechanisms a layout needs beyond data parallelism with a distributed optimizer.

    A smaller group that shards is none: it costs memory, and is less exposed to the network.
    """
    layout = plan.layout
    return sum(
        (
            layout.tensor_model_parallel_size > 1,
            layout.context_parallel_size > 1,
            layout.pipeline_model_parallel_size > 1,
            layout.virtual_pipeline_model_parallel_size > 1,
            layout.expert_model_parallel_size > 1,
            plan.sharding == "fsdp",
            plan.recompute != "none",
        )
    )


def choose_fastest(projections: Sequence[Projection], correlation: float, narrowest: float | None = None) -> int:
    """The fastest of those with the fewest cautions: `choose_start` without a choice between ties.

    For questions about times, because that choice may flip where nothing else changes.
    """
    return min(range(len(projections)), key=lambda one: len(projections[one].standing.cautions))


def choose_start(projections: Sequence[Projection], correlation: float, narrowest: float | None = None) -> int:
    """The position of the layout to start from: one that is tied with the first one, the fastest.

    The rule: the fewest cautions, whatever a tie gives up. Of those that are at most MOST_GIVEN_UP_RATIO slower than
    the fastest of them: the fewest mechanisms (count_kinds), then the fastest, unless another one needs far less memory
    (FAR_LESS_MEMORY_RATIO of the GPU's). If no tie is within the memory margin, the fastest layout that is, if it is at
    most MOST_GIVEN_UP_FOR_MEMORY_RATIO slower. narrowest: as in build_error_covariance.
    """
    tied = [one for one, is_tied in enumerate(find_ties(projections, correlation, narrowest)) if is_tied]
    safe = [one for one, other in enumerate(projections) if not other.standing.is_near_memory_limit]
    slowest_s = projections[0].step.total_s * (1 + MOST_GIVEN_UP_FOR_MEMORY_RATIO)
    if safe and not set(safe) & set(tied) and projections[safe[0]].step.total_s <= slowest_s:
        return safe[0]
    fewest = min(len(projections[one].standing.cautions) for one in tied)
    fastest, *slower = [one for one in tied if len(projections[one].standing.cautions) == fewest]
    limit_s = projections[fastest].step.total_s * (1 + MOST_GIVEN_UP_RATIO)
    close = [fastest, *(one for one in slower if projections[one].step.total_s <= limit_s)]
    simplest = min(count_kinds(projections[one].plan) for one in close)
    chosen, *others = [one for one in close if count_kinds(projections[one].plan) == simplest]
    far_less = FAR_LESS_MEMORY_RATIO * projections[0].plan.gpu.memory_bytes
    for other in others:
        if projections[other].memory.total_bytes <= projections[chosen].memory.total_bytes - far_less:
            chosen = other
    return chosen


def rank_families(
    found: Sequence[Projection],
    num_shown: int,
    identify_family: Callable[[Plan], Hashable],
    correlation: float,
    choose: Choose = choose_start,
) -> list[Projection]:
    """One layout of each family with its standing: the one to start from, then the others in the order of their times.

    found: the fastest first, with their cautions. A family is represented by its own choice of `choose`. If there
    are fewer families than layouts to be shown, the fastest near copies follow.
    """
    narrowest = min(estimate_spread(one.step) for one in found)
    start = choose(found, correlation, narrowest)
    families: dict[Hashable, list[int]] = defaultdict(list)
    for position, one in enumerate(found):
        families[identify_family(one.plan)].append(position)
    members_of = {}
    for members in families.values():
        own = start if start in members else members[choose([found[one] for one in members], correlation, narrowest)]
        members_of[own] = members
    # Positions are in the order of the times.
    shown = sorted(members_of, key=lambda one: (one != start, one))[:num_shown]
    copies = [position for position in range(len(found)) if position not in members_of][: num_shown - len(shown)]
    chances, ties = estimate_chances(found, correlation), find_ties(found, correlation)
    ranked = []
    for position in (*shown, *copies):
        # A copy that is listed too keeps its own chance.
        together = [one for one in members_of.get(position, [position]) if one == position or one not in copies]
        # A member that is slower than a tie could be is another layout, not a copy.
        limit_s = found[together[0]].step.total_s * find_widest_tie_ratio(found[together[0]].step)
        standing = replace(
            found[position].standing,
            chance_of_best=sum(chances[one] for one in together),
            is_tied=ties[position],
            num_near_copies=sum(found[one].step.total_s <= limit_s for one in together if one != position),
        )
        ranked.append(replace(found[position], standing=standing))
    return ranked
