"""The tokens that a Hugging Face tokenizer's template puts around every text, such as `<s>`.

Megatron-LM's tool writes them unless it is told not to, around sentences and empty documents too. Here they are written
on demand only, because training on documents in a row wants one beginning per document, if any.
"""

from dataclasses import dataclass

from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.errors import ConfigError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, HuggingFaceEncoder
from megatron_hammer.tokenizer.encoding.loading_by_class import describe_other_loading, is_known_to_load_alike

SAMPLE_TEXTS = ("a", "1 b")
INCLUDE_FLAG = "tokenizer-hf-include-special-tokens"


@dataclass(frozen=True, slots=True)
class Template:
    """The ids before and after every text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


NO_TEMPLATE = Template()


def select_template(encoder: Encoder, options: PreprocessOptions) -> Template:
    """What the run writes around every text: nothing unless it is asked for.

    Raises ConfigError where it is asked of a tokenizer without templates, or BOS would be written twice.
    """
    if not options.includes_template:
        return NO_TEMPLATE
    if not isinstance(encoder, HuggingFaceEncoder):
        raise ConfigError(f"{INCLUDE_FLAG}: needs a Hugging Face tokenizer, got {encoder.path}. Drop the flag.")
    template = find_template(encoder)
    if options.prepend_bos and encoder.bos_id in template.before:
        raise ConfigError(
            f"prepend-bos: must not come with --{INCLUDE_FLAG}, got both: {encoder.path} writes its beginning before "
            "every text by itself. Drop one of them."
        )
    return template


def find_template(encoder: HuggingFaceEncoder) -> Template:
    """What the tokenizer puts around a text. Raises ConfigError if that depends on the text."""
    found = set()
    for text in SAMPLE_TEXTS:
        plain, called = (encoder.tokenizer.encode(text, add_special_tokens=adds).ids for adds in (False, True))
        begin = next((k for k in range(len(called)) if called[k : k + len(plain)] == plain), 0)
        found.add(Template(tuple(called[:begin]), tuple(called[begin + len(plain) :])))
    template = found.pop()
    if found or encoder.tokenizer.encode("", add_special_tokens=True).ids != [*template.before, *template.after]:
        raise ConfigError(
            f"{INCLUDE_FLAG}: needs a template that puts the same tokens around every text, got another one in "
            f"{encoder.path}. Drop the flag."
        )
    return template


def describe_differences(encoder: Encoder, options: PreprocessOptions) -> list[str]:
    """A sentence for each reason why Megatron-LM's tool would write other tokens than this run does."""
    if not isinstance(encoder, HuggingFaceEncoder):
        return []
    notes = []
    if not is_known_to_load_alike(encoder) and (difference := describe_other_loading(encoder)) is not None:
        notes.append(f"{difference} The ids of the file are written here; Megatron-LM's tool writes the others.")
    added = encoder.tokenizer.encode("", add_special_tokens=True).ids
    # Once per document is a decision of the user, too.
    is_chosen = options.includes_template is not None or (options.prepend_bos and added == [encoder.bos_id])
    if added and not is_chosen:
        tokens = " ".join(str(encoder.tokenizer.id_to_token(token_id)) for token_id in added)
        once = ", --prepend-bos for one per document" if added == [encoder.bos_id] else ""
        notes.append(
            f"{encoder.path}: its template adds {tokens} to every text, which Megatron-LM's tool writes and this one "
            f"does not. Pass --{INCLUDE_FLAG} for the same bytes{once}, or --tokenizer-hf-no-include-special-tokens."
        )
    return notes
