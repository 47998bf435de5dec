#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/compare_runs.py."""

import sys

from megatron_hammer.cli.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
