"""Batches of similar length, and what can be scored."""

from collections.abc import Sequence

import pytest

from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores, plan_batches


class CountingScorer(Scorer):
    """Its likeliest next token is the length of the sequence."""

    max_length = 6

    def score(self, sequences: Sequence[Sequence[int]], num_targets: Sequence[int] | None = None) -> list[TokenScores]:
        raise NotImplementedError

    def choose_next(self, sequences: Sequence[Sequence[int]]) -> list[int]:
        return [len(ids) for ids in sequences]


def test_batches_hold_every_sequence_once_within_the_padded_size() -> None:
    lengths = [7, 30, 1, 9, 30, 12, 200, 3]
    batches = plan_batches(lengths, 60)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert batches[0] == [6]  # longer than a batch: by itself
    for batch in batches[1:]:
        assert len(batch) * max(lengths[number] for number in batch) <= 60
    assert plan_batches([], 60) == []


def test_generation_stops_where_it_is_told_and_at_the_longest_sequence() -> None:
    scorer = CountingScorer()
    assert scorer.generate([[9], [9, 9, 9]], max_new_tokens=2, is_done=lambda new: new[-1] == 3) == [[1, 2], [3]]
    # Six ids are read and give a seventh.
    assert scorer.generate([[9] * 5, [9] * 7], max_new_tokens=9, is_done=lambda new: False) == [[5, 6], []]


@pytest.mark.parametrize("ids, count", [([1], 0), ([1, 2], 2), ([1] * 8, 1), ([1, 2], 0)])
def test_what_cannot_be_scored_is_refused(ids: list[int], count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot score {count} of {len(ids)}"):
        CountingScorer().count_targets([ids], [count])
    assert CountingScorer().count_targets([[1, 2, 3]], None) == [2]
