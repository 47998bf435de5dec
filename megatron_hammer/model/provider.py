"""Builds the model of one rank for megatron's training loop, from `HammerModelConfig` by `HammerModelBuilder`.

megatron resolves the builder from the config's `builder` path, so nothing here is called by our own main path.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from megatron_hammer.model.cross_entropy import vocab_parallel_cross_entropy
from megatron_hammer.model.layer_spec import Backend, build_block_spec
from megatron_hammer.model.torch_modules import TorchNorm


@dataclass(kw_only=True)
class HammerModelConfig(GPTModelConfig):
    """megatron's GPTModelConfig, the backend that builds it, and what the shipped presets need beyond it.

    num_tokens: of the vocabulary without its padding; None counts the padding as tokens, in the loss too.
    residual_multiplier: of what attention and MLP add to the residual. is_packed: a sequence holds several
    conversations, whose positions begin at 0 each.
    """

    builder: ClassVar[str] = "megatron_hammer.model.provider.HammerModelBuilder"
    backend: Backend = "torch"
    has_embedding_norm: bool = False
    num_tokens: int | None = None
    residual_multiplier: float = 1.0
    is_packed: bool = False


def build_model_config(
    config: GPTModelConfig,
    *,
    backend: Backend,
    has_embedding_norm: bool,
    residual_multiplier: float,
    num_tokens: int | None = None,
    rope_scaling_factor: float | None = None,
    is_packed: bool = False,
) -> HammerModelConfig:
    """Our model config with the values of megatron's; rope_scaling_factor is one that gpt_config_from_args drops."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTModelConfig)}
    if rope_scaling_factor is not None:
        values["rope_scaling_factor"] = rope_scaling_factor
    return HammerModelConfig(
        **values,
        backend=backend,
        has_embedding_norm=has_embedding_norm,
        num_tokens=num_tokens,
        residual_multiplier=residual_multiplier,
        is_packed=is_packed,
    )


class HammerGPTModel(GPTModel):
    """GPTModel whose loss is over the vocabulary without its padding, and with, where asked for, a norm on the
    embedding's output (Open-Llama's stable embedding).

    That norm is LayerNorm with a bias whatever the layers use, as in transformers' OpenLlamaModel.embed_layer_norm.
    """

    def __init__(
        self,
        *,
        has_embedding_norm: bool = False,
        num_tokens: int | None = None,
        is_packed: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.is_packed = is_packed
        self.num_tokens = num_tokens
        self.has_embedding_norm = has_embedding_norm and self.pre_process
        if self.has_embedding_norm:
            self.embedding_norm = TorchNorm(
                self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon, normalization="LayerNorm"
            )

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if self.has_embedding_norm and decoder_input is None:
            decoder_input = self.embedding_norm(self.embedding(input_ids=input_ids, position_ids=position_ids))
        output = super()._preprocess(input_ids, position_ids, decoder_input=decoder_input, **kwargs)
        # The second is the rotary embedding, the same for all sequences; None where the model has none.
        if not self.is_packed or output[1] is None:
            return output
        return output[0], self._select_angles(position_ids), *output[2:]

    def _select_angles(self, position_ids: Tensor) -> Tensor:
        """Angles of the rotary embedding [s, b, 1, r] of positions [b, s], which begin at 0 with each conversation."""
        # packed_seq: of all positions, also where context parallelism gives this rank only some of them.
        angles = self.rotary_pos_emb(self.max_sequence_length, packed_seq=True)
        if isinstance(angles, tuple):  # YaRN's, with a factor that attention takes from the configuration
            angles = angles[0]
        return angles[position_ids.transpose(0, 1)].squeeze(2)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss [b, s] in fp32 of labels [b, s] under logits [s, b, p / tp], which the backward pass overwrites."""
        losses = vocab_parallel_cross_entropy(
            logits, labels.transpose(0, 1), num_tokens=self.num_tokens, group=self.pg_collection.tp
        )
        return losses.transpose(0, 1).contiguous()


class HammerModelBuilder(GPTModelBuilder):
    """Builds one pipeline chunk; distributing, wrapping and precision are megatron's."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """The chunk of this rank and virtual stage; pre_process and post_process follow from them where not given."""
        config: Any = self._model_config
        vp_size = config.transformer.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage=vp_stage, vp_size=vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage=vp_stage, vp_size=vp_size) and is_pp_last_stage(pg_collection.pp)
        return HammerGPTModel(
            config=config.transformer,
            transformer_layer_spec=build_block_spec(
                config.transformer,
                config.backend,
                vp_stage,
                residual_multiplier=config.residual_multiplier,
                is_packed=config.is_packed,
            ),
            vocab_size=config.vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            scatter_embedding_sequence_parallel=config.scatter_embedding_sequence_parallel,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            has_embedding_norm=config.has_embedding_norm,
            num_tokens=config.num_tokens,
            is_packed=config.is_packed,
        )
