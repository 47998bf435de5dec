#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/to_gguf.py."""

import sys

from megatron_hammer.cli.to_gguf import main

if __name__ == "__main__":
    sys.exit(main())
