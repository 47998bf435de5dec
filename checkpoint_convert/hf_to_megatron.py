#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/hf_to_megatron.py."""

import sys

from megatron_hammer.cli.hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())
