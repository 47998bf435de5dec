#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/tokenizer_analyze.py."""

import sys

from megatron_hammer.cli.tokenizer_analyze import main

if __name__ == "__main__":
    sys.exit(main())
