#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/evaluate_perplexity.py."""

import sys

from megatron_hammer.cli.evaluate_perplexity import main

if __name__ == "__main__":
    sys.exit(main())
