"""A toy checkpoint of Megatron and the Hugging Face folder of the same weights, each with a tokenizer: for scorers."""

import json
from pathlib import Path

from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers.toy_pair import write_toy_pair
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer

MAX_LENGTH = 384
NUM_LAYERS = 2  # one for each of two pipeline stages


def write_scored_pair(folder: Path, *, seed: int = 3) -> tuple[Path, Path, Path]:
    """(checkpoint directory, Hugging Face folder, tokenizer.model)."""
    sizes = {"vocab_size": TOY_VOCAB_SIZE, "padded_vocab_size": TOY_VOCAB_SIZE + 1}
    lengths = {"max_position_embeddings": MAX_LENGTH, "seq_length": MAX_LENGTH}
    checkpoint, hf_dir = write_toy_pair(folder, {**sizes, **lengths, "num_layers": NUM_LAYERS}, seed=seed)
    tokenizer_model = train_toy_tokenizer(folder)
    (folder / "tokenizer").mkdir()
    export_tokenizer(tokenizer_model, folder / "tokenizer", max_length=MAX_LENGTH)
    for path in (folder / "tokenizer").iterdir():
        path.rename(hf_dir / path.name)
    return checkpoint, hf_dir, tokenizer_model


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
