"""A rank of a training run whose rank 1 lies on a badly prepared host.

It has flags of its own, another version of torch, and other data under the same name.
From the environment: FLAGS_OF_RANK_1, DATA_OF_RANK_1 (a prefix).
"""

import os
import sys

import torch

from megatron_hammer.data.sources import DataPlan, DataSource
from megatron_hammer.training.cluster import agreement
from megatron_hammer.training.pretrain import main

identify_data = agreement.identify_data


def identify_other_data(sources):
    other = DataPlan(own={"train": (DataSource(prefix=os.environ["DATA_OF_RANK_1"], weight=None),)})
    (identity,) = identify_data(other).values()
    return dict.fromkeys(identify_data(sources), identity)


if os.environ["RANK"] == "1":
    os.environ["LOCAL_RANK"] = "0"  # the first rank of its host
    sys.argv += os.environ["FLAGS_OF_RANK_1"].split()
    torch.__version__ = "2.0"
    agreement.identify_data = identify_other_data
main()
