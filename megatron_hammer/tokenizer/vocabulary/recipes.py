"""What shapes a vocabulary: the settings of two published tokenizers, each with its source."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecipe:
    """The settings of a SentencePiece BPE training. The defaults are HammerLLM's.

    All recipes fall back to bytes, split digits and allow pieces of whitespace only, as both published models do.
    max_sentence_bytes: longer lines are cut (sentencepiece would drop them without a word).

    Source: trainer_spec stored in HammerLLM's 128k model (coverage, lengths). Its normalizer (nmt_nfkc with a dummy
    prefix, surplus whitespace removed) loses text, and HammerLLM left it behind when it merged the pieces into
    InternLM's model, whose normalizer is the one here: identity, no dummy prefix, whitespace kept.
    """

    vocab_size: int = 128_000
    character_coverage: float = 0.9995
    max_piece_chars: int = 32
    max_sentence_bytes: int = 8384
    normalization_rule: str = "identity"
    has_dummy_prefix: bool = False
    removes_extra_whitespaces: bool = False
    required_chars: str = ""
    user_defined_symbols: tuple[str, ...] = ()


HAMMERLLM_128K = TokenizerRecipe()

# Source: trainer_spec and normalizer_spec stored in tokenizer/sp_output/chinese_spm_20000.model of
# github.com/wdndev/tiny-llm-zh. Its train_chinese_sp.py says otherwise in two places (24,000 bytes a line, and by
# default nmt_nfkc); the model is what was published. One setting is left out: unk_surface, which its raw string turned
# into backslashes and digits, and which a model with byte fallback never shows.
# Meant to be merged into Llama-2's vocabulary: as a tokenizer of its own it loses surplus whitespace.
TINY_LLM_ZH_20K = TokenizerRecipe(
    vocab_size=20_000,
    max_piece_chars=16,
    max_sentence_bytes=4192,
    has_dummy_prefix=True,
    removes_extra_whitespaces=True,
)

RECIPES = {"hammerllm-128k": HAMMERLLM_128K, "tiny-llm-zh-20k": TINY_LLM_ZH_20K}
