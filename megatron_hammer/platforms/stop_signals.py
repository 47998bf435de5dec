"""The signals that ask a run to stop."""

import signal

# torchrun's own list, and the warning of a scheduler. Training saves and stops on each of them.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
