"""Flags that have no effect beside the others: typed, accepted by Megatron, and never used.

Only typed flags are reported; a preset's own values are silent. The tables are in config/flag_tables/.
"""

from megatron_hammer.config.flag_tables.effective import EFFECTIVE
from megatron_hammer.config.flag_tables.model_rows import EXPERTS, MODEL
from megatron_hammer.config.flag_tables.row import Idle
from megatron_hammer.config.flag_tables.run_rows import CHECKPOINTS, DATA, OTHER_PROGRAMS, WATCHING
from megatron_hammer.config.flag_tables.training_rows import FORMATS_AND_SPEED, OPTIMIZER, PARALLELISM
from megatron_hammer.config.flags import Flags, flag_of

IDLE: tuple[Idle, ...] = (
    *MODEL,
    *EXPERTS,
    *PARALLELISM,
    *OPTIMIZER,
    *FORMATS_AND_SPEED,
    *DATA,
    *CHECKPOINTS,
    *WATCHING,
    *OTHER_PROGRAMS,
)


def find_idle_problems(flags: Flags, refused: frozenset[str]) -> list[str]:
    """A problem for each typed flag that would change nothing, or of which that is not known.

    refused: attributes that other checks refuse whatever is beside them.
    """
    known = EFFECTIVE | refused
    problems = []
    for name in sorted(flags.typed - known):
        rows = list_rows(name, known)
        idle = next((row for row in rows if row.is_idle(flags)), None)
        if idle is not None:
            problems.append(_describe(name, f"has no effect {idle.why}", idle.remedy))
        elif not rows:
            problems.append(_describe(name, "is not known to have an effect with this version of megatron", "Drop it"))
    return problems


def list_rows(name: str, known: frozenset[str]) -> list[Idle]:
    """The rows of a flag: by its full name, and by how it begins. None where it is among `known`."""
    if name in known:
        return []
    return [row for row in IDLE if any(name == n or (n.endswith("_") and name.startswith(n)) for n in row.names)]


def _describe(name: str, what: str, remedy: str) -> str:
    flag = flag_of(name)
    return f"{flag}: {what}, got --{flag} typed. {remedy}."
