#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/build_machine_conversations.py."""

import sys

from megatron_hammer.cli.build_machine_conversations import main

if __name__ == "__main__":
    sys.exit(main())
