"""Values of all ranks through one store, and who is named when some do not answer. Ranks are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_hammer.training.cluster.roll_call import MissingRanksError, RollCall

WORLD_SIZE = 4
TIMEOUT_S = 0.3


@pytest.fixture
def calls() -> list[RollCall]:
    store = torch.distributed.HashStore()
    found = [RollCall(store=store, rank=rank, world_size=WORLD_SIZE, timeout_s=TIMEOUT_S) for rank in range(WORLD_SIZE)]
    found[0].hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    return found


def test_rank_0_gets_every_value_and_the_others_its_own(calls: list[RollCall]) -> None:
    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        answers = list(pool.map(lambda call: call.gather("one", {"rank": call.rank}), calls))
        shared = list(pool.map(lambda call: call.share("two", [call.rank]), calls))
    assert answers == [[{"rank": rank} for rank in range(WORLD_SIZE)], None, None, None]
    assert shared == [[0]] * WORLD_SIZE


def test_a_rank_that_never_came_is_named_with_its_host(calls: list[RollCall]) -> None:
    for call in calls[:3]:
        call.enter("copy")
    # Rank 1 waits for rank 3, as in a collective; rank 2 is through.
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(calls[2].gather, "copy", {"value": 1})
        with pytest.raises(MissingRanksError, match=r"rank 3 \(b\) never began it; rank 1 \(a\) waited in it") as stop:
            calls[0].gather("copy", {"value": 0})
        assert stop.value.ranks == [3]
        with pytest.raises(MissingRanksError, match="rank 0 gave up"):
            waiting.result()


def test_where_all_began_those_that_did_not_finish_are_named(calls: list[RollCall]) -> None:
    for call in calls:
        call.enter("copy")
    for call in calls[1:3]:
        call.store.set(f"copy/{call.rank}/value", '{"error": "no space"}' if call.rank == 2 else '{"value": 0}')
    with pytest.raises(MissingRanksError, match=r"rank 3 \(b\) did not finish it; rank 2 .* failed: no space") as stop:
        calls[0].gather("copy", {"value": 0})
    assert stop.value.ranks == [3]


def test_a_rank_without_rank_0_does_not_wait_for_ever(calls: list[RollCall], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hammer.training.cluster.roll_call.REPORT_GRACE_S", 0.0)
    found: list[BaseException] = []

    def gather() -> None:
        try:
            calls[1].gather("copy", 1)
        except MissingRanksError as error:
            found.append(error)

    thread = threading.Thread(target=gather, daemon=True)
    thread.start()
    thread.join(20)
    assert "rank 0 did not answer" in str(found[0])
