"""Single flags: without effect, impossible here, or changing the model in ways the counts do not cover.

The checks read single flags, so they take the flags as they are and not the plan.
"""

from megatron_hammer.config.flag_tables.refused import REFUSED, UNCOUNTED
from megatron_hammer.config.flags import Flags, flag_of, show_value
from megatron_hammer.config.preflight.idle_flags import find_idle_problems
from megatron_hammer.config.preflight.platform import find_platform_problems
from megatron_hammer.config.run_plan import RunSettings

# Off by being empty, which is their default.
MAY_BE_EMPTY = ("wandb_project", "wandb_exp_name", "wandb_save_dir", "wandb_entity")


def find_flag_problems(settings: RunSettings) -> list[str]:
    """Typed flags without effect, and what neither this package nor this platform and backend can do."""
    flags = settings.flags
    return [
        *_find_empty_problems(flags),
        *find_idle_problems(flags, REFUSED),
        *_find_companion_problems(flags),
        *find_uncounted_problems(flags),
        *find_platform_problems(flags),
        *_find_stale_preset_problems(flags, has_preset=settings.preset is not None),
    ]


def _find_empty_problems(flags: Flags) -> list[str]:
    """Megatron takes an empty text as if the flag were not there: `--save ""` would save nothing."""
    return [
        f"{flag_of(name)}: must not be empty, got {name}=''. Is a variable of the shell not set? Set it, or drop it."
        for name in sorted(flags.typed)
        if flags.values.get(name) == "" and name not in MAY_BE_EMPTY
    ]


def _find_companion_problems(flags: Flags) -> list[str]:
    """Flags that need another one beside them."""
    typed = flags.typed
    problems = []
    if "group_query_attention" in typed and "num_query_groups" not in typed:
        problems.append(
            f"num-query-groups: must be given with --group-query-attention, got "
            f"num_query_groups={flags['num_query_groups']} by default. Pass --num-query-groups."
        )
    # Megatron has no default method or number of layers for full recomputation.
    if flags["recompute_granularity"] == "full" and (
        flags["recompute_method"] is None or flags["recompute_num_layers"] is None
    ):
        problems.append(
            f"recompute-granularity: full needs a method and a number of layers, got "
            f"recompute_method={flags['recompute_method']}, recompute_num_layers={flags['recompute_num_layers']}. "
            "Pass --recompute-method uniform --recompute-num-layers 1."
        )
    problems += [
        f"precision: a run has one precision, got precision={flags['precision']}, --{name}. Drop --{name}."
        for name in ("bf16", "fp16")
        # --precision is ours, --bf16 and --fp16 are Megatron's; both spellings of the same precision are accepted.
        if {name, "precision"} <= typed and name != flags["precision"]
    ]
    if flags["on_bad_loss"] == "roll-back" and not flags["save"]:
        problems.append(
            "on-bad-loss: roll-back needs checkpoints to go back to, got on_bad_loss=roll-back, save=None. "
            "Pass --save DIR, or --on-bad-loss skip-batch."
        )
    if flags["fingerprint_interval"] and not flags["metrics_path"]:
        problems.append(
            f"fingerprint-interval: needs a folder, got fingerprint_interval={flags['fingerprint_interval']}, "
            "metrics_path=None. Pass --save DIR or --metrics-path FILE."
        )
    virtual_stages = flags["num_virtual_stages_per_pipeline_rank"] or flags["num_layers_per_virtual_pipeline_stage"]
    if flags["iterations_to_skip"] and (virtual_stages or flags["pipeline_model_parallel_size"] > 2):
        # megatron.training.training.dummy_train_step: next() of a list, or of the None of a middle stage.
        problems.append(
            "iterations-to-skip: Megatron reads the batches of skipped steps on every stage, which fails with virtual "
            f"stages and with more than two stages, got iterations_to_skip={flags['iterations_to_skip']}, "
            f"pipeline_model_parallel_size={flags['pipeline_model_parallel_size']}. Pass --on-bad-loss skip-batch, or "
            "two stages at most."
        )
    if flags["wandb_project"] and not flags["wandb_exp_name"]:
        problems.append(
            f"wandb-exp-name: must be given with --wandb-project, got wandb_exp_name={flags['wandb_exp_name']}. "
            "Pass a name for the run."
        )
    return problems


def find_uncounted_problems(flags: Flags) -> list[str]:
    """What would make every count of parameters or layers wrong."""
    return [
        f"{flag_of(name)}: is not supported here: it changes what is built, and its parameters and layers would not "
        f"be counted, got {name}={show_value(flags[name])}. Drop it."
        for name in flags.list_loud(UNCOUNTED)
    ]


def _find_stale_preset_problems(flags: Flags, *, has_preset: bool) -> list[str]:
    """An override must not leave a number of the preset behind that followed from the old one."""
    typed = flags.typed
    problems = []
    # A preset sets kv_channels explicitly, so Megatron would not derive it again from an overridden size.
    sizes = {"hidden_size", "num_attention_heads"}
    has_sizes = flags["hidden_size"] is not None and flags["num_attention_heads"]
    if has_preset and has_sizes and sizes & typed and "kv_channels" not in typed:
        fitting = flags["hidden_size"] // flags["num_attention_heads"]
        if flags["kv_channels"] not in (None, fitting):
            problems.append(
                f"kv-channels: the preset's no longer follows from hidden_size / num_attention_heads, got "
                f"kv_channels={flags['kv_channels']}, hidden_size={flags['hidden_size']}, "
                f"num_attention_heads={flags['num_attention_heads']}. Pass --kv-channels {fitting}."
            )
    return problems
