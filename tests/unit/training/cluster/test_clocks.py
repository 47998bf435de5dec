"""The skew of a clock that is wrong by a known time. The two ranks are threads."""

import threading
import time

import pytest
import torch

from megatron_hammer.training.cluster.clocks import answer_clock, ask_clocks


@pytest.mark.parametrize("ahead_s", [0.0, 5.0, -3.0])
def test_the_skew_is_known_to_its_stated_error(ahead_s: float) -> None:
    store = torch.distributed.HashStore()
    thread = threading.Thread(target=answer_clock, args=(store, 1, lambda: time.time() + ahead_s), daemon=True)
    thread.start()
    skew = ask_clocks(store, [1])[1]
    thread.join(20)
    assert 0 < skew.error_s < 20
    # A clock has a resolution too.
    assert abs(skew.seconds - ahead_s) <= skew.error_s + 1e-3
