#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/check_chat.py."""

import sys

from megatron_hammer.cli.check_chat import main

if __name__ == "__main__":
    sys.exit(main())
