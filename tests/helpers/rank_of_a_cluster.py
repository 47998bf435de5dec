"""A rank of check_cluster.py on a host of a pretended cluster, two ranks a host, with a fault that the test chooses.

From the environment: FAULT, which is one of
    none        nothing is wrong
    sick        on host-1: rank 3 computes slowly, the package has another version, the clock is 5 s off
    hung        rank 1 never comes back from its first stage
    dead        rank 2 ends in its first stage
"""

import functools
import os
import socket
import sys
import time

import torch

import megatron_hammer
from megatron_hammer.cli.check_cluster import main
from megatron_hammer.training.cluster import software

RANK, FAULT = int(os.environ["RANK"]), os.environ["FAULT"]
HOST = f"host-{RANK // 2}"


def slow_down(function):
    @functools.wraps(function)
    def slowed(*args, **kwargs):
        time.sleep(0.2)
        return function(*args, **kwargs)

    return slowed


def hang(*args):
    time.sleep(3600)


def end(*args):
    os._exit(9)


socket.gethostname = lambda: HOST
if FAULT == "sick" and HOST == "host-1":
    megatron_hammer.__version__ = "0.0.0"
    right_time = time.time
    time.time = lambda: right_time() + 5.0
if FAULT == "sick" and RANK == 3:
    torch.mm = slow_down(torch.mm)
if (FAULT, RANK) in (("hung", 1), ("dead", 2)):
    software.read_versions = {"hung": hang, "dead": end}[FAULT]
sys.exit(main())
