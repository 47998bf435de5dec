"""Whether batch and layout fit together: micro-batches on every rank, and the groups of the interleaved schedule."""

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.preflight.layout import find_world_problems, next_multiple
from megatron_hammer.config.run_plan import Batch, RunPlan
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.layout import divisors


def find_batch_problems(plan: RunPlan) -> list[str]:
    """Problems of the batch sizes, and a run in samples that is shorter than a step."""
    if find_world_problems(plan.layout, plan.machine.world_size):
        return []  # the number of data-parallel ranks is not known then
    batch, train_samples = plan.batch, plan.schedule.train_samples
    problems = find_size_problems(batch, plan.layout)
    if train_samples is not None and train_samples < batch.global_batch_size:
        problems.append(
            f"train-samples: must fill one step, got train_samples={train_samples}, "
            f"global_batch_size={batch.global_batch_size}. Raise --train-samples, or lower --global-batch-size."
        )
    # A scheduled batch changes its number of micro-batches during the run, so there is no one number to check here.
    if problems or batch.is_scheduled or plan.layout.virtual_pipeline_model_parallel_size == 1:
        return problems
    return find_schedule_problems(batch, plan.layout, is_evaluated=bool(plan.evaluation.num_steps))


def find_size_problems(batch: Batch, layout: ParallelLayout) -> list[str]:
    """Batches that are not whole micro-batches on every data-parallel rank."""
    dp, problems = layout.data_parallel_size, []
    if batch.global_batch_size % (batch.micro_batch_size * dp) and not (batch.may_decrease or batch.is_scheduled):
        problems.append(
            _describe_size_problem(
                "global_batch_size", batch.global_batch_size, "micro_batch_size", batch.micro_batch_size, dp
            )
        )
    sizes = batch.eval_global_batch_size, batch.eval_micro_batch_size
    # Evaluation without sizes of its own takes the training sizes, whose problem is already in the list.
    if sizes[0] % (sizes[1] * dp) and (batch.has_own_evaluation or not problems):
        problems.append(
            _describe_size_problem("eval_global_batch_size", sizes[0], "eval_micro_batch_size", sizes[1], dp)
        )
    return problems


def find_schedule_problems(batch: Batch, layout: ParallelLayout, *, is_evaluated: bool) -> list[str]:
    """The interleaved schedule takes micro-batches in groups (megatron.core.pipeline_parallel.schedules)."""
    dp, pp = layout.data_parallel_size, layout.pipeline_model_parallel_size
    # Megatron's default group is one micro-batch for each stage.
    group = batch.microbatch_group_size or pp
    counts = {"global_batch_size": batch.global_batch_size // (batch.micro_batch_size * dp)}
    if batch.has_own_evaluation and is_evaluated:
        counts["eval_global_batch_size"] = batch.eval_global_batch_size // (batch.eval_micro_batch_size * dp)
    return [
        problem
        for name, num_microbatches in counts.items()
        for problem in _find_group_problems(flag_of(name), num_microbatches, pp, group)
    ]


def _find_group_problems(flag: str, num_microbatches: int, pp: int, group: int) -> list[str]:
    facts = f"got {num_microbatches} micro-batches, pp={pp}, microbatch_group_size_per_vp_stage={group}"
    if not pp <= group <= num_microbatches:
        return [
            f"{flag}: the interleaved schedule needs at least as many micro-batches as stages, and a group of "
            f"micro-batches between the two, {facts}. Raise --{flag}, lower --micro-batch-size, or drop the virtual "
            "stages."
        ]
    if 0 < num_microbatches % group < pp:
        return [
            f"{flag}: the interleaved schedule takes micro-batches in groups of {group}, and a last group must have at "
            f"least one for each stage, {facts}. "
            f"Use {num_microbatches // group * group} or {next_multiple(num_microbatches, group)} micro-batches."
        ]
    return []


def _describe_size_problem(name: str, batch: int, micro_name: str, micro: int, dp: int) -> str:
    flag, unit = flag_of(name), micro * dp
    # Smaller micro-batches that also fit, so the message can keep the global batch, which affects the training.
    fitting = [size for size in divisors(batch // dp) if size <= micro] if batch % dp == 0 else []
    smaller = f", or --{flag_of(micro_name)} {fitting[-1]}" if fitting else ""
    # 0 where the batch is smaller than one micro-batch on each rank: then only the larger number is possible.
    lower = batch // unit * unit
    nearest = f"{lower} or {lower + unit}" if lower else str(unit)
    return (
        f"{flag}: must be a multiple of {micro_name} x data-parallel size, got {name}={batch}, "
        f"{micro_name}={micro}, dp={dp}. Use --{flag} {nearest}{smaller}."
    )
