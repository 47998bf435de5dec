"""Quantize the weights of a Hugging Face folder to GPTQ or AWQ format with AutoRound, calibrated on your own text.

The new folder loads in vLLM, and in transformers where gptqmodel is installed. Linear layers of the blocks are
quantized; embeddings, the head, norms and biases stay in fp16. The tokenizer and its chat template are copied.
Every packed layer is read back and compared with the source before the folder is renamed into place.
For GGUF files use checkpoint_convert/to_gguf.py --type q4_k_m.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.checkpoint.verification.print_checks import print_checks
from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import show_stages
from megatron_hammer.serving.quantization.quantize import QuantizationOptions, QuantizationReport, quantize
from megatron_hammer.serving.quantization.run_auto_round import BITS, FORMATS, RoundingOptions, require_auto_round


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
    parser.add_argument("--text-key", default="text", help="field of the documents that holds the text (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration samples (%(default)s)")
    parser.add_argument(
        "--seq-length", type=int, help="tokens per sample (default: 2048, or the model's positions if fewer)"
    )
    parser.add_argument(
        "--bits", type=int, choices=sorted(BITS["gptq"]), default=default.bits, help="bits per weight (%(default)s)"
    )
    parser.add_argument(
        "--group-size", type=int, default=default.group_size, help="inputs that share a scale (%(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=default.iterations, help="optimization steps per block (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="samples per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the samples and the steps (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help="(%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier folder in --save")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Raises PlatformError if AutoRound is not installed."""
    arguments = parse_arguments(argv)
    require_auto_round()
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
            device=arguments.device,
        ),
        text_key=arguments.text_key,
        num_samples=arguments.num_samples,
        seq_length=arguments.seq_length,
        overwrite=arguments.overwrite,
    )
    with show_stages() as show:
        report = quantize(options, show)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
        return
    print_checks(report.checks)
    print(summarise(report))


def summarise(report: QuantizationReport) -> str:
    """The last line: format, layers, and bytes before and after."""
    return (
        f"{report.save_dir}: {report.format} with {report.bits} bits in groups of {report.group_size}; "
        f"{report.num_layers} layers quantized, {len(report.not_quantized)} tensors in fp16, 0 dropped; "
        f"{report.source_bytes:,} bytes of weights became {report.quantized_bytes:,}; {report.elapsed_s:.1f} s"
    )
