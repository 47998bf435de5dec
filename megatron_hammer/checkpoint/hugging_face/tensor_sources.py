"""Where the tensors of the table lie in a Hugging Face folder, which may spell or pack them in another way.

The table (`tensor_rows.py`) has the names that transformers writes by default. Folders in use also hold GPT-2 without
its `transformer.` prefix, all experts of a layer in one tensor (transformers 5 with save_original_format=False), a head
beside the embedding that it is tied to, and buffers that are no weights. Nothing else is guessed: what is left over
keeps its own name, so that `validate_names_and_shapes` reports it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.tensor_rows import Shape, TensorPair
from megatron_hammer.model.shape import ModelShape

# GPT2Model and LlamaModel, saved without their head, write no prefix.
_PREFIXES = ("transformer.", "model.")
_HEAD, _EMBEDDING = "lm_head.weight", "embedding.word_embeddings.weight"
_EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
# The same buffers as checkpoint_reader.BUFFER_ENDINGS; their classes keep them in fp32.
HF_BUFFER_ENDINGS = ("e_score_correction_bias", ".mlp.expert_bias")
# (in the files of a model's authors, in transformers' own modules).
_NEWER_NAMES = (
    (".block_sparse_moe.gate.", ".mlp.gate."),
    (".mlp.router.gate.", ".mlp.gate."),
    (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
    (".mlp.shared_mlp.", ".mlp.shared_experts."),
)
# Part of an expert: (the tensor that packs it, which half of its rows; None for all of them).
_PACKED_PARTS: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
}
# Buffers that older versions of transformers saved with the weights and newer ones make anew.
_BUFFERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"), "GPT-2's causal mask"),
    (re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"), "rotary frequencies, as config.json has them"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HfSource:
    """One tensor of the table inside a stored one."""

    name: str  # of the stored tensor
    expert: int | None = None  # along the first axis, where it packs a layer's experts
    half: int | None = None  # of that expert's rows: 0 gate, 1 up

    def select(self, stored: Tensor) -> Tensor:
        """The tensor of the table, as a view of the stored one."""
        part = stored if self.expert is None else stored[self.expert]
        return part if self.half is None else part.chunk(2)[self.half]


@dataclass(frozen=True, kw_only=True, slots=True)
class HfSources:
    """Every stored tensor of a folder: a source, a duplicate, a buffer, or (in `shapes` only) one that nothing maps."""

    sources: dict[str, HfSource]  # by the table's name
    shapes: dict[str, Shape]  # of the sources by the table's name, and of what nothing maps by its own
    duplicates: dict[str, str]  # stored name -> the table's name of the tensor that it must equal
    buffers: dict[str, str]  # stored name -> what it is; not read; layers of multi-token prediction too


def locate_hf_tensors(
    pairs: Sequence[TensorPair], model: ModelShape, stored: Mapping[str, Shape], *, num_extra_layers: int = 0
) -> HfSources:
    """Find the tensors of `pairs` among the stored ones; what is missing or unexpected shows in `shapes`.

    num_extra_layers: behind the model's own, which predict later tokens than the next and are not read.
    """
    extra_layers = range(model.num_layers, model.num_layers + num_extra_layers)
    sources: dict[str, HfSource] = {}
    shapes: dict[str, Shape] = {}
    for name in (name for pair in pairs for name in pair.hf_names):
        # The usual name is tried first, so a folder that holds a tensor twice is read as transformers reads it.
        for source in _list_candidates(name):
            shape = _select_shape(source, stored.get(source.name), model)
            if shape is not None:
                sources[name], shapes[name] = source, shape
                break
    used = {source.name for source in sources.values()}
    embedding = next((pair.hf_names[0] for pair in pairs if pair.megatron_name == _EMBEDDING), None)
    duplicates: dict[str, str] = {}
    buffers: dict[str, str] = {}
    for name in stored.keys() - used:
        # A head beside tied embeddings is not ignored: folder.py compares it with the embedding.
        what = _name_leftover(name, extra_layers)
        if name == _HEAD and model.has_tied_embeddings and embedding in sources:
            duplicates[name] = embedding
        elif what is not None:
            buffers[name] = what
        else:
            shapes[name] = stored[name]
    return HfSources(sources=sources, shapes=shapes, duplicates=duplicates, buffers=buffers)


def _name_leftover(name: str, extra_layers: range) -> str | None:
    """What a stored tensor is that the model's function does not need; None if it is not known to be such."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) in extra_layers:
        return "multi-token prediction, which no logits of the model need"
    return next((what for pattern, what in _BUFFERS if pattern.fullmatch(name)), None)


def _list_candidates(name: str) -> Iterator[HfSource]:
    """Every place where transformers has kept this tensor, the usual one first."""
    yield HfSource(name=name)
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            yield HfSource(name=name.removeprefix(prefix))
    for original, newer in _NEWER_NAMES:
        if original in name:
            yield HfSource(name=name.replace(original, newer))
    expert = _EXPERT.fullmatch(name)
    if expert is not None:
        layer, index, part = expert.groups()
        packed, half = _PACKED_PARTS[part]
        yield HfSource(name=f"{layer}.mlp.experts.{packed}", expert=int(index), half=half)


def _select_shape(source: HfSource, stored: Shape | None, model: ModelShape) -> Shape | None:
    """The shape of what `source` selects; None where that tensor is not there or cannot be taken apart."""
    if stored is None or source.expert is None:
        return stored
    # Packed experts are [experts, rows, columns], rows and columns as in the matrix of one expert.
    if model.moe is None or len(stored) != 3 or stored[0] != model.moe.num_experts:
        return None
    if source.half is None:
        return stored[1:]
    return None if stored[1] % 2 else (stored[1] // 2, stored[2])
