"""A run from a Hugging Face folder starts where transformers stands: its loss and its gradient on the first batch.

Relative, in fp32; sums are taken in another order. The twins differ by 1e-3 and more.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sample_orders import build_datasets
from training_runs import train, write_toy_data

pytestmark = pytest.mark.distributed
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 5e-5
BATCH_SIZE, SEQ_LENGTH, VOCAB_SIZE = 8, 64, 1000
# No two sizes alike; 1000 tokens are padded to 1024 or more.
SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 80,
    "intermediate_size": 176,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3-tied": lambda: transformers.Qwen3Config(head_dim=20, tie_word_embeddings=True, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=96, n_layer=4, n_head=8, vocab_size=VOCAB_SIZE, n_positions=80, **dict.fromkeys(DROPOUTS, 0.0)
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        moe_intermediate_size=80, shared_expert_intermediate_size=112, num_experts=6, num_experts_per_tok=2, **SIZES
    ),
}
DROPOUTS = ("resid_pdrop", "attn_pdrop", "embd_pdrop")
RECIPE = (
    *("--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "2", "--global-batch-size", str(BATCH_SIZE)),
    *("--lr", "3e-3", "--min-lr", "3e-4", "--lr-warmup-iters", "0", "--eval-iters", "0", "--split", "100,0,0"),
)
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
VP2 = ("--num-virtual-stages-per-pipeline-rank", "2")
EP2 = ("--expert-model-parallel-size", "2", "--moe-aux-loss-coeff", "0")
# Padded to 2048: the second rank has no token at all.
ALL_PADDING = ("--make-vocab-size-divisible-by", "1024")


class Reference:
    """A transformers model in a folder, and what it makes of the first batch of the run."""

    def __init__(self, name: str, directory: Path, data: str):
        torch.manual_seed(3)
        self.folder = directory / name
        self.model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if parameter.dim() == 1:
                    is_scale = parameter_name.endswith("weight")
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if is_scale else 0.0))
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self.model.save_pretrained(self.folder)
        self.flags = ("--load-hf", str(self.folder), "--data-path", data, *RECIPE)
        self.tokens, self.labels = read_first_batch(self.flags)
        self.loss, self.norm = self.measure()

    def measure(self) -> tuple[float, float]:
        """(mean loss of a token, norm of its gradient)"""
        self.model.zero_grad()
        logits = self.model(self.tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.labels.flatten())
        loss.backward()
        squares = sum(p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None)
        return loss.item(), float(squares) ** 0.5

    def train(self, num_processes: int, metrics_path: Path, *flags: str, num_steps: int = 1) -> list[dict[str, Any]]:
        return train(num_processes, metrics_path, *self.flags, "--train-iters", str(num_steps), *flags)


def read_first_batch(flags: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [b, s] that the run reads first, from Megatron's own data set."""
    from megatron_hammer.platforms import megatron_compat

    megatron_compat.install("cpu")
    from megatron_hammer.training.pretrain import prepare

    namespace = prepare([*flags, "--train-iters", "1", "--platform", "cpu"]).namespace
    dataset = build_datasets(namespace)[0]
    samples = [dataset[index] for index in range(BATCH_SIZE)]
    assert all(sample["loss_mask"].all() for sample in samples)
    return torch.stack([sample["tokens"] for sample in samples]), torch.stack([sample["labels"] for sample in samples])


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    directory = tmp_path_factory.mktemp("references")
    data = write_toy_data(directory / "data")
    return {name: Reference(name, directory, data) for name in CONFIGS}


@pytest.mark.parametrize(
    ("name", "num_processes", "flags"),
    [
        pytest.param("llama", 1, (), id="single"),
        pytest.param("llama", 4, (*TP2, *PP2, "--sequence-parallel", *ALL_PADDING), id="tp2-pp2-sp"),
        pytest.param("llama", 2, (), id="dp2-distributed-optimizer"),
        pytest.param("qwen3-tied", 2, TP2, id="tied-qk-norm-tp2"),
        pytest.param("qwen3-tied", 2, (*PP2, *VP2), id="tied-qk-norm-pp2-vp2"),
        pytest.param("gpt2", 2, TP2, id="gpt2-tp2"),
        pytest.param("qwen2-moe", 2, EP2, id="moe-ep2"),
    ],
)
def test_the_first_step_is_that_of_transformers(
    references: dict[str, Reference], tmp_path: Path, name: str, num_processes: int, flags: tuple[str, ...]
) -> None:
    reference = references[name]
    (line,) = reference.train(num_processes, tmp_path / "metrics.jsonl", *flags)
    print(name, flags, line["loss"] / reference.loss - 1, line["grad_norm"] / reference.norm - 1)
    assert line["loss"] == pytest.approx(reference.loss, rel=LOSS_TOLERANCE)
    assert line["grad_norm"] == pytest.approx(reference.norm, rel=NORM_TOLERANCE)
