"""Calls that may never return, as those of torch's stores where a network has been cut.

They wait until the kernel gives up the connection, a quarter of an hour, whatever timeout they were given.
"""

import threading
from collections.abc import Callable

STORE_SILENCE_S = 30.0


def call_bounded[T](function: Callable[[], T], limit_s: float = STORE_SILENCE_S) -> T:
    """The result of `function`, or what it raises; raises TimeoutError after `limit_s`.

    It then runs on in a thread that ends with the process, so what it uses must not be used again.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return results[0]
