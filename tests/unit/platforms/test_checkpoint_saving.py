from types import SimpleNamespace

import pytest

from megatron_hammer.platforms import checkpoint_saving
from megatron_hammer.platforms.checkpoint_saving import WriterThread


@pytest.mark.parametrize("refused", ["setpriority", "getpriority"])
def test_a_host_that_forbids_priorities_gets_its_checkpoints(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """As in a container; the run would wait for its save without end."""

    def refuse(*arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint_saving.os, refused, refuse)
    monkeypatch.setattr(WriterThread, "_thread", None)
    written: list[object] = []
    caller = WriterThread()
    caller._get_process(rank=0, cpu_priority=5)
    request = SimpleNamespace(
        async_fn=lambda rank, buckets, results: written.append(rank),
        async_fn_args=(0, [], checkpoint_saving.ResultsQueue()),
        async_fn_kwargs={},
    )
    caller.schedule_async_call(request)
    caller._pending[0].result(timeout=10)
    assert written == [0]
    caller.close()
