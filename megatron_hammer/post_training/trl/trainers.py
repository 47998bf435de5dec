"""TRL's trainers over examples that are encoded already: its arguments from a recipe, the model, and the three stages.

TRL would render and encode the texts itself, once more and without our checks, and would take what looks like a special
token in a user's text for that token. So every trainer gets token ids, and none of them prepares data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from megatron_hammer.errors import ConfigError
from megatron_hammer.post_training.trl.recipe import Dpo, Lora, Recipe, Stage

KEPT_CHECKPOINTS = 2  # the newest one may be cut off by a kill

type Example = Mapping[str, list[int]]


class EncodedDPOTrainer(DPOTrainer):
    """DPO over `prompt_ids`, `chosen_ids` and `rejected_ids`; the other two trainers of TRL skip encoded data."""

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any, **options: Any) -> Dataset:
        return dataset


def build_arguments(
    stage: Stage, recipe: Recipe, output_dir: Path, *, platform: str, num_processes: int
) -> SFTConfig | RewardConfig | DPOConfig:
    """TRL's arguments for a stage; raises ConfigError where the batch cannot be divided among the processes."""
    per_step = recipe.micro_batch_size * num_processes
    if recipe.global_batch_size % per_step:
        raise ConfigError(
            f"global_batch_size: must be a multiple of micro_batch_size x processes, got {recipe.global_batch_size}, "
            f"{recipe.micro_batch_size} x {num_processes}. Change one of them."
        )
    is_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and platform == "cuda")
    schedule, schedule_options = _select_schedule(recipe)
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        "num_train_epochs": recipe.num_epochs or 1.0,
        "max_steps": recipe.train_steps or -1,  # -1: by epochs
        "per_device_train_batch_size": recipe.micro_batch_size,
        "per_device_eval_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.global_batch_size // per_step,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": schedule_options,
        "warmup_steps": recipe.lr_warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_eps,
        "max_grad_norm": recipe.clip_grad,
        "bf16": is_bf16,
        # Where nothing is said, transformers lets GPUs compute fp32 products in TF32.
        "tf32": False if platform == "cuda" and not is_bf16 else None,
        "gradient_checkpointing": recipe.recompute,
        "use_cpu": platform == "cpu",
        "ddp_backend": "gloo" if platform == "cpu" and num_processes > 1 else None,
        "ddp_find_unused_parameters": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_interval,
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_steps": recipe.log_interval,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # progress.py ends the run
        "report_to": "none",
        "log_level": "error",
        "log_level_replica": "error",
        "disable_tqdm": True,
        "max_length": None,  # what is too long was dropped by name; TRL would cut it
    }
    if stage == "sft":
        return SFTConfig(**options)
    if stage == "reward":
        return RewardConfig(**options)
    dpo = recipe.dpo or Dpo()
    losses: dict[str, Any] = {"loss_type": [dpo.loss_type]}
    if dpo.sft_weight:
        losses = {"loss_type": [dpo.loss_type, "sft"], "loss_weights": [1.0, dpo.sft_weight]}
    return DPOConfig(**options, **losses, beta=dpo.beta)


def _select_schedule(recipe: Recipe) -> tuple[str, dict[str, float]]:
    """The scheduler's name in transformers, and its options."""
    if recipe.lr_decay_style == "constant":
        return "constant_with_warmup", {}
    if recipe.lr_decay_style == "linear":  # a polynomial, because the scheduler of that name ends at zero
        return "polynomial", {"lr_end": recipe.min_lr, "power": 1.0}
    return "cosine_with_min_lr", {"min_lr": recipe.min_lr}


def load_model(stage: Stage, hf_dir: Path, *, seed: int) -> Any:
    """The model in fp32, whatever its stored type; for a reward model, with a new head that gives one score."""
    set_seed(seed)  # for the head
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True}
    if stage == "reward":
        return AutoModelForSequenceClassification.from_pretrained(hf_dir, num_labels=1, **options)
    return AutoModelForCausalLM.from_pretrained(hf_dir, **options)


def build_trainer(
    stage: Stage,
    arguments: SFTConfig | RewardConfig | DPOConfig,
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    lora: Lora | None,
) -> Any:
    """The trainer of a stage. model: loaded from a path, from which DPO loads the reference model once more."""
    if lora is not None:
        require_modules(model, lora)
    trainers = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": EncodedDPOTrainer}
    return trainers[stage](
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(example) for example in examples]),
        eval_dataset=Dataset.from_list([dict(example) for example in held_out]) if held_out else None,
        processing_class=tokenizer,
        peft_config=None if lora is None else build_lora(stage, lora),
    )


def require_modules(model: Any, lora: Lora) -> None:
    """Raise ConfigError for names that no module of the model has; PEFT passes over them if another one fits."""
    names = [name for name, _ in model.named_modules() if name]
    problems = []
    for field in ("target_modules", "modules_to_save"):
        for wanted in getattr(lora, field):
            # As PEFT compares: the whole name of a module, or its end.
            if not any(f".{name}".endswith(f".{wanted}") for name in names):
                endings = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
                problems.append(f"lora.{field}: must name modules of the model, got {wanted}. It has {endings}.")
    if both := sorted({*lora.target_modules} & {*lora.modules_to_save}):
        problems.append(f"lora: a module has an adapter or is trained whole, got {both[0]} for both. Keep one of them.")
    if problems:
        raise ConfigError(*problems)


def build_lora(stage: Stage, lora: Lora) -> LoraConfig:
    """PEFT's configuration. The new head of a reward model is always trained whole."""
    saved = [*lora.modules_to_save, *(["score"] if stage == "reward" else [])]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # "all-linear" leaves out the output layer.
        target_modules=list(lora.target_modules) or "all-linear",
        modules_to_save=saved or None,
        task_type="SEQ_CLS" if stage == "reward" else "CAUSAL_LM",
    )
