"""What `--preset NAME` selects: a model's shape and the recipe that trains it. No torch, no megatron."""

from dataclasses import dataclass
from typing import Literal

from megatron_hammer.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a preset is trained: batch, schedule, regularisation, precision and a published layout."""

    source: str
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    lr: float
    min_lr: float
    lr_warmup_steps: int
    train_tokens: int
    # Betas, decay and clipping are those that Llama 2 (section 2.2), TinyLlama and nanoGPT share; adam_eps is torch's.
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    precision: Literal["bf16", "fp32"] = "bf16"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    # The embedding counts as a layer of the first stage, the head as one of the last: both have one layer fewer.
    has_ends_in_pipeline_split: bool = False
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: as tensor_model_parallel_size
    has_sequence_parallel: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    @property
    def train_steps(self) -> int:
        # Rounded up: the last step completes the budget, so a run never ends below it.
        return -(-self.train_tokens // self.tokens_per_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRecipe:
    """How a trained model is fine-tuned on conversations (--sft); all else is as in its `Recipe`.

    global_batch_size: in sequences, which hold several conversations each unless --sft-unpacked is given.
    """

    source: str
    global_batch_size: int
    lr: float
    min_lr: float
    lr_decay_style: Literal["cosine", "constant"]
    lr_warmup_fraction: float | None
    num_epochs: float
    weight_decay: float
    adam_beta2: float = 0.95
    # A kernel for one sequence of many conversations is as busy as one for many sequences.
    micro_batch_size: int = 1


LLAMA_2_SFT = SftRecipe(
    # The paper has no warm-up and no final rate; cosine to 0 after 3 % of warm-up is what Alpaca's trainer does.
    source="Llama 2 (arXiv:2307.09288) section 3.1; warm-up and final learning rate from Stanford Alpaca",
    global_batch_size=64,
    lr=2e-5,
    min_lr=0.0,
    lr_decay_style="cosine",
    lr_warmup_fraction=0.03,
    num_epochs=2,
    weight_decay=0.1,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What `--preset NAME` selects. num_parameters: the published count, without vocabulary padding; tests check it.

    sft: what --sft changes in the recipe.
    """

    num_parameters: int
    model: ModelShape
    recipe: Recipe
    sft: SftRecipe = LLAMA_2_SFT

    @property
    def name(self) -> str:
        return self.model.name
