#!/usr/bin/env python3
"""The entry point of megatron_hammer/cli/scaling_study/."""

import sys

from megatron_hammer.cli.scaling_study.main import main

if __name__ == "__main__":
    sys.exit(main())
