"""A small Llama with a tokenizer of bytes, for tests of evaluation: a Hugging Face folder and its checkpoint.

The tokenizer has one id for each byte, BOS, EOS, and longer pieces where they are asked for, so every text can be
encoded and most ids can appear.
"""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_hammer.checkpoint.convert.from_hugging_face import ImportOptions, import_from_hugging_face

BOS_ID, EOS_ID = 256, 257
MAX_LENGTH = 80
PIECES = ("th", "in", "er", "the", "er ")
TEXTS = (
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "The keeper of the lighthouse wrote the number of every wave in a book that nobody read.",
    "def add(first, second):\n    return first + second  # 1 + 2 == 3\n",
    "a",
)


def write_byte_tokenizer(folder: Path, pieces: Sequence[str] = ()) -> Path:
    """tokenizer.json and tokenizer_config.json. pieces: merged of two shorter ones each, in the order of the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(alphabet)}
    vocabulary |= {"<s>": BOS_ID, "</s>": EOS_ID}
    pieces = [piece.replace(" ", "Ġ") for piece in pieces]
    vocabulary |= {piece: EOS_ID + 1 + number for number, piece in enumerate(pieces)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def write_hf_model(folder: Path, *, seed: int = 0, pieces: Sequence[str] = (), **changes: int | bool) -> Path:
    """A Llama of 4 layers with its tokenizer; 260 tokens and more, no two sizes alike."""
    sizes: dict[str, int | bool] = {
        **{"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"vocab_size": 263, "max_position_embeddings": MAX_LENGTH, "intermediate_size": 176},
    }
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**sizes | changes, initializer_range=0.2, bos_token_id=256, eos_token_id=257)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write_byte_tokenizer(folder, pieces)


def import_model(hf_dir: Path, save_dir: Path) -> Path:
    """The checkpoint of Megatron that hammer convert from-hf makes of the folder."""
    import_from_hugging_face(ImportOptions(hf_dir=hf_dir, save_dir=save_dir, verify="tensors"))
    return save_dir
