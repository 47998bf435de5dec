"""The charts: complete, of a legible size, the same bytes each time, with the data that they name."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_hammer.scaling.evidence.validation import Prediction
from megatron_hammer.scaling.report import projection_plots as plots
from megatron_hammer.scaling.report.projection_plots import draw_plots
from megatron_hammer.scaling.search.projection import Overlay, StudyResult
from tests.helpers.toy_study import build_measured_run, build_toy_study, predict, project_toy_study


@pytest.fixture(scope="module")
def result() -> StudyResult:
    study = build_toy_study(num_best=1)
    weak = replace(study, global_batch_size=None, samples_per_gpu=Fraction(4))
    return project_toy_study(study, companion=project_toy_study(weak))


@pytest.fixture(scope="module")
def figures(result: StudyResult) -> Iterator[dict[str, Figure]]:
    """What draw_plots renders, before it is rendered."""
    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_render", lambda figure: drawn.append(figure) or b"")
        yield dict(zip(draw_plots(result), drawn, strict=True))


def texts(axis: Axes) -> list[str]:
    legend = axis.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_images_are_png_and_the_same_each_time(result: StudyResult) -> None:
    images = draw_plots(result)
    assert list(images) == ["scaling", "breakdown", "memory"]
    for image in images.values():
        assert image.startswith(b"\x89PNG\r\n")
        width, height = struct.unpack(">II", image[16:24])
        assert 900 < width < 2000
        assert 500 < height < 1100
    assert plots._render(plots._draw_memory(result)) == images["memory"]


def test_nothing_to_draw_where_nothing_fits() -> None:
    assert draw_plots(project_toy_study(build_toy_study(memory_limit_bytes=2**30, gpu_counts=(2,)))) == {}


def test_no_chart_has_a_single_point(result: StudyResult) -> None:
    one = project_toy_study(build_toy_study(gpu_counts=(8,), num_best=1))
    assert draw_plots(one) == {}
    several = project_toy_study(build_toy_study(gpu_counts=(8,)))
    assert list(draw_plots(several)) == ["breakdown", "memory"]
    (axis,) = plots._draw_breakdown(several).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["8-1", "8-2", "8-3"]
    assert axis.get_xlabel() == "row"
    # A companion of one size has no curve, and then no column.
    short = replace(result, companion=one)
    assert len(plots._draw_scaling(short).axes) == 2


def test_no_title_is_cut(result: StudyResult) -> None:
    """Also of names that are far longer than the chart is wide."""
    study = replace(result.study, model=replace(result.study.model, name="a-model-with-a-very-long-name-" * 5))
    for draw in (plots._draw_scaling, plots._draw_breakdown, plots._draw_memory):
        figure = draw(replace(result, study=study))
        FigureCanvasAgg(figure).draw()
        for text in (figure._suptitle, *(axis.title for axis in figure.axes)):
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
            assert box.y1 <= figure.bbox.height


def test_scaling_shows_both_ways_and_their_mfu(figures: dict[str, Figure]) -> None:
    strong, weak, strong_mfu, weak_mfu = figures["scaling"].axes
    assert strong.get_title() == "Strong scaling: 32 samples per step"
    assert weak.get_title() == "Weak scaling: 4 samples per GPU"
    assert strong.get_ylabel() == "tokens / s"
    assert texts(strong) == ["80 % band", "linear from 4 GPUs", "projected, best layout"]
    assert (strong_mfu.get_ylabel(), strong_mfu.get_xlabel()) == ("MFU (convention A)", "GPUs")
    assert strong_mfu.get_ylim()[0] == 0
    assert strong_mfu.get_ylim() == weak_mfu.get_ylim()
    assert [label.get_text() for label in strong_mfu.get_xticklabels()] == ["4", "8", "16"]


def test_the_curve_is_the_projection(result: StudyResult, figures: dict[str, Figure]) -> None:
    line = figures["scaling"].axes[0].get_lines()[1]
    best = [size.best for size in result.sizes if size.best is not None]
    assert list(line.get_xdata()) == [4, 8, 16]
    assert list(line.get_ydata()) == pytest.approx([one.plan.tokens_per_step / one.step.total_s for one in best])


def test_bars_add_up(result: StudyResult, figures: dict[str, Figure]) -> None:
    (breakdown,) = figures["breakdown"].axes
    (memory,) = figures["memory"].axes
    best = [size.best for size in result.sizes if size.best is not None]
    for axis, heights in ((breakdown, [1.0] * 3), (memory, [one.memory.total_bytes / 2**30 for one in best])):
        tops = [0.0] * 3
        for bars in axis.containers:
            tops = [top + bar.get_height() for top, bar in zip(tops, bars, strict=True)]
        assert tops == pytest.approx(heights, rel=0.01)
    assert "matrix products" in texts(breakdown)
    assert "limit 38.0 GiB" in texts(memory)
    assert memory.get_ylabel() == "GiB of one GPU"
    assert memory.get_ylim()[1] > 38


def test_the_knee_and_measured_runs_are_marked(result: StudyResult) -> None:
    assert result.knee is not None
    best = result.sizes[0].best
    assert best is not None
    runs = tuple(
        Prediction(run=build_measured_run(plan, 1.0), step=predict(plan), status="predicted")
        for plan in (best.plan, replace(best.plan, global_batch_size=64))
    )
    marked = replace(
        result,
        knee=replace(result.knee, num_gpus=8, num_gpus_beyond=16),
        companion=None,
        overlay=Overlay(runs=runs),
    )
    axis = plots._draw_scaling(marked).axes[0]
    assert texts(axis)[3:] == [
        "knee: 8 GPUs (80% of the best speed per GPU)",
        "measured",
        "measured, another batch or precision",
    ]


@pytest.mark.parametrize(("value", "words"), [(1.5e6, "1.5M"), (2e13, "20T"), (100.0, "100"), (3e4, "30k")])
def test_large_numbers_are_short(value: float, words: str) -> None:
    assert plots._shorten(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.01234, "12.3 ms"), (12.34, "12.3 s"), (999.9, "1e+03 s"), (4321.0, "4,321 s")]
)
def test_step_times(value: float, words: str) -> None:
    assert plots._format_seconds(value) == words
