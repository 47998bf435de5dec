"""A run from a Hugging Face folder starts with the loss and the gradient of transformers on the first batch.

Relative, in fp32, where sums are taken in another order: at most 7e-8 for the loss and 9e-8 for the gradient's norm
were measured at these layouts. The twins differ by 5e-5 and more.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_hammer.checkpoint.hugging_face.folder import open_hf_folder
from megatron_hammer.checkpoint.surgery.reshard import TargetLayout, reshard
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from tests.helpers.sample_orders import build_datasets
from tests.helpers.training_runs import read_lines, run, train, write_toy_data

pytestmark = pytest.mark.distributed
LOSS_TOLERANCE, NORM_TOLERANCE = 5e-7, 1e-6
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
    "phi3": lambda: transformers.Phi3Config(partial_rotary_factor=0.5, pad_token_id=None, **SIZES),
    "seed-oss": lambda: transformers.SeedOssConfig(
        head_dim=20, attention_dropout=0.0, residual_dropout=0.0, pad_token_id=None, **SIZES
    ),
    "smollm3-tied": lambda: transformers.SmolLM3Config(no_rope_layers=[1, 0, 0, 1], pad_token_id=None, **SIZES),
    "granite": lambda: transformers.GraniteConfig(
        embedding_multiplier=12.0, attention_multiplier=0.3, residual_multiplier=0.22, logits_scaling=1.3, **SIZES
    ),
    "helium": lambda: transformers.HeliumConfig(head_dim=12, pad_token_id=None, **SIZES),
    "mistral-window": lambda: transformers.MistralConfig(head_dim=20, sliding_window=11, **SIZES),
    "qwen2-window-yarn": lambda: transformers.Qwen2Config(
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20},
            **{"beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
        },
        **SIZES,
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        moe_intermediate_size=80, shared_expert_intermediate_size=112, num_experts=6, num_experts_per_tok=2, **SIZES
    ),
    "glm4-moe": lambda: transformers.Glm4MoeConfig(
        moe_intermediate_size=80, n_routed_experts=6, num_experts_per_tok=2, routed_scaling_factor=1.5, **SIZES
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
# bf16 with fp32 copies in the optimizer, which a learning rate of 0 leaves as they were loaded.
STANDSTILL = ("--precision", "bf16", "--lr", "0", "--min-lr", "0", "--override-opt-param-scheduler")
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
            for buffer in self.list_expert_biases():
                buffer.normal_(std=0.3)  # sigmoid scores lie between 0 and 1
        self.model.save_pretrained(self.folder)
        self.flags = ("--load-hf", str(self.folder), "--data-path", data, *RECIPE)
        self.tokens, self.labels = read_first_batch(self.flags)
        self.loss, self.norm = self.measure()

    def list_expert_biases(self) -> list[torch.Tensor]:
        return [buffer for name, buffer in self.model.named_buffers() if name.endswith("e_score_correction_bias")]

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

    dataset = build_datasets(prepare([*flags, "--train-iters", "1", "--platform", "cpu"]))[0]
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
        pytest.param("phi3", 2, TP2, id="phi3-tp2"),
        pytest.param("seed-oss", 2, PP2, id="seed-oss-pp2"),
        pytest.param("smollm3-tied", 2, (*PP2, *VP2), id="smollm3-tied-pp2-vp2"),
        pytest.param("granite", 4, (*TP2, *PP2, "--sequence-parallel"), id="granite-tp2-pp2-sp"),
        pytest.param("helium", 2, TP2, id="helium-tp2"),
        pytest.param("mistral-window", 2, TP2, id="window-tp2"),
        pytest.param("qwen2-window-yarn", 2, (*PP2, *VP2), id="window-yarn-pp2-vp2"),
        pytest.param("qwen2-moe", 2, EP2, id="moe-ep2"),
        pytest.param("glm4-moe", 4, (*PP2, *EP2), id="dense-layer-and-biased-router-pp2-ep2"),
    ],
)
def test_the_first_step_is_that_of_transformers(
    references: dict[str, Reference], tmp_path: Path, name: str, num_processes: int, flags: tuple[str, ...]
) -> None:
    reference = references[name]
    line, *later = reference.train(num_processes, tmp_path / "metrics.jsonl", *flags, num_steps=3)
    assert line["loss"] == pytest.approx(reference.loss, rel=LOSS_TOLERANCE)
    assert line["grad_norm"] == pytest.approx(reference.norm, rel=NORM_TOLERANCE)
    assert later[-1]["loss"] < line["loss"]


def test_the_oracle_sees_small_faults(references: dict[str, Reference]) -> None:
    """The twins: padding rows counted as 24 tokens of logit 0, gate and up swapped in one layer, a norm left at 1."""
    reference = references["llama"]
    with torch.no_grad():
        logits = torch.nn.functional.pad(reference.model(reference.tokens).logits, (0, 24))
        padded = torch.nn.functional.cross_entropy(logits.flatten(0, 1), reference.labels.flatten()).item()
    losses = [padded]
    layer = reference.model.model.layers[2]
    gate, up, norm = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.input_layernorm.weight
    kept = norm.data.clone()
    gate.data, up.data = up.data, gate.data
    losses.append(reference.measure()[0])
    gate.data, up.data = up.data, gate.data
    norm.data = torch.ones_like(norm)
    losses.append(reference.measure()[0])
    norm.data = kept
    assert all(abs(loss / reference.loss - 1) > 100 * LOSS_TOLERANCE for loss in losses), losses
    assert reference.measure()[0] == reference.loss


def test_the_oracle_sees_the_expert_bias(references: dict[str, Reference]) -> None:
    """The twin: a router without its biases chooses other experts."""
    reference = references["glm4-moe"]
    biases = reference.list_expert_biases()
    kept = [bias.clone() for bias in biases]
    assert len(biases) == 3  # one layer is dense
    for bias in biases:
        bias.zero_()
    assert abs(reference.measure()[0] / reference.loss - 1) > 100 * LOSS_TOLERANCE
    for bias, value in zip(biases, kept, strict=True):
        bias.copy_(value)


def test_expert_biases_stay_fp32_and_move_by_their_rate(references: dict[str, Reference], tmp_path: Path) -> None:
    """Through bf16 training with EP=2, saving, resuming in a changed layout and resharding, bit for bit."""
    reference, names = references["glm4-moe"], [f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2, 3)]
    flags = (*STANDSTILL, *EP2, "--save", str(tmp_path / "run"), "--save-interval", "1")
    still = ("--moe-router-bias-update-rate", "0")
    reference.train(2, tmp_path / "first.jsonl", *flags, *still)
    loaded = [bias.clone() for bias in reference.list_expert_biases()]
    assert not any(torch.equal(bias, bias.bfloat16().float()) for bias in loaded)
    assert all(map(torch.equal, read_biases(tmp_path / "run", names), loaded))

    reference.train(2, tmp_path / "second.jsonl", *flags, "--moe-router-bias-update-rate", "0.25", num_steps=2)
    moved = read_biases(tmp_path / "run", names)
    # Every expert got more or fewer tokens than the mean.
    for before, after in zip(loaded, moved, strict=True):
        assert torch.equal(torch.maximum(after, before), torch.where(after > before, before + 0.25, before))
        assert torch.equal(torch.minimum(after, before), torch.where(after < before, before - 0.25, before))
        assert not torch.equal(before, after)

    pp2 = TargetLayout(pipeline_model_parallel_size=2, expert_model_parallel_size=1)
    reshard(tmp_path / "run", tmp_path / "pp2", pp2)
    assert all(map(torch.equal, read_biases(tmp_path / "pp2", names), moved))
    resumed = (*STANDSTILL, *still, *PP2, "--moe-aux-loss-coeff", "0", "--save", str(tmp_path / "pp2"))
    reference.train(2, tmp_path / "third.jsonl", *resumed, num_steps=3)
    assert open_checkpoint(tmp_path / "pp2").iteration == 3
    assert all(map(torch.equal, read_biases(tmp_path / "pp2", names), moved))


def read_biases(save: Path, names: list[str]) -> list[torch.Tensor]:
    reader = open_checkpoint(save)
    assert {reader.tensors[name].dtype for name in names} == {torch.float32}
    return [reader.read(name) for name in names]


@pytest.fixture(scope="module")
def saved(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path]:
    """A bf16 run of one step from fp32 weights with a learning rate of 0, on two data-parallel ranks."""
    reference, save = references["qwen3-tied"], tmp_path_factory.mktemp("saved")
    reference.train(2, save / "metrics.jsonl", *STANDSTILL, "--save", str(save))
    return reference, save


def assert_masters_are_the_folders(reference: Reference, save: Path) -> None:
    folder = open_hf_folder(reference.folder)
    masters, rounded = open_checkpoint(save, weights="master"), open_checkpoint(save)
    masters.remove_vocab_padding(VOCAB_SIZE)
    rounded.remove_vocab_padding(VOCAB_SIZE)
    assert {pair.megatron_name for pair in folder.pairs} == masters.tensors.keys()
    for pair in folder.pairs:
        whole = folder.read_pair(pair)
        assert torch.equal(masters.read(pair.megatron_name), whole), pair.megatron_name
        assert torch.equal(rounded.read(pair.megatron_name), whole.bfloat16()), pair.megatron_name
        assert not torch.equal(rounded.read(pair.megatron_name).float(), whole), pair.megatron_name  # the twin


def test_the_optimizer_starts_from_the_fp32_weights(saved: tuple[Reference, Path]) -> None:
    assert_masters_are_the_folders(*saved)


def test_an_optimizer_that_is_not_distributed_starts_from_the_fp32_weights(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references["qwen3-tied"]
    flags = (*STANDSTILL, *TP2, "--no-distributed-optimizer", "--save", str(tmp_path))
    reference.train(2, tmp_path / "metrics.jsonl", *flags)
    assert_masters_are_the_folders(reference, tmp_path)


def test_the_same_command_continues_from_its_own_checkpoint(saved: tuple[Reference, Path]) -> None:
    reference, save = saved
    flags = (*reference.flags, *STANDSTILL, "--train-iters", "2", "--save", str(save))
    result = run(2, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"weights: checkpoint in {save}; {reference.folder} is not read again" in result.stdout
    assert "resumed from the checkpoint of step 1" in result.stdout
    assert [line["step"] for line in read_lines(save / "metrics.jsonl")] == [1, 2]
