"""Every problem of a run before it starts: no process group, no GPU, all problems at once.

`find_problems` only reads: the namespace, headers and samples of the data, the folders of checkpoints. Each problem is
one sentence of fact and one of remedy: "flag: what must hold, got name=value. remedy." It goes from the narrow to the
wide: single values, then how they fit together, then files, then Megatron's own word on a copy of the namespace.
Next: preflight_values, preflight_flags, preflight_layout, preflight_memory, preflight_schedule, preflight_data,
preflight_checkpoint, preflight_start, preflight_data_order, megatron_checks.
"""

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.megatron_checks import describe_refusal, find_megatron_refusal
from megatron_hammer.config.model_arguments import list_missing_essentials
from megatron_hammer.config.preflight.checkpoint import find_checkpoint_problems
from megatron_hammer.config.preflight.data import find_data_problems
from megatron_hammer.config.preflight.data_order import find_data_order_problems
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.preflight.initial_model import find_initial_model_problems
from megatron_hammer.config.preflight.layout import find_batch_problems, find_layout_problems
from megatron_hammer.config.preflight.memory import find_memory_problems
from megatron_hammer.config.preflight.schedule import find_schedule_problems
from megatron_hammer.config.preflight.values import find_missing_problems, find_value_problems


def find_problems(arguments: ParsedArguments) -> list[str]:
    """All problems of a run, each once; empty if it can start. Changes neither the namespace nor the disk."""
    namespace = arguments.namespace
    problems = find_missing_problems(namespace)
    value_problems = find_value_problems(namespace)
    problems += value_problems
    problems += find_flag_problems(arguments)
    problems += find_initial_model_problems(arguments)
    file_problems = find_checkpoint_problems(arguments)
    if not value_problems:  # arithmetic on zeros and negative sizes would only add noise
        problems += _find_fit_problems(arguments)
        problems += find_schedule_problems(arguments)
        file_problems = find_data_problems(arguments) + file_problems
        if not file_problems and namespace.seq_length is not None:
            file_problems = find_data_order_problems(namespace)
    problems += file_problems
    if not problems:
        refusal = find_megatron_refusal(namespace)
        if refusal is not None:
            problems.append(describe_refusal(refusal))
    return list(dict.fromkeys(problems))


def _find_fit_problems(arguments: ParsedArguments) -> list[str]:
    """Model, ranks, batch and memory against each other; needs a model to look at."""
    namespace = arguments.namespace
    if list_missing_essentials(namespace):
        return []
    problems = find_layout_problems(namespace)
    problems += find_batch_problems(namespace)
    return problems or find_memory_problems(namespace)
