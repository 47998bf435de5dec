"""What an evaluation asks of a model: the file of `hammer evaluate --suite` and of `--evaluate-suite` in training.

Preflight reads it before a run starts, so it lies here and not in evaluation/, which does what it says.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSuite:
    """tasks: of lm-eval, ours or of tasks_dir. domains: by name, texts for perplexity and bits per byte: an input that
    the preprocessor reads, or a .bin/.idx pair that tokenizer_model encoded. json_key: the field of their text.
    max_documents: of each domain; None: all. Paths are relative to the folder where the command was started.

    num_fewshot: examples before each question; with several numbers, every task is run with each. limit: questions of
    each task; None: all. max_new_tokens: of tasks that generate; None: as each task says. bos: the token before a text,
    BOS or the end-of-document token; auto: what a tokenizer in a Hugging Face folder puts there, and none for other
    tokenizers. platform: None: auto, and cpu beside a training, which keeps its GPUs. precision, batch_tokens: of the
    model; None: their defaults (evaluation/scorers/open_scorer.py). time_limit_minutes: of one checkpoint beside a
    training, after which its evaluation is ended.
    """

    tasks: tuple[str, ...] = ()
    domains: dict[str, str] = field(default_factory=dict)
    json_key: str = "text"
    max_documents: Annotated[int, Ge(1)] | None = None
    data_dir: str | None = None
    tasks_dir: str | None = None
    num_fewshot: tuple[Annotated[int, Ge(0)], ...] = (0,)
    limit: Annotated[int, Ge(1)] | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    bos: Literal["auto", "bos", "eod", "none"] = "auto"
    applies_chat_template: bool = False
    has_multiturn_fewshot: bool = True
    runs_generated_code: bool = False
    tokenizer_model: str | None = None
    platform: Literal["auto", "cpu", "cuda"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    batch_tokens: Annotated[int, Ge(1)] | None = None
    time_limit_minutes: Annotated[int, Ge(1)] = 240


# Fields that act on tasks or on texts alone.
OF_TASKS = (
    *("data_dir", "tasks_dir", "num_fewshot", "limit", "max_new_tokens", "applies_chat_template"),
    "runs_generated_code",
)
OF_DOMAINS = ("json_key", "max_documents")


def find_unused_fields(suite: EvaluationSuite) -> list[str]:
    """A problem for each field that is set and acts on nothing that the suite asks."""
    default = EvaluationSuite()
    problems = []
    for kind, things, names in (("tasks", suite.tasks, OF_TASKS), ("domains", suite.domains, OF_DOMAINS)):
        for name in names:
            value = getattr(suite, name)
            if not things and value != getattr(default, name):
                value = list(value) if isinstance(value, tuple) else value
                problems.append(
                    f"{name}: acts on {kind}, of which there are none, got {value}. Drop it, or add {kind}."
                )
    if not suite.has_multiturn_fewshot and not suite.applies_chat_template:
        problems.append(
            "has_multiturn_fewshot: acts on a chat template, got false without applies_chat_template. Drop it, or set "
            "both."
        )
    return problems


def read_suite(path: Path) -> EvaluationSuite:
    """Raises ConfigError with every field that is wrong."""
    remedy = "docs/evaluation.md has an example"
    suite = read_toml(path, EvaluationSuite, remedy=f"{remedy}.", raises=ConfigError, allows_unknown=False)
    is_empty = not suite.tasks and not suite.domains
    if is_empty or not suite.num_fewshot:
        name = "tasks or domains" if is_empty else "num_fewshot"
        raise ConfigError(f"{path}: {name} must name at least one, got none. {remedy}.")
    return suite
