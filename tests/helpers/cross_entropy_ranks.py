"""The vocabulary-parallel loss on real ranks, with both kinds of kernels; Triton's run in its interpreter.

    TRITON_INTERPRET=1 python tests/helpers/cross_entropy_ranks.py FOLDER

In a process of its own, because Triton decides when it is imported whether it interprets. Reads FOLDER/cases.pt, a
list of {"logits" [s, b, p], "targets", "scales" [s, b], "num_tokens"}; writes FOLDER/results-<rank>.pt of each of
NUM_RANKS ranks, {(kind of kernels, group, case): (losses, gradient of the rank's columns)}. Group "one" is rank 0
alone, with all columns.
"""

import os
import sys
from pathlib import Path

import torch

from megatron_hammer.model import cross_entropy, cross_entropy_torch, cross_entropy_triton

NUM_RANKS = 3
KERNELS = {"torch": cross_entropy_torch, "triton": cross_entropy_triton}


def run_rank(directory: Path, rank: int) -> None:
    store = torch.distributed.FileStore(str(directory / "store"), NUM_RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    alone = torch.distributed.new_group([0])
    # Several blocks in a row, and several blocks of rows.
    cross_entropy_triton.MAX_BLOCK = 64
    cross_entropy_torch.BLOCK_ELEMENTS = 1000
    results = {}
    for number, case in enumerate(torch.load(directory / "cases.pt")):
        for kind, kernels in KERNELS.items():
            cross_entropy._select_kernels = lambda _, kernels=kernels: kernels
            results[kind, "ranks", number] = compute(case, torch.distributed.group.WORLD)
            if rank == 0:
                results[kind, "one", number] = compute(case, alone)
    torch.save(results, directory / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()


def compute(case: dict, group) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = case["logits"].chunk(group.size(), dim=-1)[group.rank()].contiguous().requires_grad_()
    logits = leaf * 1  # a leaf may not be overwritten
    losses = cross_entropy.vocab_parallel_cross_entropy(
        logits, case["targets"], num_tokens=case["num_tokens"], group=group
    )
    losses.backward(case["scales"])
    return losses.detach(), leaf.grad


def main(directory: Path) -> None:
    pids = []
    for rank in range(NUM_RANKS):
        pid = os.fork()
        if pid == 0:
            run_rank(directory, rank)
            os._exit(0)
        pids.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
