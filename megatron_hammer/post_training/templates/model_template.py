"""The chat template of a model that exists: the one in its folder, or another one, proven to fit its tokenizer."""

from collections.abc import Mapping
from pathlib import Path

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.errors import ConfigError
from megatron_hammer.post_training.templates.chat_export import find_trained_template
from megatron_hammer.post_training.templates.chat_template import load_chat_template
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.post_training.templates.proof import prove_template

TEMPLATE_NAME = "chat_template.jinja"


def open_chat_tokenizer(
    model_dir: Path, tokenizer_path: Path, *, chat_template: str | None, bindings: Mapping[str, str] | None = None
) -> tuple[ChatTokenizer, tuple[int, ...]]:
    """The tokenizer with a template that is proven to fit, and the ids that end a turn of the assistant.

    chat_template: a shipped name or a file; None: the one in the folder of the model, or that of the conversations that
    a checkpoint of Megatron was trained on. bindings: as for `load_chat_template`. Raises ConfigError or DataError for
    everything in which template and tokenizer do not fit.
    """
    path = model_dir / TEMPLATE_NAME
    template = None
    if chat_template is not None or path.is_file():
        template = load_chat_template(chat_template or path, bindings)
    elif not (model_dir / CONFIG_NAME).is_file():
        template = find_trained_template(open_checkpoint(model_dir).args)
    if template is None:
        raise ConfigError(
            f"{model_dir}: model must have a {TEMPLATE_NAME}, got none. Pass --chat-template chatml, or a file."
        )
    tokenizer = ChatTokenizer(tokenizer_path, template)
    return tokenizer, prove_template(tokenizer)
