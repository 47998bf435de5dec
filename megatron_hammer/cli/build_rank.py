"""Build one rank of a cluster of any size alone on this CPU, and report its place, layers, parameters and optimizer.

    hammer build-rank --preset llama2-70b --world-size 4096 --rank 3071 --tensor-model-parallel-size 8

All flags of training are accepted. Exit code 2: the layout is impossible; 1: the built rank differs from the count.
"""

import json
import sys
from collections.abc import Sequence

from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.files.command_line import CommandParser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see --help. Returns 1 if the built rank differs from the count, which is a bug of ours."""
    parser = CommandParser(
        "Build one rank of a large run alone. All flags of training are accepted too.", allow_abbrev=False
    )
    parser.add_argument("--preset", help="model and published layout to start from")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the whole run")
    parser.add_argument("--rank", type=int, required=True, help="rank to build, counted from 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # allow_abbrev=False above: an abbreviated flag of training must not be taken for one of these.
    arguments, rest = parser.parse_known_args(argv)

    # After the flags are parsed: --help must not wait for torch and megatron.
    from megatron_hammer.training.build_rank import DisagreementError, build_rank, print_built_rank

    # Parsed here only to be shown in --help; training parses it itself.
    preset = ["--preset", arguments.preset] if arguments.preset else []
    try:
        built = build_rank([*preset, "--world-size", str(arguments.world_size), *rest], arguments.rank)
    except DisagreementError as error:
        # Not "error:": the user can do nothing about it.
        print(f"bug: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(built.to_json()))
    else:
        print_built_rank(built)
    return 0
