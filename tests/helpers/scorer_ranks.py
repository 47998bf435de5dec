"""What every rank of a scored model computes together: `scorer_ranks.py MODEL TP PP OUTPUT PLATFORM`.

Started by tests/helpers/training_runs.run_program. Rank 0 writes log-probabilities, greedy flags and continuations of
list_sequences() as JSON, of MODEL twice: the groups of processes must serve one model after the other.
"""

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer

LENGTHS = (5, 81, 40, 2, 33, 12, 60)  # up to the longest that can be scored
NUM_TARGETS = [1, 80, 3, 1, 32, 4, 10]


def list_sequences() -> list[list[int]]:
    """Sequences of ids that are not special; no id twice until all have come."""
    ids = itertools.cycle(random.Random(3).sample(range(256), 256))
    return [list(itertools.islice(ids, length)) for length in LENGTHS]


def measure(scorer: Scorer) -> dict[str, Any]:
    sequences = list_sequences()
    return {
        "all": [one.log_probabilities.tolist() for one in scorer.score(sequences)],
        "last": [one.log_probabilities.tolist() for one in scorer.score(sequences, NUM_TARGETS)],
        "is_greedy": [one.is_greedy.tolist() for one in scorer.score(sequences)],
        "continuations": scorer.generate(
            [ids[:10] for ids in sequences[:3]], max_new_tokens=6, is_done=lambda new: len(new) == 5
        ),
    }


def main() -> None:
    path, tp, pp, output, platform = sys.argv[1:]
    layout = ModelLayout(tensor_model_parallel_size=int(tp), pipeline_model_parallel_size=int(pp), platform=platform)
    options = ScorerOptions(layout=layout, precision="fp32", max_batch_tokens=200)
    results = [use_scorer(Path(path), options, measure) for _ in range(2)]
    if results[0] is not None:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
