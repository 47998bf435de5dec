"""A model in a Hugging Face folder, conversations that fill one batch, and what transformers makes of both."""

from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_hammer.data.conversations.packing import RowLayout, plan_rows
from tests.helpers.toy_conversations import Conversation, draw_conversations, write_conversations

# Relative, in fp32, where sums are taken in another order: at most 1.3e-7 for the loss and 1.3e-6 for the gradient's
# norm (1.5e-7 without GPT-2's tied embeddings) were measured.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 5e-6
SEQ_LENGTH, VOCAB_SIZE, NUM_CONVERSATIONS = 48, 500, 24
ROWS = RowLayout(seq_length=SEQ_LENGTH, is_packed=True, is_truncated=False)
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=96, intermediate_size=176, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCAB_SIZE, max_position_embeddings=80,
    ),
    # Positions are learned: one that does not begin anew with each conversation has another embedding.
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=96, n_layer=4, n_head=8, vocab_size=VOCAB_SIZE, n_positions=80, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    ),
}  # fmt: skip


class FineTuning:
    """A model in a Hugging Face folder, its conversations, and what transformers makes of them."""

    def __init__(self, directory: Path, name: str):
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.15)
        model.save_pretrained(directory / "hf")
        conversations = draw_conversations(NUM_CONVERSATIONS, vocab_size=VOCAB_SIZE, longest=32)
        plan = plan_rows(torch.tensor([len(ids) for ids, _ in conversations]).numpy(), ROWS)
        assert plan.num_rows == 8, "the first batch must hold every conversation once"
        data = write_conversations(directory / "conversations", conversations, vocab_size=VOCAB_SIZE)
        self.directory, self.conversations = directory, conversations
        self.flags = (
            *("--load-hf", str(directory / "hf"), "--sft", "--data-path", data, "--seq-length", str(SEQ_LENGTH)),
            *("--split", "100,0,0", "--eval-iters", "0", "--precision", "fp32", "--lr", "3e-3", "--train-iters", "1"),
        )
        self.loss, self.norm = compute_oracle(model, conversations)

    def assert_equal(self, line: dict[str, Any]) -> None:
        assert abs(line["loss"] / self.loss - 1) < LOSS_TOLERANCE
        assert abs(line["grad_norm"] / self.norm - 1) < NORM_TOLERANCE


def compute_oracle(model: torch.nn.Module, conversations: list[Conversation]) -> tuple[float, float]:
    """(loss per learned token, norm of its gradient), each conversation alone, labels of -100 elsewhere."""
    total, num_learned = torch.zeros(()), 0
    for ids, mask in conversations:
        tokens = torch.tensor(ids)[None]
        labels = tokens.masked_fill(torch.tensor(mask)[None] == 0, -100)
        num_learned += int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=tokens, labels=labels).loss * (labels[:, 1:] != -100).sum()
    loss = total / num_learned
    loss.backward()
    norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()
