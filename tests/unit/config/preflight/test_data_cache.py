import json
import os
import time
from pathlib import Path

import pytest

from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import find, parse
from tests.helpers.sample_orders import build_datasets, draw_lengths, write_numbered

FLAGS = ("--preset", "hammer-tiny", "--vocab-size", "1000000", "--seq-length", "64", "--train-iters", "20")
FLAGS += ("--micro-batch-size", "2", "--global-batch-size", "4", "--lr-warmup-iters", "1", "--eval-iters", "1")
LENGTHS = draw_lengths(0, 97)


def renew(prefix: str, lengths: list[int]) -> None:
    """Write the pair again, some seconds later."""
    write_numbered(Path(prefix), lengths)
    later_s = time.time() + 10
    os.utime(f"{prefix}.idx", (later_s, later_s))


@pytest.mark.parametrize("order", ["megatron", "epochwise"])
@pytest.mark.parametrize(
    "lengths",
    [[*LENGTHS, 70], LENGTHS[:-1], LENGTHS[::-1], [LENGTHS[0] + 1, LENGTHS[1] - 1, *LENGTHS[2:]]],
    ids=["more", "fewer", "another row", "another cut"],
)
def test_a_cache_built_for_other_documents_is_refused(tmp_path: Path, order: str, lengths: list[int]) -> None:
    data, cache = write_numbered(tmp_path / "a", LENGTHS), tmp_path / "cache"
    flags = (*FLAGS, "--data-path", data, "--split", "80,20,0", "--data-cache-path", str(cache), "--data-order", order)
    build_datasets(parse(*flags), (80, 8, 0))
    assert find(*flags) == []
    renew(data, LENGTHS)
    assert find(*flags) == [], "the same documents, written again"
    renew(data, lengths)
    (problem,) = find(*flags)
    assert_problem(
        problem,
        "data-cache-path:",
        "sample indices must be those",
        f"got others for {data} in {cache}, older than its .idx",
        f"Delete the files in {cache}",
    )


def test_megatrons_own_folder_and_separate_sets(tmp_path: Path) -> None:
    data = write_numbered(tmp_path / "a", LENGTHS)
    other = write_numbered(tmp_path / "b", LENGTHS)
    flags = (*FLAGS, "--train-data-path", data, "--valid-data-path", other)
    folder = Path(data, "cache", "GPTDataset_indices")
    build_datasets(parse(*flags, "--data-cache-path", str(folder)), (80, 8, 0))
    renew(data, LENGTHS)
    assert find(*flags) == []
    renew(data, LENGTHS[::-1])
    (problem,) = find(*flags)
    assert f"got others for {data} in {folder}, older" in problem


def test_other_files_in_the_cache_folder_are_ignored(tmp_path: Path) -> None:
    data, cache = write_numbered(tmp_path / "a", LENGTHS), tmp_path / "cache"
    cache.mkdir()
    (cache / "x-description.txt").write_text("no JSON")
    (cache / "y-description.txt").write_text("[]")
    (cache / "z-description.txt").write_text(json.dumps({"dataset_path": data, "index_split": "train"}))
    renew(data, LENGTHS)
    assert find(*FLAGS, "--data-path", data, "--split", "80,20,0", "--data-cache-path", str(cache)) == []
