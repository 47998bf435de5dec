"""The parallel layout that a recipe publishes, for tests that count it without parsing a command line."""

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.presets.preset import Recipe


def build_layout(recipe: Recipe, *, data_parallel_size: int = 1) -> ParallelLayout:
    return ParallelLayout(
        tensor_model_parallel_size=recipe.tensor_model_parallel_size,
        pipeline_model_parallel_size=recipe.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=recipe.virtual_pipeline_model_parallel_size,
        accounts_for_embedding=recipe.has_ends_in_pipeline_split,
        accounts_for_loss=recipe.has_ends_in_pipeline_split,
        expert_model_parallel_size=recipe.expert_model_parallel_size,
        expert_tensor_parallel_size=recipe.expert_tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        has_sequence_parallel=recipe.has_sequence_parallel,
    )
