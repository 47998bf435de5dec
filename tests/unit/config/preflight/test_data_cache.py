"""Cached sample indices are used only where they are what the run would build, whatever their times say."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.config.preflight.data import read_indices
from megatron_hammer.config.preflight.data_cache import find_cache_problems
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import find, parse
from tests.helpers.privileges import folder_of_everyone, without_privileges
from tests.helpers.sample_orders import build_datasets, draw_lengths, write_numbered

FLAGS = ("--preset", "hammer-tiny", "--vocab-size", "1000000", "--seq-length", "64", "--train-iters", "20")
FLAGS += ("--micro-batch-size", "2", "--global-batch-size", "4", "--lr-warmup-iters", "1", "--eval-iters", "1")
LENGTHS = draw_lengths(0, 97)


def renew(prefix: str, lengths: list[int]) -> None:
    """Write the pair again with its old times, as `rsync -a` brings another one."""
    times = {suffix: os.stat(prefix + suffix) for suffix in (".bin", ".idx")}
    write_numbered(Path(prefix), lengths)
    for suffix, old in times.items():
        os.utime(prefix + suffix, ns=(old.st_atime_ns, old.st_mtime_ns))


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
    problems = find(*flags)
    assert problems
    for problem in problems:
        assert_problem(
            problem, "data-cache-path:", "sample indices must be those", f"got others for {data} in {cache}/", "Delete"
        )
        (base,) = (word.rstrip("*.") for word in problem.split() if word.startswith(str(cache)))
        assert len(list(cache.glob(f"{Path(base).name}*"))) == 4
    assert find(*flags, "--seed", "99") == [], "caches of other runs are read by those alone"
    for path in cache.iterdir():
        path.unlink()
    build_datasets(parse(*flags), (80, 8, 0))
    assert find(*flags) == []


def zero(path: Path) -> None:
    array = np.load(path)
    np.save(path, np.zeros_like(array))


def rotate(path: Path) -> None:
    array = np.load(path)
    np.save(path, np.roll(array, 1, axis=0))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap_two(path: Path) -> None:
    array = np.load(path)
    other = int(np.argmax((array != array[0]).reshape(len(array), -1).any(axis=1)))
    array[[0, other]] = array[[other, 0]]
    np.save(path, array)


PARTS = ("document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index")


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[], list[str]]]:
    """The cache of a run of two sources and several epochs, so that nothing is in file order, and its check."""
    folder = tmp_path_factory.mktemp("blend")
    first = write_numbered(folder / "a", LENGTHS)
    second = write_numbered(folder / "b", draw_lengths(1, 61))
    flags = (*FLAGS, "--data-path", "0.7", first, "0.3", second, "--split", "80,20,0", "--train-iters", "90")
    flags += ("--data-cache-path", str(folder / "cache"))
    build_datasets(arguments := parse(*flags), (300, 8, 0))
    assert find(*flags) == []
    data = arguments.settings.data
    indices, _ = read_indices(data.sources)
    return folder / "cache", lambda: find_cache_problems(data, indices, 64)


@pytest.mark.parametrize("damage", [zero, rotate, cut_short, empty, swap_two])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_cache_is_refused(
    blend: tuple[Path, Callable[[], list[str]]], part: str, damage: Callable[[Path], None]
) -> None:
    cache, find_problems = blend
    assert find_problems() == []
    path = next(path for path in sorted(cache.glob(f"*-train-{part}.npy")))
    content = path.read_bytes()
    try:
        damage(path)
        (problem,) = find_problems()
    finally:
        path.write_bytes(content)
    assert_problem(problem, "data-cache-path:", str(path.name).removesuffix(f"{part}.npy"))


def test_a_damaged_description_is_refused(blend: tuple[Path, Callable[[], list[str]]]) -> None:
    cache, find_problems = blend
    (path,) = cache.glob("*-BlendedDataset-train-description.txt")
    content = path.read_text()
    try:
        path.write_text(content.replace('"size": 3', '"size": 9'))
        (problem,) = find_problems()
    finally:
        path.write_text(content)
    assert_problem(problem, "data-cache-path:", str(path), "damaged")


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_header_is_refused(blend: tuple[Path, Callable[[], list[str]]], part: str) -> None:
    """numpy reads it as Python, so that any error of a parser may come out of it."""
    cache, find_problems = blend
    path = next(path for path in sorted(cache.glob(f"*-train-{part}.npy")))
    content = path.read_bytes()
    try:
        for at in range(128):
            for flipped in (255, 1 << at % 8):
                path.write_bytes(content[:at] + bytes([content[at] ^ flipped]) + content[at + 1 :])
                assert len(find_problems()) <= 1  # none where it is the header's space
    finally:
        path.write_bytes(content)


def test_sources_that_are_each_read_once(tmp_path: Path) -> None:
    pairs = [write_numbered(tmp_path / name, draw_lengths(seed, 50)) for seed, name in enumerate("ab")]
    flags = (*FLAGS, "--train-iters", "4", "--data-path", *pairs, "--split", "100,0,0", "--eval-iters", "0")
    flags += ("--data-cache-path", str(tmp_path / "cache"))
    build_datasets(parse(*flags))
    assert find(*flags) == []
    (path,) = (tmp_path / "cache").glob("*-BlendedDataset-train-dataset_index.npy")
    zero(path)
    assert len(find(*flags)) == 1


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
    assert f"got others for {data} in {folder}/" in problem


def test_other_files_in_the_cache_folder_are_left_alone(tmp_path: Path) -> None:
    data, cache = write_numbered(tmp_path / "a", LENGTHS), tmp_path / "cache"
    cache.mkdir()
    (cache / "x-description.txt").write_text("no JSON")
    (cache / "y-description.txt").write_text("[]")
    (cache / "z-description.txt").write_text(json.dumps({"dataset_path": data, "index_split": "train"}))
    (cache / "b-description.txt").write_text(json.dumps({"datasets": ["x"]}))
    assert find(*FLAGS, "--data-path", data, "--split", "80,20,0", "--data-cache-path", str(cache)) == []


def test_a_cache_that_is_only_read_must_be_there(tmp_path: Path) -> None:
    data, cache = write_numbered(tmp_path / "a", LENGTHS), tmp_path / "cache"
    flags = (*FLAGS, "--data-path", data, "--split", "80,20,0", "--data-cache-path", str(cache))

    def find_fast() -> list[str]:
        problems = find(*flags, "--dataloader-fast-cache-load")
        return [problem for problem in problems if "builds none" in problem]

    (problem,) = find_fast()
    assert_problem(problem, "dataloader-fast-cache-load:", f"got none for {data} in {cache}", "build_data_cache.py")
    build_datasets(parse(*flags), (80, 8, 0))
    assert find_fast() == []
    for path in cache.glob("*-shuffle_index.npy"):
        path.unlink()
    assert len(find_fast()) == 1
    assert find(*flags) == []


def test_data_in_a_folder_that_cannot_be_written_needs_a_cache_folder() -> None:
    with folder_of_everyone() as folder:
        data = write_numbered(folder / "a", LENGTHS)
        flags = (*FLAGS, "--data-path", data, "--split", "80,20,0")
        parse(*flags)
        with without_privileges():
            assert any(problem.startswith("data-cache-path: must be given") for problem in find(*flags))
        build_datasets(parse(*flags, "--data-cache-path", f"{data}/cache/GPTDataset_indices"), (80, 8, 0))
        with without_privileges():
            assert not any("data-cache-path" in problem for problem in find(*flags))
