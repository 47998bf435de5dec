"""What the two processes of `verify_conversion.py` exchange: the request, files in a temporary folder, and texts.

Imports neither torch, transformers nor megatron. The order: `transformers_forward.py` writes what transformers
computes, `megatron_forward.py` computes the same with Megatron's modules, compares, and writes numbers only.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REQUEST_FILE = "request.json"
REFERENCE_FILE = "reference.safetensors"
TRANSFORMERS_FINDINGS_FILE = "transformers.json"
MEGATRON_FINDINGS_FILE = "megatron.json"
NOT_DONE = "not_done"  # in findings: why a side could not start

MAX_TOKENS = 64  # of a text
NUM_RANDOM_TEXTS = 5  # where the folder has no tokenizer
SEED = 20_240_817

# Prose in two languages, code and mathematics, because tokenizers and models treat them differently.
DEFAULT_TEXTS = (
    "The old lighthouse keeper counted the waves every morning, and wrote their number in a book that nobody read. "
    "When the ship finally came, in the autumn of 1987, he had filled 31 volumes and lost count only twice.",
    "清晨的山谷里飘着薄雾，茶农们背着竹篓走上石阶。老人说，头一场春雨之后的三天，叶子最嫩，香气也最清。"
    "她把采下的新芽摊在竹匾上，一边听广播里的天气预报，一边算着今年能卖多少钱。",
    "def merge_sorted(left, right):\n    merged = []\n    while left and right:\n"
    "        source = left if left[0] <= right[0] else right\n        merged.append(source.pop(0))\n"
    "    return merged + left + right\n\nassert merge_sorted([1, 4], [2, 3, 9]) == [1, 2, 3, 4, 9]\n",
    "Let f(x) = x^3 - 3x + 1. Then f'(x) = 3x^2 - 3 vanishes at x = 1 and x = -1, where f(1) = -1 and f(-1) = 3. "
    "Since f(-2) = -1 < 0 < f(-1), the equation f(x) = 0 has three real roots; 求和：1 + 2 + … + n = n(n+1)/2。",
    '{"time": "2024-03-08T17:42:05+08:00", "user": "李雷", "tags": ["α", "naïve", "😀"], "total": 1234567.89}\n'
    "<p>Überprüfung &amp; Prüfung: 完成 ✓</p>",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardRequest:
    """One comparison. layers: None compares the whole model on `texts`; else each of these layers alone.

    dtype: of the computation. megatron_rounding, hf_rounding: the dtype that a side's stored weights are rounded to
    before that, so that a folder of fewer bits is compared with what it was made from; None where they are exact.
    window_shift: by how many tokens both sides shorten a sliding window, which no text here would fill as it is.
    hf_dtype: of most weights of the folder. num_tokens: of a text at most. rows: of the embedding and the head, that
    the check of layers looks at.
    """

    megatron_dir: str
    weights: str
    hf_dir: str
    vocab_size: int
    num_tokens: int
    has_experts: bool
    dtype: Literal["float32", "bfloat16"]
    hf_dtype: str = "float32"
    megatron_rounding: str | None = None
    hf_rounding: str | None = None
    texts: tuple[str, ...] = DEFAULT_TEXTS
    layers: tuple[int, ...] | None = None
    window_shift: int = 0
    rows: tuple[int, ...] = ()

    def write(self, folder: Path) -> None:
        (folder / REQUEST_FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


def read_request(folder: Path) -> ForwardRequest:
    values: dict[str, Any] = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    # JSON has no tuples, and a frozen request must stay hashable and equal to the one that was written.
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ForwardRequest(**{**values, **lists})


def write_findings(path: Path, findings: dict[str, Any]) -> None:
    path.write_text(json.dumps(findings), encoding="utf-8")


def read_findings(path: Path) -> dict[str, Any]:
    findings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return findings
