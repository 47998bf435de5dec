"""Quantize the weights of a Hugging Face folder to GPTQ or AWQ format with AutoRound, calibrated on your own text.

The new folder loads in vLLM, and in transformers where gptqmodel is installed. Linear layers of the blocks are
quantized; embeddings, the head, norms and biases stay in fp16. The tokenizer and its chat template are copied.
Every packed layer is read back and compared with the source before the folder is renamed into place.
With --evaluate, a table of both models follows: bytes, perplexity and bits per byte by domain, and how often the
likeliest next token is the same. It is also written into the new folder.
For GGUF files use checkpoint_convert/to_gguf.py --type q4_k_m.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hammer.checkpoint.verification.print_checks import print_checks
from megatron_hammer.errors import ConfigError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.evaluation.perplexity.domains import Domain, DomainOptions, name_domains, read_domain
from megatron_hammer.evaluation.perplexity.measure import BOS_POLICIES
from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, find_kind
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import show_stages
from megatron_hammer.files.publish import publish_files
from megatron_hammer.files.tables import build_table, open_console
from megatron_hammer.platforms.select import select_platform
from megatron_hammer.serving.quantization.comparison import (
    COLUMNS,
    ComparedModel,
    build_rows,
    compare_models,
    describe,
    format_markdown,
)
from megatron_hammer.serving.quantization.quantize import QuantizationOptions, QuantizationReport, quantize
from megatron_hammer.serving.quantization.run_auto_round import BITS, FORMATS, RoundingOptions, require_auto_round

COMPARISON_STEM = "quantization_comparison"  # of two files in the new folder


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    default = RoundingOptions()
    parser.add_argument("--load", type=Path, required=True, help="Hugging Face folder with plain weights")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default=default.format,
        help="gptq is symmetric, awq has zero points (%(default)s)",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        required=True,
        metavar="PATH",
        help="documents like the model's training data, as preprocess_data.py reads them; each PATH gives an equal "
        "share of the samples",
    )
    parser.add_argument(
        "--json-keys", default="text", metavar="KEY", help="field of the documents that holds the text (%(default)s)"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="calibration samples (%(default)s)")
    parser.add_argument(
        "--seq-length", type=int, help="tokens per sample (default: 2048, or the model's positions if fewer)"
    )
    parser.add_argument(
        "--bits", type=int, choices=sorted(BITS["gptq"]), default=default.bits, help="bits per weight (%(default)s)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=default.group_size,
        help="inputs that share a scale: 128, 64 or 32 (%(default)s)",
    )
    parser.add_argument(
        "--iterations", type=int, default=default.iterations, help="optimization steps per block (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="samples per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the samples and the steps (%(default)s)")
    parser.add_argument("--platform", choices=("cpu", "cuda"), default=default.device, help="(%(default)s)")
    parser.add_argument(
        "--evaluate",
        nargs="+",
        default=[],
        metavar="[NAME=]INPUT",
        help="texts to compare both models on, one input per domain; not those of --calibration",
    )
    parser.add_argument(
        "--compare", nargs="+", type=Path, default=[], metavar="PATH", help="further models for the table of --evaluate"
    )
    parser.add_argument(
        "--bos",
        choices=BOS_POLICIES,
        default="auto",
        help="token in front of each document of --evaluate, as of evaluate-perplexity (%(default)s)",
    )
    parser.add_argument("--max-documents", type=int, help="compare on this many documents of a domain (all)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier folder in --save")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    is_useless = arguments.compare or arguments.max_documents is not None or arguments.bos != "auto"
    if is_useless and not arguments.evaluate:
        parser.error("--compare, --bos and --max-documents must come with --evaluate, got them alone")
    if arguments.max_documents is not None and arguments.max_documents < 1:
        parser.error(f"--max-documents must be at least 1, got {arguments.max_documents}")
    return arguments


@exit_on_interrupt("no incomplete folder is left")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Raises PlatformError if AutoRound is not installed."""
    arguments = parse_arguments(argv)
    require_auto_round()
    select_platform(arguments.platform)  # raises where there is no GPU, before anything is read
    options = QuantizationOptions(
        load_dir=arguments.load,
        save_dir=arguments.save,
        calibration=tuple(arguments.calibration),
        rounding=RoundingOptions(
            format=arguments.format,
            bits=arguments.bits,
            group_size=arguments.group_size,
            iterations=arguments.iterations,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=arguments.platform,
        ),
        text_key=arguments.json_keys,
        num_samples=arguments.num_samples,
        seq_length=arguments.seq_length,
        overwrite=arguments.overwrite,
    )
    # Before the work of hours: a text that cannot be read, or a model that is not there.
    domains = read_domains(arguments)
    with show_stages() as show:
        report = quantize(options, show)
        compared = compare(arguments, domains, show) if domains else []
    if arguments.json:
        tables = {"comparison": describe(compared)} if compared else {}
        print(json.dumps(dataclasses.asdict(report) | tables, default=str, ensure_ascii=False))
        return
    print_checks(report.checks)
    if compared:
        open_console().print(build_table(None, COLUMNS, build_rows(compared), num_text=2), "")
    print(summarise(report))


def read_domains(arguments: argparse.Namespace) -> list[Domain]:
    """Read the texts of --evaluate; raises HammerError for one that cannot be read, or a missing model of --compare."""
    if wrong := [path for path in arguments.compare if find_kind(path) == "megatron"]:
        raise ConfigError(
            *(f"compare: {path} must be a Hugging Face folder or a GGUF file, got another folder." for path in wrong)
        )
    options = DomainOptions(json_key=arguments.json_keys, max_documents=arguments.max_documents)
    return [read_domain(name, source, options) for name, source in name_domains(arguments.evaluate, flag="evaluate")]


def compare(
    arguments: argparse.Namespace, domains: Sequence[Domain], show: Callable[[str, int, int | None], None]
) -> list[ComparedModel]:
    """Compare the source, the new folder and those of --compare; writes the table into the new folder."""
    options = ScorerOptions(layout=ModelLayout(platform=arguments.platform))
    paths = [arguments.load, arguments.save, *arguments.compare]
    compared = compare_models(paths, domains, options=options, bos=arguments.bos, on_model=show)
    for note in [note for model in compared for note in model.notes]:
        print(f"note: {note}", file=sys.stderr)
    publish_files(
        {
            arguments.save / f"{COMPARISON_STEM}.md": format_markdown(compared),
            arguments.save / f"{COMPARISON_STEM}.json": json.dumps(describe(compared), indent=2, ensure_ascii=False)
            + "\n",
        }
    )
    return compared


def summarise(report: QuantizationReport) -> str:
    """The last line: format, layers, and bytes before and after."""
    return (
        f"{report.save_dir}: {report.format} with {report.bits} bits in groups of {report.group_size}; "
        f"{report.num_layers} layers quantized, {len(report.not_quantized)} tensors in fp16, 0 dropped; "
        f"{report.source_bytes:,} bytes of weights became {report.quantized_bytes:,}; {report.elapsed_s:.1f} s"
    )
