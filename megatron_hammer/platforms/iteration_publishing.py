"""How Megatron publishes a torch_dist checkpoint; installed by `megatron_compat.install`.

An iteration is written into a folder of another name, which gets its own name when everything in it is on the disk,
with the hashes of its files. The hashes are computed where the bytes are written: in this process, or in the worker
of an asynchronous save. Read next: checkpoint_files/torch_dist/content_hashes.py, checkpoint_files/iterations.py.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_hammer.checkpoint_files.iterations import begin_iteration, publish_iteration
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import FileHash, HashingFile
from megatron_hammer.files.publish import publish_file

# Called on rank 0 with the folder of a tracker that names a new iteration.
_listeners: list[Callable[[Path], object]] = []
# Hashes of the shards of the save that rank 0 is finishing, by the folder that is written.
_hashes: dict[str, dict[str, FileHash]] = {}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Travels to rank 0 among torch's WriteResults."""

    name: str
    content: FileHash


def apply() -> None:
    """Change what Megatron calls to save an iteration, to write its shards, and to write the tracker."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing

    dist_checkpointing.save = publish_whole_iterations(dist_checkpointing.save)
    hash_written_files(FileSystemWriterAsync)
    checkpointing.maybe_msc = AtomicWriting(checkpointing.maybe_msc)


def after_each_save(listener: Callable[[Path], object]) -> None:
    """Have `listener(save_dir)` called on rank 0 whenever the tracker of a folder has been replaced."""
    _listeners.append(listener)


def publish_whole_iterations(save: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap dist_checkpointing.save, which writes into the folder that it is given, over what lies there."""

    @functools.wraps(save)
    def save_and_publish(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        is_first_rank = torch.distributed.get_rank() == 0
        directory = Path(checkpoint_dir)
        unfinished_dir = begin_iteration(directory, is_writer=is_first_rank)
        torch.distributed.barrier()  # a folder that another rank still clears must not be written to

        def publish() -> None:
            if is_first_rank:
                publish_iteration(unfinished_dir, directory, _hashes.pop(str(unfinished_dir), {}))
            torch.distributed.barrier()

        # Megatron's own hashes are computed by rank 0 alone, which reads all files again.
        kwargs["verify_integrity"] = False
        request = save(sharded_state_dict, str(unfinished_dir), *args, **kwargs)
        if request is None:
            publish()
        else:
            request.finalize_fns.append(publish)
        return request

    return save_and_publish


class AtomicWriting:
    """Megatron's `maybe_msc` for megatron.training.checkpointing, which writes one file with it: the tracker.

    open(path, "w") yields a file that replaces the old one when it is complete. Everything else is Megatron's.
    """

    def __init__(self, original: Any):
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return _replace_text(Path(path)) if mode == "w" else self._original.open(path, mode, **options)


@contextlib.contextmanager
def _replace_text(path: Path) -> Iterator[TextIO]:
    with publish_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", write_through=True)
        yield text
        text.detach()
    for listener in _listeners:
        listener(path.parent)


def hash_written_files(writer: Any) -> None:
    """Have FileSystemWriterAsync hash what it writes, and bring the hashes to rank 0 with torch's write results."""
    original_function, original_finish = writer.get_save_function_and_args, writer.finish

    @functools.wraps(original_function)
    def get_save_function_and_args(self: Any) -> Any:
        write, preload, arguments = original_function(self)
        return write and functools.partial(write_with_hashes, write), preload, arguments

    @functools.wraps(original_finish)
    def finish(self: Any, metadata: Any, results: Any) -> None:
        written = [entry for of_rank in results for entry in of_rank if isinstance(entry, WrittenFile)]
        _hashes[str(self.checkpoint_dir)] = {file.name: file.content for file in written}
        original_finish(self, metadata, [[e for e in of_rank if not isinstance(e, WrittenFile)] for of_rank in results])

    writer.get_save_function_and_args, writer.finish = get_save_function_and_args, finish


def write_with_hashes(write: Callable[..., None], rank: int, write_buckets: Any, results_queue: Any) -> None:
    """Run Megatron's function that writes the shards of this rank, in whichever process or thread it is called.

    A module function, because an asynchronous save may pickle it for its worker.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # A name of the module hides the builtin there; no other function of the module opens a file.
    vars(filesystem_async)["open"] = _open_for_hashing

    class ResultsWithHashes:
        """The queue of results, as the writer sees it."""

        def put(self, results: Any) -> None:
            written = [(Path(path).name, _opened.pop(str(path), None)) for path, _, _ in write_buckets]
            if isinstance(results, dict):  # else the exception that ended the writing
                entries = next(iter(results.values()))
                entries += [WrittenFile(name, file.content) for name, file in written if file is not None]
            results_queue.put(results)

    write(rank, write_buckets, ResultsWithHashes())


_opened: dict[str, HashingFile] = {}


def _open_for_hashing(path: str, mode: str) -> HashingFile:
    assert mode == "wb"
    _opened[str(path)] = file = HashingFile(path)
    return file
