#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/build_rank.py."""

import sys

from megatron_hammer.cli.build_rank import main

if __name__ == "__main__":
    sys.exit(main())
