"""Run benchmarks on models without a network: lm-eval's tasks, C-Eval, CMMLU and HumanEval.

hammer evaluate hf/hammer --tasks ceval-ppl cmmlu-ppl --num-fewshot 0 5 --data-dir data/benchmarks
hammer evaluate --load checkpoints/hammer --iterations all --tasks hellaswag arc_easy piqa --data-dir data/benchmarks
torchrun --nproc-per-node 4 tools/evaluate.py checkpoints/hammer --pipeline-model-parallel-size 4 --suite suite.toml

A model is a Hugging Face folder, the --save folder of a run or a GGUF file; all of them are asked the same questions
through one interface. Of a run, --iterations evaluates several checkpoints, and a picture shows their scores against
the trained tokens. The data are local copies of what the authors publish, a folder for each dataset in --data-dir
(docs/evaluation.md lists the layouts). Every score comes with its standard error, the score of guessing and the number
of questions.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.config.evaluation_suite import EvaluationSuite, find_unused_fields, read_suite
from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.evaluation.benchmarks.offline import forbid_network
from megatron_hammer.files.command_line import CommandParser, importing
from megatron_hammer.files.publish import require_free
from megatron_hammer.platforms.parent_process import end_with_parent


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; those of a suite are None where they are not given. See --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODEL", help="models to compare")
    parser.add_argument("--load", type=Path, metavar="DIR", help="folder of a training run")
    parser.add_argument("--iterations", help="of --load: all, or numbers such as 1000,2000 (the newest)")
    parser.add_argument("--suite", type=Path, metavar="FILE", help="TOML file with the settings below; flags override")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names or patterns: ceval-ppl, 'cmmlu-gen_high*'")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that has a folder for each dataset")
    parser.add_argument("--tasks-dir", metavar="DIR", help="more task files of lm-eval")
    parser.add_argument("--num-fewshot", nargs="+", type=int, metavar="N", help="examples before a question (0)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task (all)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of tasks that generate (as each task says)")
    parser.add_argument(
        "--bos",
        choices=["auto", "bos", "eod", "none"],
        help="the token before a text (auto: what a tokenizer in a Hugging Face folder puts there, else none)",
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", default=None, help="ask in the turns of a chat model's template"
    )
    parser.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="with --apply-chat-template: each example is a turn of its own (yes)",
    )
    parser.add_argument(
        "--run-generated-code",
        action="store_true",
        default=None,
        help="for HumanEval: run what the model writes, in a process with limits that is no security sandbox",
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help="default: the model's own")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="under torchrun")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="under torchrun")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], help="(auto)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="(fp32 on cpu, bf16 on cuda)")
    parser.add_argument(
        "--batch-tokens", type=int, metavar="N", help="computed at once (2048 on a CPU, 16384 on a GPU)"
    )
    parser.add_argument("--check", action="store_true", help="only find the tasks and their data, and print nothing")
    parser.add_argument("--save-dir", type=Path, metavar="DIR", help="new folder for scores and all answers")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.add_argument("--parent-process", type=int, help=argparse.SUPPRESS)  # of training, which starts this command
    arguments = parser.parse_args(argv)
    if not arguments.models and arguments.load is None:
        parser.error("MODEL or --load must be given, got neither")
    if arguments.iterations is not None and arguments.load is None:
        parser.error(f"--iterations must come with --load, got --iterations {arguments.iterations} alone")
    if arguments.check and arguments.save_dir is not None:
        parser.error(f"--save-dir has no effect with --check, got --save-dir {arguments.save_dir}")
    return arguments


def build_suite(arguments: argparse.Namespace) -> EvaluationSuite:
    """The suite of the command: its file's, with the flags over it. Raises ConfigError."""
    if arguments.suite is None and arguments.tasks is None:
        raise ConfigError("tasks: must be given, got none. Pass --tasks ceval-ppl hellaswag, or --suite FILE.")
    suite = EvaluationSuite() if arguments.suite is None else read_suite(arguments.suite)
    has_template = arguments.apply_chat_template or suite.applies_chat_template
    if arguments.fewshot_as_multiturn is not None and not has_template:
        raise ConfigError("fewshot-as-multiturn: has no effect without --apply-chat-template. Pass both, or drop it.")
    given: dict[str, Any] = {
        "tasks": arguments.tasks and tuple(arguments.tasks),
        "data_dir": arguments.data_dir,
        "tasks_dir": arguments.tasks_dir,
        "num_fewshot": arguments.num_fewshot and tuple(dict.fromkeys(arguments.num_fewshot)),
        "limit": arguments.limit,
        "max_new_tokens": arguments.max_new_tokens,
        "bos": arguments.bos,
        "applies_chat_template": arguments.apply_chat_template,
        "has_multiturn_fewshot": arguments.fewshot_as_multiturn,
        "runs_generated_code": arguments.run_generated_code,
        "tokenizer_model": arguments.tokenizer_model,
        "platform": arguments.platform,
        "precision": arguments.precision,
        "batch_tokens": arguments.batch_tokens,
    }
    for name, least in (("num_fewshot", 0), ("limit", 1), ("max_new_tokens", 1), ("batch_tokens", 1)):
        numbers = given[name] if isinstance(given[name], tuple) else (given[name],)
        if any(number is not None and number < least for number in numbers):
            flag = name.replace("_", "-")
            raise ConfigError(f"{flag}: must be at least {least}, got {min(numbers)}. Correct it.")
    suite = dataclasses.replace(suite, **{name: value for name, value in given.items() if value is not None})
    if problems := find_unused_fields(suite):
        raise ConfigError(*problems)
    return suite


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help."""
    arguments = parse_arguments(argv)
    if arguments.parent_process is not None:
        end_with_parent(arguments.parent_process)
    suite = build_suite(arguments)
    forbid_network()
    with importing():
        from megatron_hammer.evaluation.benchmarks import reports, run
        from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout
        from megatron_hammer.evaluation.scorers.named_models import list_models
        from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions
        from megatron_hammer.platforms.select import select_platform
    if arguments.check:
        run.read_questions(suite)
        return
    options = ScorerOptions(
        tokenizer_path=None if suite.tokenizer_model is None else Path(suite.tokenizer_model),
        layout=ModelLayout(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
            platform=select_platform(suite.platform or ("auto" if arguments.parent_process is None else "cpu")),
        ),
        precision=suite.precision,
        max_batch_tokens=suite.batch_tokens,
    )
    models = list_models(arguments.models, arguments.load, arguments.iterations)
    if arguments.save_dir is not None:
        require_free(arguments.save_dir)
    questions = run.read_questions(suite)
    evaluated = []
    try:
        for model in models:
            found = run.evaluate_model(model, questions, options)
            evaluated += [] if found is None else [found]
    finally:
        # Also where a later model fails: what was evaluated may have taken hours. Empty on all ranks but the first.
        if evaluated and arguments.json:
            print(json.dumps(reports.build_report(evaluated, suite), indent=2, ensure_ascii=False))
        elif evaluated:
            reports.print_scores(evaluated, suite)
        if evaluated and arguments.save_dir is not None:
            reports.write_reports(arguments.save_dir, evaluated, suite)


if __name__ == "__main__":
    main()
