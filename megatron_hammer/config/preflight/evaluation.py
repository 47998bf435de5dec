"""Whether a run's checkpoints can be evaluated beside it: --evaluate-every and its suite."""

from pathlib import Path

from megatron_hammer.config.evaluation_suite import find_unused_fields, read_suite
from megatron_hammer.config.run_plan import RunSettings
from megatron_hammer.errors import ConfigError


def find_evaluation_problems(settings: RunSettings) -> list[str]:
    """Also the suite's own problems. Its tasks and data are tried by the process that evaluates, at the run's start."""
    every, suite_path = settings.evaluation.scored_every_steps, settings.evaluation.suite_path
    if every is None or every < 1:
        return []
    checkpoints, problems = settings.checkpoints, []
    if checkpoints.save is None:
        problems.append(
            f"evaluate-every: evaluates saved checkpoints, got evaluate_every={every}, save=None. Pass --save DIR."
        )
    elif checkpoints.save_interval and every % checkpoints.save_interval:
        problems.append(
            f"evaluate-every: must be a multiple of the save interval, got evaluate_every={every}, "
            f"save_interval={checkpoints.save_interval}. Correct one of the two."
        )
    if checkpoints.format != "torch_dist":
        problems.append(
            f"evaluate-every: reads checkpoints of torch_dist, got ckpt_format={checkpoints.format}. "
            "Drop --ckpt-format, or --evaluate-every."
        )
    if suite_path is None:
        problems.append(
            f"evaluate-suite: must be given with --evaluate-every, got evaluate_every={every}, evaluate_suite=None. "
            "Pass --evaluate-suite FILE; docs/evaluation.md has an example."
        )
        return problems
    try:
        problems += [f"evaluate-suite: {problem}" for problem in find_unused_fields(read_suite(Path(suite_path)))]
    except ConfigError as error:
        problems += [f"evaluate-suite: {problem}" for problem in error.problems]
    return problems
