"""The options of one run of the preprocessor, and the output names that they determine."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.corpus.blocks import BLOCK_BYTES
from megatron_hammer.corpus.input_files import JOURNAL_SUFFIX, match_outputs
from megatron_hammer.data.indexed.manifest import JobShard
from megatron_hammer.data.preprocess.sharding import select_shard_prefix
from megatron_hammer.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessOptions:
    """One run of the preprocessor; each of `json_keys` becomes `<output_prefix>_<key>_document` (or `_sentence`).

    tokenizer_type: Megatron's name of the kind that the tokenizer must be; None allows every kind. includes_template:
    whether the tokens of a Hugging Face tokenizer's template are written around every text; None: they are not, and a
    note says so.
    prepend_bos, append_eod: begin and end every document that has tokens. language, keep_newlines: only with
    split_sentences. seed: shuffle the documents with it; None keeps their order. max_errors: bad records to skip.
    restart: discard an unfinished run instead of continuing it. journal_interval_s: the work that a kill may lose.
    """

    inputs: tuple[str, ...]
    tokenizer_path: Path
    tokenizer_type: str | None = None
    includes_template: bool | None = None
    output_prefix: Path
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    split_sentences: bool = False
    language: str = "english"
    keep_newlines: bool = False
    seed: int | None = None
    shard: JobShard | None = None
    num_workers: int = 1
    max_errors: int = 0
    restart: bool = False
    journal_interval_s: float = 10.0
    block_bytes: int = BLOCK_BYTES

    @property
    def job_prefix(self) -> Path:
        """The output prefix, with the shard's number if there is one."""
        return select_shard_prefix(self.output_prefix, self.shard)

    @property
    def journal_path(self) -> Path:
        return Path(f"{self.job_prefix}{JOURNAL_SUFFIX}")

    @property
    def lock_path(self) -> Path:
        return Path(f"{self.job_prefix}.lock")

    def prefix_of(self, json_key: str) -> Path:
        return Path(f"{self.job_prefix}_{json_key}_{self._level}")

    @property
    def _level(self) -> str:
        return "sentence" if self.split_sentences else "document"

    def build_output_test(self) -> Callable[[Path], bool]:
        """Return the test for files that this run, another shard of the job or the merge of the shards writes."""
        keys = "|".join(map(re.escape, self.json_keys))
        of_job = rf"{re.escape(JOURNAL_SUFFIX)}|\.lock|\.shuffle"
        of_pair = r"(\.unshuffled)?\.(bin|idx|manifest\.json|lengths|documents|buckets|lock)"
        name = re.escape(self.output_prefix.name) + r"(-\d{5}-of-\d{5})?"
        return match_outputs(
            self.output_prefix.parent, rf"{name}({of_job}|_({keys})_{self._level}{of_pair})(\.partial)?"
        )

    def describe(self) -> dict[str, Any]:
        """Return every option that shapes the bytes, except the keys and the shard, by the name of its flag."""
        # Not where it is off, so that manifests of runs before this option stay equal.
        template = {"includes_template": True} if self.includes_template else {}
        return template | {
            "append_eod": self.append_eod,
            "prepend_bos": self.prepend_bos,
            "split_sentences": self.split_sentences,
            # Without sentences the language shapes nothing, and must not make two runs differ.
            "lang": self.language if self.split_sentences else None,
            "keep_newlines": self.keep_newlines,
            "shuffle": self.seed is not None,
            "seed": self.seed,
        }

    def validate(self) -> None:
        """Raise ConfigError naming every combination that cannot work."""
        problems = []
        if self.seed is not None and self.shard is not None:
            problems.append(
                f"shuffle: a shard cannot be shuffled alone, got shard={self.shard.index}/{self.shard.count}. "
                "Shuffle when merging: merge_data.py --shuffle --seed."
            )
        if self.seed is not None and self.seed < 0:
            problems.append(f"seed: must be at least 0, got seed={self.seed}. Pass another.")
        if self.keep_newlines and not self.split_sentences:
            problems.append("keep-newlines: must come with --split-sentences, got it alone. Add that, or drop this.")
        if problems:
            raise ConfigError(*problems)
