"""The question of a projection file: the Study that `project` was asked, as far as a search needs it."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_json
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.plan import Cluster, ExpertOptions, Gpu, PositiveInt, Precision
from megatron_hammer.scaling.report.projection_file import REMEDY_OF_A_FIELD, SavedProjection, read_projection
from megatron_hammer.scaling.search.projection import DEFAULT_EXPERTS, MEMORY_MARGIN_RATIO, Study
from megatron_hammer.scaling.search.search_space import SearchSpace

LARGEST_DENOMINATOR = 10**6  # of samples per GPU, which the file holds as a decimal number


@dataclass(frozen=True, slots=True)
class SavedStudy:
    """A projection file: its question, its rows, and the whole document for what is only compared as text."""

    study: Study
    projection: SavedProjection
    document: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.projection.path


@dataclass(frozen=True, slots=True)
class _Batch:
    global_batch_size: PositiveInt | None
    samples_per_gpu: float | None


@dataclass(frozen=True, slots=True)
class _Question:
    """Fields of `study` in the file. Fields that are not needed here, and labels, are left out."""

    model: ModelShape
    preset: str | None
    hf_config: str | None
    gpu: Gpu
    cluster: Cluster
    gpu_counts: tuple[int, ...]
    seq_length: PositiveInt
    precision: Precision
    batch: _Batch
    train_tokens: PositiveInt | None
    memory_limit_bytes: PositiveInt
    usd_per_gpu_hour: float | None
    restrictions: SearchSpace
    memory_margin_ratio: float = MEMORY_MARGIN_RATIO
    gradient_bytes: PositiveInt = 4
    experts: ExpertOptions | None = None  # of a dense model


@dataclass(frozen=True, slots=True)
class _File:
    study: _Question


def read_study(path: Path) -> SavedStudy:
    """Read a projection file with its question. Raises ConfigError as read_projection does."""
    projection = read_projection(path)
    question = read_json(path, _File, remedy=REMEDY_OF_A_FIELD, raises=ConfigError).study
    samples = question.batch.samples_per_gpu
    study = Study(
        model=question.model,
        preset=question.preset,
        hf_config=question.hf_config,
        gpu=question.gpu,
        cluster=question.cluster,
        gpu_counts=question.gpu_counts,
        seq_length=question.seq_length,
        precision=question.precision,
        global_batch_size=question.batch.global_batch_size,
        samples_per_gpu=None if samples is None else Fraction(samples).limit_denominator(LARGEST_DENOMINATOR),
        train_tokens=question.train_tokens,
        memory_limit_bytes=question.memory_limit_bytes,
        memory_margin_ratio=question.memory_margin_ratio,
        space=question.restrictions,
        usd_per_gpu_hour=question.usd_per_gpu_hour,
        gradient_bytes=question.gradient_bytes,
        experts=question.experts or DEFAULT_EXPERTS,
    )
    document = read_json(path, dict[str, Any], remedy=REMEDY_OF_A_FIELD, raises=ConfigError)
    return SavedStudy(study, projection, document)
