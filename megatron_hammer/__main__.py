"""`python -m megatron_hammer`: the same as `hammer`."""

import sys

from megatron_hammer.cli.hammer import main

if __name__ == "__main__":
    sys.exit(main())
