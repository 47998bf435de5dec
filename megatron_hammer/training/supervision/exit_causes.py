"""Why a training process ended, as a sentence with a remedy. Pure."""

import signal


def describe_exit(exit_code: int) -> str:
    """What a person reads after "rank 3 on host7 ". exit_code: as subprocess gives it, negative for a signal."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed by {name}"
