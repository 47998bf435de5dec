"""What the report opens with: the decision, how sure it is and what it assumes; from decisions/study_decision.py."""

from dataclasses import dataclass

from megatron_hammer.scaling.report.projection_tables import ResultTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """In words for readers. headline: the decision in a sentence; actions: what to do; doubts: how sure it is.

    options: a line for each number of GPUs, of which the decision is one. None where nothing fits.
    """

    headline: str
    actions: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    options: ResultTable | None = None
    assumptions: tuple[str, ...] = ()
