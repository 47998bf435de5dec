import threading
import time

import pytest

from megatron_hammer.training.supervision.launcher.bounded_call import call_bounded


def test_results_and_errors_come_back() -> None:
    assert call_bounded(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        call_bounded(lambda: 1 // 0)


def test_what_does_not_return_is_left() -> None:
    release = threading.Event()
    begun_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        call_bounded(release.wait, 0.05)
    assert time.monotonic() - begun_s < 30
    release.set()
