"""What the words in a row's cells mean: recomputation, precision and sharding, as publications write them.

The first words of a cell say what was done. What stands in brackets or after a semicolon is a remark, which may name
the opposite: "none (full above 8k)" is no recomputation.
"""

import re

from megatron_hammer.scaling.plan import Precision, Recompute, Sharding

# Number formats as publications write them. Longer spellings of a format stand before shorter ones of another.
_FORMATS: tuple[tuple[str, Precision], ...] = (
    (r"nvfp4|fp4", "nvfp4"),
    (r"mxfp8|fp8[-_ ]?mx", "mxfp8"),
    (r"fp8|float8|e4m3", "fp8"),
    (r"bf[-_]?16|bfloat16", "bf16"),
    (r"(?<!b)fp[-_]?16|(?<!b)float16", "fp16"),
    (r"[tf][fp][-_]?32|float32", "fp32"),
)
_ANY_FORMAT = re.compile("|".join(f"({pattern})" for pattern, _ in _FORMATS))


def take_statement(cell: str) -> str:
    """The cell in lower case without remarks in brackets or after a semicolon; empty if it is nothing but a remark."""
    return re.sub(r"\(.*?(\)|$)", " ", cell.lower()).partition(";")[0].strip()


def list_formats(text: str) -> list[Precision]:
    """The number formats that a text names, in its order and each once."""
    found = [_FORMATS[match.lastindex - 1][1] for match in _ANY_FORMAT.finditer(text.lower()) if match.lastindex]
    return list(dict.fromkeys(found))


def name_precision(cell: str) -> Precision | None:
    """The format of the matrix products that a cell names: 'FP8-MX / fine-grained' -> mxfp8. None if it names none."""
    return next(iter(list_formats(take_statement(cell) or cell)), None)


def name_recompute(cell: str) -> Recompute | None:
    """What a cell says is recomputed: 'none (8k stages)' -> none. None if the words are not known."""
    text = take_statement(cell)
    if re.match(r"(none|no|not|off|false|without|0)\b", text):
        return "none"
    if re.match(r"selective\b", text):
        return "selective"
    if re.search(r"\b(full|uniform|block)\b", text) or text in ("yes", "on", "true", "1"):
        return "full"
    if re.search(r"selective|\bsac\b|core_attn", text):
        return "selective"
    return None


def name_sharding(cell: str) -> Sharding | None:
    """What a cell says is sharded: 'ZeRO-1 within 8 GPUs' -> distributed_optimizer. None if the words are unknown."""
    text = re.sub(r"zero[-_ ]*(stage)?[-_ ]*(?=\d)", "zero-", cell.lower())
    # "optim offload" says where the optimizer is, not that it is sharded.
    optim = r"\boptim(_grads)?(?![a-z_]| *(cpu *)?offload)"
    is_optimizer = re.search(rf"zero-[12]\b|zero[-_ ]*offload|dist(ributed)?[-_. ]*opt|shard_grad_op|{optim}", text)
    if is_optimizer and "optim_grads_params" not in text:
        return "distributed_optimizer"
    if re.search(r"fsdp|zero-3|full_shard|hsdp", text):
        return None if "no_shard" in text else "fsdp"
    if re.search(r"zero-0|\bddp\b|data.?parallel|no_shard", text) or text.strip() in ("none", "no"):
        return "none"
    return None


def read_shard_size(cell: str) -> int | None:
    """Over how many GPUs a cell says that is: 'FSDP2=64', 'ZeRO-1 within 8 GPUs'. None if it names no number."""
    match = re.search(r"within (?:a )?(\d+)|(?:fsdp\d?|shard)=(\d+)", cell.lower())
    return int(match[1] or match[2]) if match else None
