"""Every problem of a run before it starts: no process group, no GPU, all problems at once.

The checks only read: the plan, headers and samples of the data, the folders of checkpoints. Each problem is one
sentence of fact and one of remedy: "flag: what must hold, got name=value. remedy." Their order is from the narrow to
the wide: single flags, then how they fit together, then files, then what Megatron itself says of a copy of its
arguments. A new check is a file in this folder and a line below.
"""

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.megatron_checks import describe_refusal, find_megatron_refusal
from megatron_hammer.config.preflight.batch import find_batch_problems
from megatron_hammer.config.preflight.checkpoint import find_checkpoint_problems
from megatron_hammer.config.preflight.data import find_data_problems
from megatron_hammer.config.preflight.data_order import find_data_order_problems
from megatron_hammer.config.preflight.evaluation import find_evaluation_problems
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.preflight.host_memory import find_host_memory_problems
from megatron_hammer.config.preflight.initial_model import find_initial_model_problems
from megatron_hammer.config.preflight.layout import find_device_problems, find_run_layout_problems
from megatron_hammer.config.preflight.memory import find_memory_problems
from megatron_hammer.config.preflight.schedule import find_schedule_problems
from megatron_hammer.config.run_plan import RunPlan, RunSettings
from megatron_hammer.config.values import find_missing_problems, find_value_problems


def find_problems(arguments: ParsedArguments) -> list[str]:
    """All problems of a run, each once; empty if it can start. Changes neither the arguments nor the disk."""
    settings, plan = arguments.settings, arguments.plan
    value_problems = find_value_problems(settings.flags)
    problems = [
        *find_missing_problems(settings.flags),
        *value_problems,
        *find_flag_problems(settings),
        *find_initial_model_problems(settings),
    ]
    file_problems = find_checkpoint_problems(settings, plan) + find_evaluation_problems(settings)
    if not value_problems:  # arithmetic on zeros and negative sizes would only add noise
        problems += _find_fit_problems(settings, plan)
        problems += find_schedule_problems(settings.schedule)
        file_problems = find_data_problems(settings, plan) + file_problems
        # It reads the data and the checkpoint, which must be whole for that.
        if plan is not None and not file_problems:
            file_problems = find_data_order_problems(plan)
    problems += file_problems
    # Last and alone: Megatron stops at its first problem, and most are those above in less helpful words.
    refusal = find_megatron_refusal(arguments.namespace) if not problems else None
    if refusal is not None:
        problems.append(describe_refusal(refusal))
    # Two checks may find the same problem; dict.fromkeys keeps their order.
    return list(dict.fromkeys(problems))


def _find_fit_problems(settings: RunSettings, plan: RunPlan | None) -> list[str]:
    """Model, ranks, batch and memory against each other. Memory is estimated only where the others fit."""
    problems = [*find_device_problems(settings.machine), *find_run_layout_problems(settings)]
    if plan is None:
        return problems
    problems += find_batch_problems(plan)
    return problems or [*find_memory_problems(plan), *find_host_memory_problems(plan)]
