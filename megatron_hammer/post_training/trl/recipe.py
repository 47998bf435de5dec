"""The hyper-parameters of a post-training run: a TOML file, read into types; what no stage would use is refused.

    lr = 2e-5
    global_batch_size = 32
    [dpo]
    beta = 0.1

Names are Megatron's where Megatron has them. Paths are flags of the command and are not in the file.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml

type Stage = Literal["sft", "reward", "dpo"]

_Positive = Annotated[int, Gt(0)]
_Share = Annotated[float, Ge(0), Lt(1)]
# TOML has infinities.
_NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
_AboveZero = Annotated[float, Gt(0), Lt(math.inf)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """[lora]: low-rank adapters, for --lora.

    target_modules: names of linear layers; none means every linear layer except the output layer. modules_to_save:
    modules that are trained whole, such as embed_tokens and lm_head for tokens that the base model has never seen.
    """

    rank: _Positive = 16
    alpha: _Positive = 32
    dropout: _Share = 0.0
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Dpo:
    """[dpo]: the loss of direct preference optimization. beta: how strongly the policy is held to the base model.

    sft_weight: weight of the cross-entropy of the chosen answers, which is added to the loss.
    """

    beta: _AboveZero = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    sft_weight: _NotNegative = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The whole file. A run ends after `num_epochs`, or after `train_steps` where they are given.

    max_length: tokens of the longest conversation that is used; the model's positions by default.
    precision: of the computation; weights, gradients and optimizer stay fp32. `auto` is bf16 on a GPU, else fp32.
    save_interval, log_interval: in steps.
    """

    lr: _AboveZero
    min_lr: _NotNegative = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_steps: Annotated[int, Ge(0)] = 0
    num_epochs: _AboveZero | None = None
    train_steps: _Positive | None = None
    micro_batch_size: _Positive = 4
    global_batch_size: _Positive = 32
    max_length: Annotated[int, Gt(1)] | None = None
    weight_decay: _NotNegative = 0.0
    adam_beta1: _Share = 0.9
    adam_beta2: _Share = 0.95
    adam_eps: Annotated[float, Gt(0), Le(1e-2)] = 1e-8
    clip_grad: _AboveZero = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    recompute: bool = False
    seed: Annotated[int, Ge(0), Lt(2**32)] = 1234
    save_interval: _Positive = 100
    log_interval: _Positive = 10
    lora: Lora | None = None
    dpo: Dpo | None = None


def read_recipe(path: Path, *, stage: Stage, is_lora: bool) -> Recipe:
    """Return the hyper-parameters of a stage. Raises ConfigError naming every field that is wrong or without effect."""
    remedy = "Repair the file."
    recipe = read_toml(path, Recipe, remedy=remedy, raises=ConfigError, allows_unknown=False)
    if problems := _list_problems(recipe, stage=stage, is_lora=is_lora):
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return recipe


def _list_problems(recipe: Recipe, *, stage: Stage, is_lora: bool) -> list[str]:
    problems = []
    if recipe.lora is not None and not is_lora:
        problems.append("lora must be absent without --lora, got a table. Pass --lora, or remove the table.")
    if recipe.dpo is not None and stage != "dpo":
        problems.append(f"dpo must be absent in the stage {stage}, got a table. Remove it.")
    if recipe.num_epochs is not None and recipe.train_steps is not None:
        both = f"num_epochs={recipe.num_epochs:g}, train_steps={recipe.train_steps}"
        problems.append(f"num_epochs and train_steps must not both be given, got {both}. Remove one of them.")
    if recipe.lr_decay_style == "constant" and recipe.min_lr:
        problems.append(f"min_lr must be 0 with a constant rate, got {recipe.min_lr:g}. Remove it.")
    if recipe.min_lr >= recipe.lr:
        problems.append(f"min_lr must be below lr, got min_lr={recipe.min_lr:g}, lr={recipe.lr:g}. Lower it.")
    if stage == "dpo" and recipe.lora is not None and "lm_head" in recipe.lora.target_modules:
        problems.append(
            "lora.target_modules must not name lm_head for DPO, got lm_head: TRL reads its weight past the adapter. "
            "Put it into lora.modules_to_save."
        )
    return problems
