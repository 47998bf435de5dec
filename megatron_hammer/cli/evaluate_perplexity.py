"""Perplexity of models by domain, comparable between tokenizers, and bits per byte with intervals.

Models are checkpoints of Megatron at any layout, Hugging Face folders and GGUF files. A domain is one input: a file, a
glob or a folder that preprocess-data reads, or the prefix of a .bin/.idx pair.

    python tools/evaluate_perplexity.py --models hf/hammer hf/qwen --domains zh=zh.jsonl en=en.jsonl
    python tools/evaluate_perplexity.py --load checkpoints/hammer --iterations all --domains zh.jsonl --save-dir report
    torchrun --nproc-per-node 4 tools/evaluate_perplexity.py --load checkpoints/hammer --domains zh.jsonl \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, importing
from megatron_hammer.files.progress import show_stages
from megatron_hammer.files.tables import build_table, open_console, print_json

with importing():
    from megatron_hammer.evaluation.perplexity.domains import (
        Domain,
        DomainOptions,
        is_pair,
        name_domains,
        read_domain,
    )
    from megatron_hammer.evaluation.perplexity.measure import (
        BOS_POLICIES,
        MeasureOptions,
        ModelScores,
        ReferenceTokenizer,
        measure_model,
    )
    from megatron_hammer.evaluation.perplexity.report import build_tables, describe, list_notes, write_report
    from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout, is_first_process
    from megatron_hammer.evaluation.scorers.named_models import NamedModel, list_models
    from megatron_hammer.evaluation.scorers.open_scorer import PRECISIONS, ScorerOptions, use_scorer
    from megatron_hammer.evaluation.scorers.scorer import Scorer
    from megatron_hammer.platforms.select import select_platform
    from megatron_hammer.tokenizer.encoding.encoder import load_encoder


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--models", nargs="+", default=[], metavar="[NAME=]PATH", help="models to compare")
    parser.add_argument("--load", type=Path, help="folder of a training run: one row for each of --iterations")
    parser.add_argument("--iterations", help="of --load: all, or numbers such as 1000,2000 (the newest)")
    parser.add_argument("--domains", nargs="+", required=True, metavar="[NAME=]INPUT", help="one input per domain")
    parser.add_argument(
        "--json-keys", default="text", metavar="KEY", help="field or column that holds the text (%(default)s)"
    )
    parser.add_argument("--data-tokenizer", type=Path, help="tokenizer of the .bin/.idx pairs among the domains")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer for every model (each model's own)")
    parser.add_argument(
        "--reference-tokenizer", type=Path, help="tokenizer whose tokens the loss is divided by (the first model's)"
    )
    parser.add_argument(
        "--bos",
        choices=BOS_POLICIES,
        default="auto",
        help="token in front of each document: auto is BOS, or EOD without one; none leaves the first token unscored",
    )
    parser.add_argument("--max-characters", type=int, help="score only this many characters of a document (all)")
    parser.add_argument("--max-documents", type=int, help="score only this many documents of a domain (all)")
    parser.add_argument("--max-length", type=int, help="tokens of a window (what the model reads)")
    parser.add_argument("--stride", type=int, help="tokens that each further window scores (as many as it has)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the arithmetic (fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--batch-tokens", type=int, help="tokens computed at once (2048 on a CPU, 16384 on a GPU)")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="of checkpoints, under torchrun")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="of checkpoints, under torchrun")
    parser.add_argument("--save-dir", type=Path, help="write perplexity.md, .csv, .json and .png there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    for name in ("max_characters", "max_documents", "max_length", "stride", "batch_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.save_dir is not None and arguments.save_dir.exists() and not arguments.save_dir.is_dir():
        parser.error(f"--save-dir must be a folder, got the file {arguments.save_dir}")
    if not arguments.models and arguments.load is None:
        parser.error("--models or --load must be given, got neither")
    if arguments.iterations is not None and arguments.load is None:
        parser.error(f"--iterations must come with --load, got --iterations {arguments.iterations} alone")
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Under torchrun only rank 0 prints and writes."""
    arguments = parse_arguments(argv)
    models = list_models(arguments.models, arguments.load, arguments.iterations)
    domains = read_domains(arguments) if is_first_process() else []
    options = ScorerOptions(
        tokenizer_path=arguments.tokenizer_model,
        layout=ModelLayout(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
            platform=select_platform(arguments.platform),
        ),
        precision=arguments.precision,
        max_batch_tokens=arguments.batch_tokens,
    )
    measure_options = MeasureOptions(bos=arguments.bos, max_length=arguments.max_length, stride=arguments.stride)
    named = arguments.reference_tokenizer
    references = [] if named is None else [ReferenceTokenizer(load_encoder(named))]
    results: list[ModelScores] = []
    try:
        for model in models:
            scores = score_model(model, options, domains, measure_options, references)
            results += [] if scores is None else [scores]
    finally:
        # Also where a later model cannot be opened: what was measured may have taken hours.
        if results:
            print_results(results, str(references[0].path), arguments)


def read_domains(arguments: argparse.Namespace) -> list[Domain]:
    """Read every domain; raises ConfigError if two have one name."""
    named = name_domains(arguments.domains, flag="domains")
    if arguments.data_tokenizer is not None and not any(is_pair(source) for _, source in named):
        raise ConfigError(
            f"data-tokenizer: is for domains that are .bin/.idx pairs, got {arguments.data_tokenizer} without one. "
            "Drop it, or pass the prefix of a pair."
        )
    options = DomainOptions(
        json_key=arguments.json_keys,
        max_characters=arguments.max_characters,
        max_documents=arguments.max_documents,
        pair_encoder=None if arguments.data_tokenizer is None else load_encoder(arguments.data_tokenizer),
    )
    return [read_domain(name, source, options) for name, source in named]


def score_model(
    model: NamedModel,
    options: ScorerOptions,
    domains: Sequence[Domain],
    measure_options: MeasureOptions,
    references: list[ReferenceTokenizer],
) -> ModelScores | None:
    """The scores of one model on rank 0, None elsewhere. references: empty until the first model gives its own."""

    def work(scorer: Scorer) -> ModelScores:
        references[:] = references or [ReferenceTokenizer(scorer.encoder)]
        scorer.name = model.name or scorer.name
        with show_stages(f"{scorer.name} {{}}") as show:
            scores = measure_model(scorer, domains, measure_options, reference=references[0], on_progress=show)
        return dataclasses.replace(scores, run=model.run)

    return use_scorer(model.path, dataclasses.replace(options, iteration=model.iteration), work)


def print_results(results: Sequence[ModelScores], reference: str, arguments: argparse.Namespace) -> None:
    """Tables or JSON on stdout, notes on stderr, and the files of --save-dir."""
    for note in list_notes(results):
        print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        print_json(describe(results, reference))
    else:
        console = open_console()
        for table in build_tables(results, reference):
            console.print(build_table(table.title, table.columns, table.rows))
    if arguments.save_dir is not None:  # last, for a folder that cannot be written
        for path in write_report(arguments.save_dir, results, reference):
            print(f"wrote {path}", file=sys.stderr)
