#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/megatron_to_hf.py."""

import sys

from megatron_hammer.cli.megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
