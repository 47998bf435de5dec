"""Training runs on pretended GPUs, with TransformerEngine's Python over its stand-in where has_te is True.

python tests/helpers/te_runs.py GPU HAS_TE   (started and asked by run_on_pretended_gpus; see rank_server.py)
"""

import functools
import runpy
import subprocess
import sys

from tests.helpers import rank_server
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import RankServer, environment


def run_on_pretended_gpus(
    num_processes: int, *flags: str, gpu: str = "h100", has_te: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run training to its end on a machine that pretends to have GPUs of this type, whatever its exit code."""
    try:
        return start_server(gpu, has_te).run(num_processes, *flags)
    except (subprocess.TimeoutExpired, RuntimeError):
        start_server.cache_clear()  # a run without an end takes its server with it
        raise


class GpuRankServer(RankServer):
    """A server of ranks on pretended GPUs."""

    def __init__(self, gpu: str, has_te: bool):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.te_runs", gpu, str(has_te)], cwd=ROOT, env=environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip


@functools.cache
def start_server(gpu: str, has_te: bool) -> GpuRankServer:
    return GpuRankServer(gpu, has_te)


def import_what_gpu_runs_import(gpu: str, has_te: bool) -> None:
    """As rank_server.import_what_runs_import, on a machine with GPUs."""
    from tests.helpers.pretended_gpus import GPUS, pretend_gpus

    pretend_gpus(GPUS[gpu])
    if has_te:
        from tests.helpers import te_stand_in
        from tests.helpers.te_wheel import provide_te_wheel

        te_stand_in.install(provide_te_wheel())
    from megatron_hammer.platforms import megatron_compat

    megatron_compat.install("cuda")
    import matplotlib.pyplot  # noqa: F401
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.tokenizers.text.text_tokenizer
    import megatron.training  # noqa: F401
    import torch._dynamo  # noqa: F401

    import megatron_hammer.config.arguments
    import megatron_hammer.config.preflight.find_problems
    import megatron_hammer.model.provider
    import megatron_hammer.training.observer  # noqa: F401


if __name__ == "__main__":
    import_what_gpu_runs_import(sys.argv[1], sys.argv[2] == "True")
    if rank_server.serve() is not None:
        runpy.run_module(rank_server.TRAINING_MODULE, run_name="__main__", alter_sys=True)
