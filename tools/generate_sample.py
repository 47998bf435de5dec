#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/generate_sample.py."""

import sys

from megatron_hammer.cli.generate_sample import main

if __name__ == "__main__":
    sys.exit(main())
