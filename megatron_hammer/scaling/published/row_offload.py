"""What a table row keeps on the host, as its cells of sharding and recomputation say it in words.

A cell says enough if it names the optimizer ("ZeRO-3, optimizer offload 50%"), if nothing else can be meant ("ZeRO-1 +
offload"), or if it has the number of layers whose activations wait there.
"""

import re
from typing import NamedTuple

from megatron_hammer.scaling.plan import Sharding
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.run_table import RunRow


class Offload(NamedTuple):
    """Fields of a plan, and of the options of memory, by their names there."""

    optimizer_offload_ratio: float = 0.0
    num_offloaded_layers: int = 0


def read_offload(row: RunRow, sharding: Sharding, num_layers: int, assumptions: list[str]) -> Offload:
    """What a run of a model with so many layers keeps on the host.

    Raises UnpredictableError where the cells leave that open or name what is not modelled.
    """
    found = Offload()
    # Sharded parameters may go to the host too; whole ones, which every pass needs, never do.
    has_whole_parameters = sharding != "fsdp"
    for phrase in _list_phrases(row.sharding):
        found = _add_phrase(found, phrase, num_layers, assumptions, means_optimizer=has_whole_parameters)
    for phrase in _list_phrases(row.recompute):
        found = _add_phrase(found, phrase, num_layers, assumptions, means_optimizer=False)
    if found == Offload() and "offload" in row.notes.lower():
        assumptions.append("nothing is offloaded to the host: only the notes speak of it")
    return found


def _list_phrases(cell: str) -> list[str]:
    """The parts of a cell that say that something is offloaded."""
    parts = re.split(r"[+,;()&/]|\b(?:and|with)\b", cell.lower())
    is_denied = re.compile(r"\b(no|not|without|never)\b|offload\w*\W+(off|none|no|false)\b")
    return [part.strip() for part in parts if part and "offload" in part and not is_denied.search(part)]


def _add_phrase(
    found: Offload, phrase: str, num_layers: int, assumptions: list[str], *, means_optimizer: bool
) -> Offload:
    """means_optimizer: if the phrase names nothing."""
    if re.search(r"nvme|disk|ssd|infinity", phrase):
        raise UnpredictableError(f"what it keeps on disks is not modelled: {phrase!r}")
    if re.search(r"param|weight", phrase):
        raise UnpredictableError(f"parameters on the host are not modelled: {phrase!r}")
    if re.search(r"activ|layer|attn|mlp|moe|norm|linear", phrase):
        return found._replace(num_offloaded_layers=_read_num_layers(phrase, num_layers))
    if re.search(r"optim|\bopt\b|adam", phrase) or means_optimizer:
        return found._replace(optimizer_offload_ratio=_read_ratio(phrase, assumptions))
    raise UnpredictableError(f"what of it is offloaded to the host is not stated: {phrase!r}")


def _read_num_layers(phrase: str, num_layers: int) -> int:
    stated = re.search(r"(\d+) layers?\b", phrase)
    if stated is None:
        raise UnpredictableError(f"of how many layers the activations are offloaded is not stated: {phrase!r}")
    number = int(stated[1])
    if not 0 < number < num_layers:
        raise UnpredictableError(f"{phrase!r} is not of 1 to {num_layers - 1} of its {num_layers} layers")
    return number


def _read_ratio(phrase: str, assumptions: list[str]) -> float:
    stated = re.search(r"(\d+(?:\.\d+)?) ?%|(?<![\d.])(\d*\.\d+)", phrase)
    if stated is None:
        assumptions.append(f"the whole optimizer on the host: {phrase!r} names no share")
        return 1.0
    ratio = float(stated[1]) / 100 if stated[1] else float(stated[2])
    if not 0 < ratio <= 1:
        raise UnpredictableError(f"the share of the optimizer in {phrase!r} is not above 0 and at most all of it")
    return ratio
