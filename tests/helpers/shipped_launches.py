"""The launch files under examples/: what `emit` renders for the recipe of hammer-1b4 on two nodes.

After a change of the templates, `python -m tests.helpers.shipped_launches` writes them again.
"""

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.launch.launch_scripts import (
    KubernetesOptions,
    Launch,
    Launcher,
    build_launch,
    read_sweep,
    render,
)
from megatron_hammer.scaling.plan import Plan
from tests.helpers.repository import ROOT

FILES: dict[str, Launcher] = {
    "examples/slurm/pretrain.sbatch": "slurm",
    "examples/slurm/sweep.sbatch": "slurm-array",
    "examples/kubernetes/indexed-job.yaml": "kubernetes",
    "examples/kubernetes/jobset.yaml": "jobset",
    "examples/kubernetes/trainjob.yaml": "trainjob",
}
NUM_GPUS = 16
OPTIONS = KubernetesOptions(data_claim="corpus", queue="training", rdma=("rdma/rdma_shared_device_a", 1))


def build_shipped_launch() -> Launch:
    preset = PRESETS["hammer-1b4"]
    recipe = preset.recipe
    model_ranks = recipe.tensor_model_parallel_size * recipe.pipeline_model_parallel_size
    plan = Plan(
        model=preset.model,
        layout=ParallelLayout(
            tensor_model_parallel_size=recipe.tensor_model_parallel_size,
            pipeline_model_parallel_size=recipe.pipeline_model_parallel_size,
            data_parallel_size=NUM_GPUS // model_ranks,
        ),
        gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"),
        seq_length=recipe.seq_length,
        micro_batch_size=recipe.micro_batch_size,
        global_batch_size=recipe.global_batch_size,
    )
    return build_launch(
        plan,
        model_arguments=build_model_arguments(plan.model),
        name="hammer-1b4",
        train_tokens=None,
        comment="HammerLLM-1.4B with the layout of its recipe, on two nodes of DGX H100.",
    )


def render_shipped(name: str) -> str:
    sweep = read_sweep(ROOT / "examples/slurm/sweep.txt")
    return render(build_shipped_launch(), FILES[name], OPTIONS, sweep=sweep, file_name=name.split("/")[-1])


if __name__ == "__main__":
    for name in FILES:
        (ROOT / name).write_text(render_shipped(name), encoding="utf-8")
