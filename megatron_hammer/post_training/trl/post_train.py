"""SFT, reward modelling and DPO of a Hugging Face model, with or without LoRA: data checked first, then TRL's training.

Read `post_train` from top to bottom. It runs as one process, or as several under torchrun, each with the whole model.
Not here: SFT in Megatron's loop (hammer pretrain --sft), for models that one GPU does not hold and for packed data.
"""

import dataclasses
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from megatron_hammer.checkpoint.hugging_face.folder import open_hf_folder
from megatron_hammer.config.environment import read_process_place
from megatron_hammer.errors import ConfigError, DataError, PlatformError
from megatron_hammer.files.publish import partial_path, publish_directory, require_result_folder
from megatron_hammer.platforms.agreement import ask_first_rank
from megatron_hammer.platforms.device import count_devices
from megatron_hammer.platforms.select import select_platform
from megatron_hammer.post_training.templates.model_template import open_chat_tokenizer
from megatron_hammer.post_training.trl.examples import Examples, load_examples
from megatron_hammer.post_training.trl.output_folder import write_output
from megatron_hammer.post_training.trl.recipe import Lora, Recipe, Stage
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

# Before the libraries are imported, which read them then.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_TELEMETRY": "1"}
REPORT_NAME = "post_training.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PostTrainOptions:
    """What a run reads and writes; see the command's --help."""

    stage: Stage
    recipe: Recipe
    hf_dir: Path
    data: Sequence[str]
    held_out_data: Sequence[str] = ()
    save_dir: Path
    chat_template: str | None = None
    bindings: Mapping[str, str] = field(default_factory=dict)
    is_lora: bool = False
    keeps_adapter: bool = False
    platform: str = "auto"
    overwrite: bool = False
    restart: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PostTrainReport:
    """What was trained, also written beside the model as post_training.json.

    dropped: for every reason, `file:line` of the records that were left out. losses: by step. held_out: the metrics of
    TRL after training, on the held-out data.
    """

    stage: Stage
    save_dir: Path
    base_dir: Path
    recipe: dict[str, Any]
    is_lora: bool
    is_adapter: bool
    num_parameters: int
    num_trained_parameters: int
    num_records: int
    num_examples: int
    dropped: Mapping[str, Sequence[str]]
    num_held_out: int
    num_steps: int
    resumed_from_step: int
    losses: Mapping[int, float]
    held_out: Mapping[str, float]
    elapsed_s: float


def post_train(options: PostTrainOptions) -> PostTrainReport | None:
    """Train and publish; returns the report on the first process, None on the others.

    A run that was killed continues with the same options from its newest checkpoint, in SAVE.partial beside the output.
    Raises ConfigError, DataError or ConversionError before training where it cannot work, and DataError for a loss that
    is not finite.
    """
    started_at_s = time.monotonic()
    platform = prepare_process(options.platform)
    base = open_hf_folder(options.hf_dir)
    max_length = _choose_max_length(options.recipe, base.model.shape.max_position_embeddings)
    chat_tokenizer, end_of_turn_ids = open_chat_tokenizer(
        options.hf_dir, options.hf_dir, chat_template=options.chat_template, bindings=options.bindings
    )
    is_first = read_process_place().rank == 0
    if options.overwrite and is_first:
        require_result_folder(options.save_dir, REPORT_NAME)
    # For the whole run, because the folder is locked for it: two runs must not write the same checkpoints.
    sources = [options.hf_dir, *map(Path, (*options.data, *options.held_out_data))]
    output = partial(publish_directory, options.save_dir, overwrite=options.overwrite, sources=sources)
    with output() if is_first else nullcontext() as folder:
        data = load_examples(
            options.stage,
            options.data,
            options.held_out_data,
            chat_tokenizer,
            max_length=max_length,
            show=partial(print, file=sys.stderr) if is_first else lambda line: None,
        )
        tokenizer = _load_tokenizer(options.hf_dir, end_of_turn_ids)
        trainer, checkpoint = _build(options, data, tokenizer, platform)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        held_out = _evaluate(trainer) if data.held_out else {}
        if folder is None:
            return None
        # Before the model is written, which merges the adapter.
        report = _describe(options, data, trainer, checkpoint, held_out, elapsed_s=time.monotonic() - started_at_s)
        write_output(
            folder,
            stage=options.stage,
            base_dir=options.hf_dir,
            model=trainer.accelerator.unwrap_model(trainer.model),
            keeps_adapter=options.keeps_adapter,
            chat_template=chat_tokenizer.template.text,
            end_of_turn_ids=end_of_turn_ids,
            pad_token=tokenizer.pad_token,
        )
        content = orjson.dumps(report, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
        (folder / REPORT_NAME).write_bytes(content)
    shutil.rmtree(partial_path(options.save_dir))
    return report


def prepare_process(platform: str) -> str:
    """Return the platform that is used, with the libraries offline and quiet; before they are imported.

    Raises PlatformError for several GPUs without a process for each.
    """
    os.environ.update(OFFLINE)
    import datasets
    import huggingface_hub.constants
    import transformers

    # They have read the environment already where something else imported them before.
    huggingface_hub.constants.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # TRL sets options that transformers calls deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    platform = select_platform(platform)
    if platform == "cuda" and "RANK" not in os.environ and count_devices() > 1:
        raise PlatformError(
            f"processes: must be one for every GPU, got 1 for {count_devices()} GPUs. "
            "Start it with torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES=0."
        )
    return platform


def _choose_max_length(recipe: Recipe, num_positions: int) -> int:
    if recipe.max_length is not None and recipe.max_length > num_positions:
        raise ConfigError(
            f"max_length: must be at most the positions of the model, got {recipe.max_length} for {num_positions}. "
            "Lower it."
        )
    return recipe.max_length or num_positions


def _load_tokenizer(hf_dir: Path, end_of_turn_ids: Sequence[int]) -> Any:
    """The tokenizer as TRL wants it: only to pad, with a token that ends no turn.

    A reward model scores the last token that is no padding, which is the end of a turn.
    """
    tokenizer = load_with_transformers(hf_dir)
    names = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token)
    for name in names:
        if name is not None and tokenizer.convert_tokens_to_ids(name) not in end_of_turn_ids:
            tokenizer.pad_token = name
            return tokenizer
    raise DataError(
        f"{hf_dir}: tokenizer must have a pad, unk, eos or bos token that ends no turn, got none. "
        "Name a pad_token in tokenizer_config.json."
    )


