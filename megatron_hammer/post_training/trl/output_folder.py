"""The folder that a run leaves: a Hugging Face model, or an adapter, with the tokenizer and its chat template.

Weights get the stored type of the base model. Its config.json is kept as it is, because training changes nothing in it;
a reward model has another head, and so the config.json that transformers writes.
"""

import json
import shutil
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, GENERATION_NAME, read_config
from megatron_hammer.checkpoint.hugging_face.folder import open_hf_folder
from megatron_hammer.checkpoint_files.safetensors.weight_files import open_hf_weights
from megatron_hammer.errors import ConversionError
from megatron_hammer.post_training.templates.model_template import TEMPLATE_NAME
from megatron_hammer.post_training.trl.recipe import Stage
from megatron_hammer.tokenizer.export.export_tokenizer import HF_TOKENIZER_FILES

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def write_output(
    folder: Path,
    *,
    stage: Stage,
    base_dir: Path,
    model: Any,
    keeps_adapter: bool,
    chat_template: str,
    end_of_turn_ids: Sequence[int],
    pad_token: str,
) -> None:
    """Fill an empty folder with the trained model. model: as the trainer had it; an adapter is merged into it unless
    it is kept. Raises ConversionError if a weight is not finite, or if the converters could not read the model back."""
    _require_finite(model)
    if keeps_adapter:
        model.save_pretrained(folder)
    else:
        if hasattr(model, "merge_and_unload"):  # a model of peft
            model = model.merge_and_unload()
        model.to(read_stored_dtype(base_dir))
        _require_finite(model)
        model.save_pretrained(folder)
        if stage != "reward":
            shutil.copyfile(base_dir / CONFIG_NAME, folder / CONFIG_NAME)
            _write_generation_config(base_dir, folder, end_of_turn_ids)
            open_hf_folder(folder)
    write_tokenizer(base_dir, folder, chat_template=chat_template, pad_token=pad_token if stage == "reward" else None)


def _require_finite(model: Any) -> None:
    """The last step is followed by no loss that would show it, and fp16 holds no number above 65,504."""
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ConversionError(
            f"{bad[0]}: must have finite weights, got others in type {str(model.dtype).removeprefix('torch.')}. "
            "Lower lr, or store the base model in bf16."
        )


def read_stored_dtype(hf_dir: Path) -> torch.dtype:
    """The type of the stored weights, or the smallest one that holds all of them exactly."""
    return reduce(torch.promote_types, set(open_hf_weights(hf_dir).dtypes.values()))


def _write_generation_config(base_dir: Path, folder: Path, end_of_turn_ids: Sequence[int]) -> None:
    """The base model's, where the end of a turn ends a text too; it comes first, because some engines take one id."""
    path = base_dir / GENERATION_NAME
    content = read_config(path) if path.is_file() else {}
    ends = content.get("eos_token_id", read_config(base_dir / CONFIG_NAME).get("eos_token_id"))
    others = ends if isinstance(ends, list) else [ends]
    content["eos_token_id"] = [*end_of_turn_ids, *(end for end in others if end not in (None, *end_of_turn_ids))]
    (folder / GENERATION_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(base_dir: Path, folder: Path, *, chat_template: str, pad_token: str | None) -> None:
    """Copy the base model's tokenizer and put the template beside it. pad_token: what the tokenizer is to pad with.

    A reward model must pad with the token that its config.json names, because it scores the last other token.
    """
    for name in HF_TOKENIZER_FILES:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, folder / name)
    # A file of its own: transformers prefers it to the field of tokenizer_config.json.
    (folder / TEMPLATE_NAME).write_text(chat_template, encoding="utf-8")
    if pad_token is not None:
        config = read_config(folder / TOKENIZER_CONFIG_NAME)
        config["pad_token"] = pad_token
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / TOKENIZER_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
