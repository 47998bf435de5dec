"""The plain training loop around transformers' LlamaForCausalLM that our training is compared with."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_hammer.presets.preset import Recipe


def build_optimizer(model: torch.nn.Module, recipe: Recipe, *, lr: float, is_fused: bool | None = None) -> Any:
    """torch.optim.AdamW with the recipe's settings; norms are not decayed, as in Megatron."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        fused=is_fused,
    )


def train_step(model: Any, optimizer: Any, micro_batches: Any, clip_grad: float) -> float:
    """One step over [micro-batch, tokens or labels, b, s]; returns its loss, for which it waits."""
    optimizer.zero_grad()
    loss_sum = torch.zeros((), device=micro_batches.device)
    for tokens, labels in micro_batches:
        # Without the cache for generation, which would copy every key and value.
        output = model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
        loss = output.loss / len(micro_batches)
        loss.backward()
        loss_sum += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return loss_sum.item()


def measure(setting: Any, data_prefix: Path, micro_batch_size: int) -> dict[str, Any]:
    """Losses, step times and peak memory of the same shape, tokens per step and optimizer settings as a row of ours.

    fp32 weights and fused AdamW, bf16 autocast and torch.compile on a GPU; fp32 without either on a CPU. The tokens
    are those of the data, in its own order.
    """
    from megatron_hammer.platforms.device import read_peak_memory_bytes

    device, is_gpu = setting.platform, setting.platform == "cuda"
    model = build_model(setting).to(device).train()
    optimizer = build_optimizer(model, setting.recipe, lr=setting.recipe.lr, is_fused=is_gpu)
    compiled = torch.compile(model) if is_gpu else model
    losses, times_s = [], []
    for micro_batches in read_batches(setting, data_prefix, micro_batch_size):
        started_at_s = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=is_gpu):
            losses.append(train_step(compiled, optimizer, micro_batches.to(device), setting.recipe.clip_grad))
        times_s.append(time.perf_counter() - started_at_s)
    return {"losses": losses, "times_s": times_s, "peak_memory_bytes": read_peak_memory_bytes()}


def build_model(setting: Any) -> Any:
    """A new LlamaForCausalLM of the setting's shape, with its own initialisation."""
    import transformers

    from megatron_hammer.checkpoint.hugging_face.config_json import build_config
    from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
    from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family

    family = select_family(setting.model)
    dropout = Dropout(attention=setting.recipe.attention_dropout, hidden=setting.recipe.hidden_dropout)
    values = build_config(family, setting.model, dropout, dtype="float32", bos_id=None, eos_id=None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, attn_implementation="sdpa"))


def read_batches(setting: Any, data_prefix: Path, micro_batch_size: int) -> Any:
    """Each step's [micro-batch, tokens or labels, b, s], int64, from the start of the data."""
    from megatron_hammer.data.indexed.pair import read_index

    seq_length, batch = setting.recipe.seq_length, max(setting.global_batch_size, micro_batch_size)
    num_steps = setting.warmup_steps + setting.steps
    num_tokens = num_steps * batch * seq_length
    tokens = torch.from_numpy(read_index(data_prefix).tokens[: num_tokens + 1].astype(np.int64))
    inputs, labels = tokens[:-1], tokens[1:]
    shape = (num_steps, batch // micro_batch_size, micro_batch_size, seq_length)
    return torch.stack([inputs.reshape(shape), labels.reshape(shape)], dim=2)
