"""The entry point of megatron_hammer/cli/check_environment.py, for an interpreter with nothing installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_hammer.cli.check_environment import main

if __name__ == "__main__":
    sys.exit(main())
