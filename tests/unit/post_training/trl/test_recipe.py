"""The TOML file of post-training: what it holds, and that nothing in it is ignored."""

from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.post_training.trl.recipe import Dpo, Lora, Recipe, Stage, read_recipe


def read(folder: Path, text: str, *, stage: Stage = "dpo", is_lora: bool = True) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, stage=stage, is_lora=is_lora)


def test_every_value_arrives(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        'lr = 1e-4\nmin_lr = 1e-5\ntrain_steps = 7\nglobal_batch_size = 6\nprecision = "fp32"\n'
        '[dpo]\nbeta = 0.3\nloss_type = "ipo"\n[lora]\nrank = 5\ntarget_modules = ["q_proj"]\n',
    )
    assert recipe == Recipe(
        lr=1e-4,
        min_lr=1e-5,
        train_steps=7,
        global_batch_size=6,
        precision="fp32",
        dpo=Dpo(beta=0.3, loss_type="ipo"),
        lora=Lora(rank=5, target_modules=("q_proj",)),
    )


@pytest.mark.parametrize(
    "text, stage, is_lora, problem",
    [
        ("lr = 1\nlearning_rate = 2", "sft", False, r"learning_rate must be a known field, got 2"),
        ("lr = 1\n[dpo]\nlabel_smoothing = 0.1", "dpo", False, r"dpo\.label_smoothing must be a known field"),
        ("min_lr = 0", "sft", False, r"lr must be given"),
        ('lr = "1e-4"', "sft", False, r"lr must be a number, got '1e-4'"),
        ("lr = nan", "sft", False, r"lr must be (above 0|below inf), got nan"),
        ("lr = 1\nclip_grad = inf", "sft", False, r"clip_grad must be below inf, got inf"),
        ("lr = 1\nmicro_batch_size = 0", "sft", False, r"micro_batch_size must be above 0, got 0"),
        ('lr = 1\n[dpo]\nloss_type = "kto"', "dpo", False, r"dpo\.loss_type must be 'sigmoid', 'hinge' or 'ipo'"),
        ("lr = 1\n[dpo]\nbeta = 1", "sft", False, r"dpo must be absent in the stage sft"),
        ("lr = 1\n[lora]\nrank = 1", "dpo", False, r"lora must be absent without --lora"),
        ("lr = 1\nnum_epochs = 1\ntrain_steps = 3", "sft", False, r"num_epochs and train_steps must not both"),
        ("lr = 1\nmin_lr = 2", "sft", False, r"min_lr must be below lr, got min_lr=2, lr=1"),
        ('lr = 1\nmin_lr = 0.5\nlr_decay_style = "constant"', "sft", False, r"min_lr must be 0 with a constant rate"),
        ('lr = 1\n[lora]\ntarget_modules = ["lm_head"]', "dpo", True, r"target_modules must not name lm_head"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(
    tmp_path: Path, text: str, stage: Stage, is_lora: bool, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, text, stage=stage, is_lora=is_lora)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "lr = 1\nmin_lr = 2\n[dpo]\n[lora]", stage="reward", is_lora=False)
    assert len(caught.value.problems) == 3
