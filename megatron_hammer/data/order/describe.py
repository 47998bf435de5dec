"""Two orders in words: which settings and sources differ, and how the epochs of a source are shuffled."""

from megatron_hammer.data.order.change import match_sources
from megatron_hammer.data.order.identity import is_same_data
from megatron_hammer.data.order.order import DataOrder, SourceOrder


def list_order_changes(old: DataOrder, new: DataOrder) -> list[str]:
    """What shapes the order and differs, each with its new and its old value."""
    pairs = [
        (name, getattr(new, name), getattr(old, name)) for name in ("seed", "seq_length", "dataloader_type", "rows")
    ]
    # Another spelling of the split, such as 98,2,0 for 49,1,0, changes nothing.
    if old.split != new.split and [_bounds(source) for source in old.sources] != [
        _bounds(source) for source in new.sources
    ]:
        pairs.append(("split", new.split, old.split))
    changes = [f"{name}={now} (was {before})" for name, now, before in pairs if now != before]
    source_changes, has_other_epochs = _list_source_changes(old, new)
    # These four settings act on the order through the epochs only, so they are named only where those differ.
    if has_other_epochs:
        causes = ("order", "num_samples", "joint_samples", "surplus")
        names = {"order": "data_order", "num_samples": "samples", "joint_samples": "data_order_samples"}
        changes += [
            f"{names.get(name, name)}={getattr(new, name)} (was {getattr(old, name)})"
            for name in causes
            if getattr(new, name) != getattr(old, name)
        ]
    return changes + source_changes


def _bounds(source: SourceOrder) -> tuple[int, int]:
    return source.first_sequence, source.last_sequence


def _list_source_changes(old: DataOrder, new: DataOrder) -> tuple[list[str], bool]:
    """Changes source by source, and whether another number of epochs is shuffled together in one of them."""
    old_keys, new_keys = match_sources(old, new)
    shares = [_shares(order) for order in (old, new)]
    changes, has_other_epochs = [], False
    for place, (key, source) in enumerate(zip(new_keys, new.sources, strict=True)):
        if key not in old_keys:
            namesake = next((other for other in old.sources if other.prefix == source.prefix), None)
            changes.append(f"{source.prefix} {_describe_contents(source, namesake)}")
            continue
        before = old.sources[old_keys.index(key)]
        if shares[0][old_keys.index(key)] != shares[1][place]:
            old_share, new_share = shares[0][old_keys.index(key)], shares[1][place]
            changes.append(f"{source.prefix} with weight {new_share:.6g} (was {old_share:.6g})")
        if _joint_epochs(before) != _joint_epochs(source):
            has_other_epochs = True
            changes.append(f"{source.prefix} with {describe_epochs(source)} (was {describe_epochs(before)})")
    gone = [source.prefix for key, source in zip(old_keys, old.sources, strict=True) if key not in new_keys]
    new_prefixes = {source.prefix for source in new.sources}
    changes += [f"no {prefix}" for prefix in gone if prefix not in new_prefixes]
    # The same sources in another row: the blend numbers them by their place.
    if sorted(old_keys) == sorted(new_keys) and old_keys != new_keys:
        row, old_row = (", ".join(source.prefix for source in order.sources) for order in (new, old))
        changes.append(f"sources in the row {row} (was {old_row})")
    return changes, has_other_epochs


def _shares(order: DataOrder) -> list[float]:
    return order.blend_weights if order.is_blend else [1.0]


def _describe_contents(source: SourceOrder, before: SourceOrder | None) -> str:
    if before is None:
        return "as a new source"
    now, then = source.identity, before.identity
    for name in ("num_documents", "num_sequences", "num_tokens"):
        if getattr(now, name) != getattr(then, name):
            return f"with other contents: {name}={getattr(now, name)} (was {getattr(then, name)})"
    assert is_same_data(now, then) is False
    return "with other contents: as many documents and tokens, but not the same"


def _joint_epochs(source: SourceOrder) -> tuple[int, bool]:
    return source.epochs.num_joint_epochs, source.epochs.is_last_apart


def describe_epochs(source: SourceOrder) -> str:
    """3 epochs shuffled together, the last apart"""
    num_epochs, num_joint = source.epochs.num_epochs, source.epochs.num_joint_epochs
    if num_joint == 1:
        return "one epoch" if num_epochs == 1 else f"each of {num_epochs} epochs shuffled by itself"
    apart = ", the last apart" if source.epochs.is_last_apart else ""
    later = f", then {num_epochs - num_joint} by themselves" if num_epochs > num_joint else ""
    return f"{num_joint} epochs shuffled together{apart}{later}"
