"""Every document falls into one bin, and the plot is a PNG."""

from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.inspect.length_histogram import build_histogram, plot_histogram, write_histogram_csv


@pytest.mark.parametrize("bins_per_octave", [1, 4])
@pytest.mark.parametrize("longest", [0, 1, 2, 3, 4, 1023, 1024, 50_000_000])
def test_every_length_has_one_bin(longest: int, bins_per_octave: int) -> None:
    lengths = np.random.default_rng(longest).integers(0, longest + 1, 500)
    lengths[0] = longest
    histogram = build_histogram(lengths, bins_per_octave)
    assert histogram.edges.tolist() == sorted(set(histogram.edges.tolist()))
    assert histogram.edges[:2].tolist() == [0, 1]
    assert histogram.edges[-2] <= longest < histogram.edges[-1]
    expected = [
        ((lengths >= low) & (lengths < high)) for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)
    ]
    assert histogram.num_documents.tolist() == [int(mask.sum()) for mask in expected]
    assert histogram.num_tokens.tolist() == [int(lengths[mask].sum()) for mask in expected]
    assert histogram.num_documents.sum() == 500


def test_bins_double() -> None:
    assert build_histogram(np.array([9])).edges.tolist() == [0, 1, 2, 4, 8, 16]
    assert build_histogram(np.array([], dtype=np.int64)).edges.tolist() == [0, 1]


def test_csv(tmp_path: Path) -> None:
    write_histogram_csv(tmp_path / "h.csv", build_histogram(np.array([0, 1, 3, 3])))
    expected = "min_tokens,max_tokens,documents,tokens\n0,0,1,0\n1,1,1,1\n2,3,2,6\n"
    assert (tmp_path / "h.csv").read_bytes() == expected.encode()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 5], [7], [1] * 2000 + [300_000]])
def test_plot(tmp_path: Path, lengths: list[int]) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        plot_histogram(path, np.array(lengths, dtype=np.int64), "title_with$signs$")
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[0].read_bytes() == paths[1].read_bytes()
