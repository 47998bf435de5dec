#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/show_chat_masks.py."""

import sys

from megatron_hammer.cli.show_chat_masks import main

if __name__ == "__main__":
    sys.exit(main())
