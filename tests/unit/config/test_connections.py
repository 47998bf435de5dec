import os

import pytest

from megatron_hammer.config.connections import CONNECTIONS, set_connections
from megatron_hammer.platforms import cuda

TP = ("--tensor-model-parallel-size", "2")


@pytest.mark.parametrize(
    ("argv", "capability", "before", "after"),
    [
        (TP, (9, 0), None, "1"),
        (("--context-parallel-size=4",), (8, 0), None, "1"),
        ((), (9, 0), None, None),
        (("--tensor-model-parallel-size", "1"), (9, 0), None, None),
        ((*TP, "--use-megatron-fsdp"), (9, 0), None, None),
        ((*TP, "--use-torch-fsdp2"), (9, 0), None, None),
        ((*TP, "--overlap-moe-expert-parallel-comm"), (9, 0), None, None),
        (TP, (10, 0), None, None),  # Blackwell
        (TP, None, None, None),  # no GPU
        (TP, (9, 0), "8", "8"),  # the user's own
    ],
)
def test_one_connection_where_kernels_must_keep_their_order(
    argv: tuple[str, ...],
    capability: tuple[int, int] | None,
    before: str | None,
    after: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "read_compute_capability", lambda index=0: capability)
    monkeypatch.setenv(CONNECTIONS, before or "")  # so that what is set below is undone
    if before is None:
        del os.environ[CONNECTIONS]
    set_connections(argv)
    assert os.environ.get(CONNECTIONS) == after
