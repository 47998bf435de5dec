"""What every test needs: one thread a process. It is set here because it counts only before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
