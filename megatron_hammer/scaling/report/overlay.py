"""Measured runs beside a projection: each is predicted with its own layout, and the model and machine of the study.

The file is a table of runs, as `measure` writes it or as the published tables have it (evidence/measured_runs.py).
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.evidence.validation import Prediction, Status
from megatron_hammer.scaling.plan import Plan, StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, UnpredictableRow, read_runs
from megatron_hammer.scaling.search.projection import Overlay, Study


def build_overlay(
    path: Path,
    study: Study,
    predict: Callable[[Plan], StepTime],
    *,
    fitted_fingerprints: Collection[str] = (),
    gpus_path: Path | None = None,
    clusters_path: Path | None = None,
) -> Overlay:
    """Every row of a table of runs, predicted or left out with the reason. Raises ConfigError for an unreadable file.

    fitted_fingerprints: of the runs that the coefficients were fitted on, as their provenance lists them.
    """
    measured, unpredictable = read_runs(path, gpus_path=gpus_path, clusters_path=clusters_path)
    runs = []
    left_out = list(unpredictable)
    for run in measured:
        reason = _find_difference(run, study)
        if reason is not None:
            row = UnpredictableRow(row_number=run.row_number, source=run.source, model=run.model, reason=reason)
            left_out.append(row)
            continue
        plan = replace(run.plan, model=study.model, gpu=study.gpu, cluster=study.cluster)
        status: Status = "fitted" if run.fingerprint in fitted_fingerprints else "predicted"
        runs.append(Prediction(run=replace(run, plan=plan), step=predict(plan), status=status))
    return Overlay(runs=tuple(runs), left_out=tuple(sorted(left_out, key=lambda row: row.row_number)))


def _find_difference(run: MeasuredRun, study: Study) -> str | None:
    if run.plan.gpu.name != study.gpu.name:
        return f"it ran on {run.plan.gpu.name}, the projection is of {study.gpu.name}"
    if _shape_of(run.plan.model) != _shape_of(study.model):
        return f"it trained {run.model or run.plan.model.name}, the projection is of {study.model.name}"
    return None


def _shape_of(model: ModelShape) -> ModelShape:
    """The parts of a model that its step time depends on: without its name and what changes only values, not work."""
    return replace(
        model,
        name="",
        source="",
        # None and hidden_size / num_attention_heads mean the same width.
        kv_channels=model.head_dim,
        max_position_embeddings=0,
        norm_epsilon=0.0,
        rotary_base=0,
        init_method_std=0.0,
        rope_scaling=None,
        rotary_seq_len_interpolation_factor=None,
        sliding_window=None,  # no column of a table of runs has it
    )
