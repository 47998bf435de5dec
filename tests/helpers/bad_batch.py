"""A rank of a training run in which one batch is bad, on the last rank. From the environment:

BAD_SAMPLES  the batch that begins after so many samples of the run
FACTOR       what its loss is multiplied by: nan, inf or a number
TIMES        how often (default: always); a file beside the run counts, so that a later process knows
"""

import os
from pathlib import Path

from megatron.training import get_args

from megatron_hammer.training import forward_step
from megatron_hammer.training.pretrain import main

original = forward_step.sum_loss


def sum_loss(loss_mask, token_losses, **counts):
    args = get_args()
    is_there = args.rank == args.world_size - 1 and args.consumed_train_samples == int(os.environ["BAD_SAMPLES"])
    counter = Path(args.save or "/nonexistent") / "bad_times"
    if not is_there or ("TIMES" in os.environ and counter.exists()):
        return original(loss_mask, token_losses, **counts)
    if "TIMES" in os.environ:
        counter.touch()
    return original(loss_mask, token_losses * float(os.environ["FACTOR"]), **counts)


forward_step.sum_loss = sum_loss
main()