def _build(options: PostTrainOptions, data: Examples, tokenizer: Any, platform: str) -> tuple[Any, Path | None]:
    """TRL's trainer, and the checkpoint from which it continues."""
    # Here, because they import TRL, after prepare_process has put it offline.
    from transformers.trainer_callback import PrinterCallback

    from megatron_hammer.post_training.trl.progress import ShowProgress
    from megatron_hammer.post_training.trl.trainers import build_arguments, build_trainer, load_model
    from megatron_hammer.post_training.trl.unfinished import Job, MarkComplete, begin_or_continue

    num_processes = read_process_place().world_size
    work_dir = partial_path(options.save_dir)
    recipe = options.recipe
    arguments = build_arguments(options.stage, recipe, work_dir, platform=platform, num_processes=num_processes)
    job = Job(
        stage=options.stage,
        recipe=dataclasses.asdict(recipe),
        is_lora=options.is_lora,
        base_dir=str(options.hf_dir),
        base=describe_files(options.hf_dir),
        examples_sha256=data.digest(),
        platform=platform,
        num_processes=num_processes,
    )
    checkpoint = ask_first_rank(lambda: begin_or_continue(work_dir, job, restart=options.restart))
    trainer = build_trainer(
        options.stage,
        arguments,
        model=load_model(options.stage, options.hf_dir, seed=recipe.seed),
        tokenizer=tokenizer,
        examples=data.examples,
        held_out=data.held_out,
        lora=(recipe.lora or Lora()) if options.is_lora else None,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log to stdout
    trainer.add_callback(ShowProgress())
    trainer.add_callback(MarkComplete())
    return trainer, checkpoint


def _evaluate(trainer: Any) -> dict[str, float]:
    """TRL's metrics on the held-out data, under their names there without the prefix."""
    metrics = trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}


def _describe(
    options: PostTrainOptions,
    data: Examples,
    trainer: Any,
    checkpoint: Path | None,
    held_out: Mapping[str, float],
    *,
    elapsed_s: float,
) -> PostTrainReport:
    parameters = list(trainer.model.parameters())
    return PostTrainReport(
        stage=options.stage,
        save_dir=options.save_dir,
        base_dir=options.hf_dir,
        recipe=dataclasses.asdict(options.recipe),
        is_lora=options.is_lora,
        is_adapter=options.keeps_adapter,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_trained_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        num_records=data.num_records,
        num_examples=len(data.examples),
        dropped=data.dropped,
        num_held_out=len(data.held_out),
        num_steps=trainer.state.global_step,
        resumed_from_step=0 if checkpoint is None else int(checkpoint.name.split("-")[1]),
        losses={entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        held_out=held_out,
        elapsed_s=elapsed_s,
    )


def describe_files(hf_dir: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files that say what the base model computes, by name."""
    paths = [path for path in sorted(hf_dir.iterdir()) if path.suffix in (".safetensors", ".bin", ".json")]
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
