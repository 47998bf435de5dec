"""What a run is: derived once from the command line, frozen, and read by everything that checks, reports or trains.

`RunSettings` holds what any command line says. `RunPlan` adds what needs a whole model and a batch; without them, or
with a value that makes no sense, there is no plan, and preflight says why. `read_plan.py` fills both in. Numbers that
follow from others are properties here. What Megatron changes while it trains is in `training_state.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_hammer.checkpoint_files.newest_intact import LoadChoice
from megatron_hammer.config.flags import Flags
from megatron_hammer.config.initial_model import InitialModel
from megatron_hammer.data.conversations.packing import RowLayout
from megatron_hammer.data.order.run_order import OrderSettings
from megatron_hammer.data.sources import DataPlan
from megatron_hammer.model.accounting import MemoryOptions, ParallelLayout
from megatron_hammer.model.memory.options import Recompute
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where a run runs, and which of its processes this is.

    is_planned: this is the plan of a run elsewhere, a dry run that no launcher started.
    """

    platform: str
    backend: str
    rank: int
    local_rank: int
    local_world_size: int  # processes of this node
    world_size: int
    is_planned: bool
    gpu_memory_gib: float | None  # --gpu-memory-gib
    peak_tflops: float | None  # --peak-tflops

    @property
    def has_gpu(self) -> bool:
        """Whether memory is estimated for a GPU: on the cuda platform, and for every plan."""
        return self.platform == "cuda" or self.gpu_memory_gib is not None or self.is_planned


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What a run or a dry run prints and writes, except its checkpoints."""

    is_dry_run: bool
    has_json: bool
    is_verbose: bool
    metrics_path: str | None
    tensorboard_dir: str | None
    prometheus_file: str | None
    prometheus_port: int | None
    fingerprint_interval: int | None  # steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """Where a run's checkpoints are read and written, and what is taken from them."""

    save: str | None
    load: str | None
    save_interval: int | None  # steps
    step: int | None  # --ckpt-step
    pretrained: str | None
    is_finetuned: bool
    loads_optimizer: bool
    iteration_override: int | None
    has_own_schedule: bool  # a flag says that the run's counts, where the checkpoint's is another
    has_saved_schedule: bool  # a flag says that the checkpoint's counts
    format: str  # --ckpt-format
    is_verified: bool  # no --no-verify-checkpoint
    keep_last: int | None
    keep_every: int | None
    keep_iterations: tuple[int, ...]
    agreed: LoadChoice | None = None  # of all ranks, once they have read all of it; training/saving/resumption.py


