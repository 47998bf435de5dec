"""A rank of fine-tuning in which one pipeline stage, LEAKING_STAGE, lets conversations attend to those before them."""

import os

import torch
from megatron.core import parallel_state

from megatron_hammer.training.boundaries import Boundaries
from megatron_hammer.training.pretrain import main

confine = Boundaries.build_mask


def build_mask(boundaries):
    mask = confine(boundaries)
    if parallel_state.get_pipeline_model_parallel_rank() != int(os.environ["LEAKING_STAGE"]):
        return mask
    return torch.ones_like(mask).triu(1)


Boundaries.build_mask = build_mask
main()
