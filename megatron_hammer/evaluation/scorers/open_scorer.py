"""Opens a model of any kind for evaluation: a checkpoint of Megatron, a Hugging Face folder or a GGUF file.

    use_scorer(Path("checkpoints/hammer"), ScorerOptions(), lambda scorer: evaluate(scorer))

Under torchrun every process calls this. Rank 0 evaluates; the others hold their part of the model for it and get None.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hammer.errors import ConfigError
from megatron_hammer.evaluation.scorers.megatron_ranks import (
    ModelLayout,
    is_first_process,
    join_ranks,
    validate_layout,
)
from megatron_hammer.evaluation.scorers.scorer import Scorer
from megatron_hammer.tokenizer.encoding.encoder import load_encoder

PRECISIONS = ("fp32", "bf16", "fp16")
DEFAULT_PRECISION = {"cpu": "fp32", "cuda": "bf16"}
DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerOptions:
    """How to open a model. tokenizer_path: None for the model's own; a GGUF file has only its own. layout: of a
    checkpoint of Megatron; other models are computed by rank 0.

    precision: of the arithmetic; None: fp32 on a CPU, bf16 on a GPU; a GGUF file has its own. max_batch_tokens:
    computed at once; None: the platform's default. iteration: of a checkpoint; None: the newest.
    """

    tokenizer_path: Path | None = None
    layout: ModelLayout = field(default_factory=ModelLayout)
    precision: str | None = None
    max_batch_tokens: int | None = None
    iteration: int | None = None


def use_scorer[T](path: Path, options: ScorerOptions, work: Callable[[Scorer], T]) -> T | None:
    """What `work` returns for the opened model, on rank 0; None on every other rank.

    Raises HammerError if the model or its tokenizer cannot be opened.
    """
    validate_layout(options.layout)
    platform = options.layout.platform
    precision = options.precision or DEFAULT_PRECISION[platform]
    max_batch_tokens = options.max_batch_tokens or DEFAULT_BATCH_TOKENS[platform]
    kind = find_kind(path)
    if kind == "megatron":
        return _use_megatron(path, options, precision, max_batch_tokens, work)
    if not is_first_process():
        return None
    if kind == "gguf":
        return _use_gguf(path, options, work)
    encoder = None if options.tokenizer_path is None else load_encoder(options.tokenizer_path)
    from megatron_hammer.evaluation.scorers.hugging_face import HuggingFaceScorer

    return work(
        HuggingFaceScorer(
            path, device=platform, precision=precision, max_batch_tokens=max_batch_tokens, encoder=encoder
        )
    )


def _use_megatron[T](
    path: Path, options: ScorerOptions, precision: str, max_batch_tokens: int, work: Callable[[Scorer], T]
) -> T | None:
    with join_ranks(options.layout) as ranks:
        from megatron_hammer.evaluation.scorers.megatron import MegatronScorer

        scorer = MegatronScorer(
            path,
            iteration=options.iteration,
            tokenizer_path=options.tokenizer_path,
            layout=options.layout,
            ranks=ranks,
            precision=precision,
            max_batch_tokens=max_batch_tokens,
        )
        if ranks.rank:
            scorer.serve()
            return None
        has_failed = True
        try:
            result = work(scorer)
            has_failed = False
        finally:
            ranks.end(has_failed=has_failed)
        return result


def _use_gguf[T](path: Path, options: ScorerOptions, work: Callable[[Scorer], T]) -> T:
    fixed = {"tokenizer-model": options.tokenizer_path, "precision": options.precision}
    for name, value in fixed.items():
        if value is not None:
            raise ConfigError(f"{name}: a GGUF file has its own, got {value} for {path}. Evaluate it by itself.")
    from megatron_hammer.evaluation.scorers.gguf import open_gguf

    with open_gguf(path) as scorer:
        return work(scorer)


def find_kind(path: Path) -> str:
    """`hugging_face`, `gguf` or `megatron`, by what lies at the path; raises ConfigError if nothing does."""
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir():
        raise ConfigError(
            f"{path}: model must be a checkpoint of Megatron, a Hugging Face folder or a .gguf file, got "
            f"{'another file' if path.exists() else 'nothing'}. Check the path."
        )
    return "hugging_face" if (path / "config.json").is_file() else "megatron"