@dataclass(frozen=True, kw_only=True, slots=True)
class BadLossPolicy:
    """What a run does about a step with an unusable loss or gradient; see training/supervision/bad_steps.py."""

    action: Literal["stop", "skip-batch", "roll-back"]
    spike_factor: float | None  # a loss this many times above the median of the last steps is unusable too
    num_rolled_back: int  # batches that a roll-back leaves out, the unusable one included
    is_judged: bool  # with dynamic loss scaling, the scaler itself skips steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Length of a run and its learning rate, in steps or in samples, as typed."""

    skips_training: bool
    train_iters: int | None
    train_samples: int | None
    lr: float | None
    min_lr: float | None
    decoupled_lr: float | None
    decoupled_min_lr: float | None
    lr_decay_style: str
    lr_decay_iters: int | None
    lr_decay_samples: int | None
    lr_warmup_iters: int
    lr_warmup_samples: int
    lr_warmup_fraction: float | None
    lr_warmup_init: float
    lr_wsd_decay_iters: int | None
    lr_wsd_decay_samples: int | None
    weight_decay: float
    start_weight_decay: float | None
    end_weight_decay: float | None
    weight_decay_incr_style: str

    @property
    def unit(self) -> Literal["iters", "samples"]:
        """What the run is counted in, as the ends of Megatron's flags spell it."""
        return "iters" if self.train_samples is None else "samples"

    @property
    def length(self) -> int | None:
        return self.train_iters if self.unit == "iters" else self.train_samples

    @property
    def lr_decay(self) -> int | None:
        """Over how many units the learning rate falls; by default over the whole run."""
        return (self.lr_decay_iters if self.unit == "iters" else self.lr_decay_samples) or self.length

    @property
    def lr_warmup(self) -> int:
        return self.lr_warmup_iters if self.unit == "iters" else self.lr_warmup_samples

    @property
    def lr_wsd_decay(self) -> int | None:
        return self.lr_wsd_decay_iters if self.unit == "iters" else self.lr_wsd_decay_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """When and on how much a run is evaluated. is_whole: by passes over whole validation sets."""

    num_steps: int  # --eval-iters
    interval_steps: int
    first_step: int | None  # --start-eval-at-iter
    is_whole: bool
    has_several_sets: bool
    set_names: tuple[str, ...]
    scored_every_steps: int | None  # --evaluate-every: checkpoints that another process evaluates
    suite_path: str | None

    @property
    def is_on(self) -> bool:
        return bool(self.num_steps) or self.is_whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Data sets, tokenizer and order of samples.

    sources, problems: what the data flags name, and what is wrong with them.
    """

    flags: tuple[str, ...]  # that name data
    sources: DataPlan
    problems: tuple[str, ...]
    split: str | None
    cache_dir: str | None
    tokenizer_model: str | None
    tokenizer_type: str
    vocab_file: str | None
    merge_file: str | None
    flags_of_document_ends: tuple[str, ...]  # names of those that need a tokenizer which knows the ends of documents
    seed: int
    surplus: float  # samples that Megatron builds beyond those it needs, as a share
    dataloader_type: str
    has_phases: bool  # --phase-transition-iterations
    order: str
    order_samples: int | None
    accepts_order_change: bool
    accepts_many_epochs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sft:
    """Supervised fine-tuning: the data are conversations. num_epochs: None where the length is given otherwise."""

    is_packed: bool
    is_truncated: bool
    num_epochs: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The batch of a step and of an evaluation step, in samples."""

    micro_batch_size: int
    global_batch_size: int
    eval_micro_batch_size: int
    eval_global_batch_size: int
    has_own_evaluation: bool  # a flag gives evaluation its own sizes
    is_scheduled: bool  # --step-batch-size-schedule
    may_decrease: bool  # --decrease-batch-size-if-needed
    microbatch_group_size: int | None  # of the interleaved schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Everything that a command line says. model and layout: None without an essential, or with a senseless value."""

    flags: Flags
    preset: Preset | None
    initial_model: InitialModel | None  # of --load-hf
    machine: Machine
    output: Output
    precision: Literal["bf16", "fp16", "fp32"]
    checkpoints: Checkpoints
    schedule: Schedule
    bad_loss: BadLossPolicy
    evaluation: Evaluation
    data: Data
    sft: Sft | None
    recompute: Recompute
    vocab_size: int | None
    vocab_divisible_by: int
    seq_length: int | None
    model: ModelShape | None
    layout: ParallelLayout | None
    layers_per_chunk: int | None  # where it decides the number of virtual chunks

    @property
    def model_name(self) -> str:
        """The name of the model that a run trains: its preset's, its folder's, or custom."""
        if self.preset is not None:
            return self.preset.name
        return "custom" if self.initial_model is None else self.initial_model.model.name

    @property
    def is_vocabulary_chosen(self) -> bool:
        """Whether config.json or the command line gave the number of the model's rows; it may exceed the tokens'."""
        return self.initial_model is not None or "vocab_size" in self.flags.typed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan(RunSettings):
    """A run in full."""

    seq_length: int
    model: ModelShape
    layout: ParallelLayout
    batch: Batch
    memory: MemoryOptions
    has_attention_mask: bool  # the data loader makes one for each micro-batch

    @property
    def num_steps(self) -> int:
        """Steps of the run, as Megatron counts them; 0 where no length is given."""
        return self.schedule.train_iters or (self.schedule.train_samples or 0) // self.batch.global_batch_size

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return max(1, self.batch.global_batch_size // (self.batch.micro_batch_size * self.layout.data_parallel_size))

    @property
    def num_samples(self) -> dict[str, int]:
        """Samples that the run draws from each split."""
        return count_needed_samples(self.schedule, self.evaluation, self.batch)

    @property
    def rows(self) -> RowLayout | None:
        """How conversations become samples; None in pretraining."""
        if self.sft is None:
            return None
        return build_row_layout(self.sft, self.seq_length, self.layout.context_parallel_size)

    @property
    def order(self) -> OrderSettings:
        return build_order_settings(self.data, self.num_samples, self.seq_length, self.rows)

    def count_last_sample(self, iteration: int, num_consumed: int) -> int:
        """Where in its order the run ends if it resumes from there; the batch may have had another size before."""
        if self.batch.is_scheduled:
            return max(num_consumed, self.num_samples["train"])
        return num_consumed + max(0, self.num_steps - iteration) * self.batch.global_batch_size

    def count_last_validation_sample(self, iteration: int, num_consumed: int, *, num_steps: int | None = None) -> int:
        """Where in its order validation ends: an evaluation at each interval that is left, and one at the end.

        num_steps: of the run, where Megatron has counted them.
        """
        evaluation, num_steps = self.evaluation, num_steps or self.num_steps
        if evaluation.is_whole or not evaluation.num_steps or not num_steps:
            return 0
        # Nothing is evaluated before --start-eval-at-iter, even if the run resumes earlier.
        first = max(iteration, evaluation.first_step or 0)
        # Multiples of the interval in (first, num_steps], and 1 for the evaluation after the last step.
        num_left = num_steps // evaluation.interval_steps - first // evaluation.interval_steps + 1
        return num_consumed + max(0, num_left) * evaluation.num_steps * self.batch.eval_global_batch_size


def build_row_layout(sft: Sft, seq_length: int, context_parallel_size: int) -> RowLayout:
    """Under context parallelism each rank takes two equal parts of each conversation of a packed row."""
    is_divided = sft.is_packed and context_parallel_size > 1
    return RowLayout(
        seq_length=seq_length,
        is_packed=sft.is_packed,
        is_truncated=sft.is_truncated,
        granularity=2 * context_parallel_size if is_divided else 1,
    )


def count_needed_samples(schedule: Schedule, evaluation: Evaluation, batch: Batch) -> dict[str, int]:
    """Samples that a run draws from each split, as megatron.training.get_train_valid_test_num_samples counts them.

    0 for validation by whole passes.
    """
    num_steps = schedule.train_iters or (schedule.train_samples or 0) // batch.global_batch_size
    eval_samples = evaluation.num_steps * batch.eval_global_batch_size
    num_evaluations = 1 if schedule.skips_training else num_steps // evaluation.interval_steps + 1
    if evaluation.first_step is not None and not schedule.skips_training:
        num_evaluations = max(0, num_evaluations - evaluation.first_step // evaluation.interval_steps)
    return {
        "train": 0 if schedule.skips_training else schedule.train_samples or num_steps * batch.global_batch_size,
        "valid": 0 if evaluation.is_whole else num_evaluations * eval_samples,
        "test": eval_samples,
    }


def build_order_settings(
    data: Data, num_samples: Mapping[str, int], seq_length: int, rows: RowLayout | None
) -> OrderSettings:
    """What decides the order of samples, of a run or of a checkpoint."""
    return OrderSettings(
        sources=DataPlan() if data.problems else data.sources,
        num_samples=num_samples,
        split=data.split,
        order=data.order,
        order_samples=data.order_samples,
        seed=data.seed,
        seq_length=seq_length,
        surplus=data.surplus,
        dataloader_type=data.dataloader_type,
        rows=None if rows is None else rows.description,
    )
