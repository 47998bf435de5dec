"""The question of a projection file is read back, so that it can be asked again."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.plan import ExpertOptions
from megatron_hammer.scaling.report.projection_file import build_projection_document, format_json
from megatron_hammer.scaling.report.saved_study import read_study
from megatron_hammer.scaling.search.projection import Study
from megatron_hammer.scaling.search.search_space import SearchSpace
from tests.helpers.toy_study import build_toy_study, project_toy_study


def write(study: Study, path: Path) -> Path:
    path.write_text(format_json(build_projection_document(project_toy_study(study))), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "study",
    [
        build_toy_study(gpu_counts=(4, 8), usd_per_gpu_hour=2.5, gradient_bytes=2),
        build_toy_study(
            gpu_counts=(6,),
            global_batch_size=None,
            samples_per_gpu=Fraction(4, 3),
            train_tokens=None,
            space=SearchSpace(tensor_model_parallel_sizes=(1, 2), recomputes=("none", "full"), shardings=("fsdp",)),
        ),
        build_toy_study("hammer-tiny-moe", seq_length=256, gpu_counts=(4,), experts=ExpertOptions(imbalance_ratio=1.4)),
    ],
    ids=["strong", "weak and restricted", "experts"],
)
def test_the_question_is_read_back(study: Study, tmp_path: Path) -> None:
    saved = read_study(write(study, tmp_path / "projection.json"))
    # What is shown of the answer is no part of the question.
    assert saved.study == replace(study, num_best=saved.study.num_best)
    assert saved.document["format_version"] == 1
    assert saved.path == tmp_path / "projection.json"


def test_an_unusable_field_is_named(tmp_path: Path) -> None:
    path = write(build_toy_study(gpu_counts=(4,)), tmp_path / "projection.json")
    document = json.loads(path.read_text())
    document["study"]["batch"]["global_batch_size"] = 0
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"study\.batch\.global_batch_size must be above 0, got 0\. Write it again"):
        read_study(path)
