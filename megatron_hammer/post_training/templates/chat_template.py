"""Chat templates: Jinja text that lays out a conversation, and marks with {% generation %} what the assistant says.

Rendered by transformers, in its sandbox: a template may come from anywhere, and can neither call Python nor open files.
The shipped ones lie beside this file. What a template must fulfil is checked in proof.py, with a tokenizer.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.data.conversations.formats import Conversation, ConversationError
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.read import read_text

SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jinja"))}
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
# A token by this form is a control token in every tokenizer; where it is missing, its text would be several tokens.
CONTROL_FORM = re.compile(r"<[|｜][^<>\s]+?[|｜]>|<\w+_of_\w+>")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """name: of a shipped template, or of the file. text: Jinja, with the bound tokens already in it."""

    name: str
    text: str
    bound_tokens: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(
        self, conversation: Conversation, special_tokens: Mapping[str, str], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and where the assistant speaks in it: start and end of each turn.

        special_tokens: by their names in the template, such as `bos_token`. Raises ConversationError if the template
        refuses the conversation, ConfigError if it is not Jinja.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, spans = render_jinja_template(
                conversations=[list(map(dict, conversation.messages))],
                tools=None if conversation.tools is None else list(map(dict, conversation.tools)),
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{self.name}:{error.lineno}: chat template must be Jinja, got: {error.message}. Repair it."
            ) from error
        # A template may fail in any way: it is a program.
        except Exception as error:
            raise ConversationError(
                "refused-by-template", f"chat template {self.name} must render it, got: {error}"
            ) from error
        return rendered[0], spans[0]


def load_chat_template(
    source: str | Path, bindings: Mapping[str, str] | None = None, *, is_marked: bool = True
) -> ChatTemplate:
    """Load a shipped template by its name, or a Jinja file.

    bindings: control tokens of the template to be written as other ones that the tokenizer has. is_marked: whether it
    must have {% generation %} marks. Raises ConfigError if it has none, for an unknown name, and for a binding that the
    template does not use.
    """
    path = find_chat_template(source)
    name, text = (path.stem if path in SHIPPED.values() else path.name), read_text(path)
    if is_marked and not GENERATION_MARK.search(text):
        raise ConfigError(
            f"{source}: chat template must mark what the assistant says, got no {{% generation %}}. Put the "
            "assistant's text and its end-of-turn token between {% generation %} and {% endgeneration %}."
        )
    bindings = bindings or {}
    if unused := [token for token in bindings if token not in text]:
        raise ConfigError(f"bind-token: {name} must write the token, got {unused[0]}, which it does not. Drop it.")
    # In one pass, so that tokens can be exchanged.
    tokens = re.compile("|".join(map(re.escape, sorted(bindings, key=len, reverse=True))) or "(?!)")
    return ChatTemplate(name, tokens.sub(lambda found: bindings[found[0]], text), tuple(bindings.values()))


def find_chat_template(source: str | Path) -> Path:
    """The file of a shipped template by its name, or `source` itself; raises ConfigError if there is none."""
    path = SHIPPED.get(str(source).replace("-", "_"), Path(source))
    if not path.is_file():
        raise ConfigError(
            f"chat-template: must be {', '.join(SHIPPED)} or a Jinja file, got {source}. Check the name or the path."
        )
    return path


def parse_bindings(pairs: Iterable[str]) -> dict[str, str]:
    """Return TOKEN=OTHER pairs, as a command line has them, as a table; raises ConfigError for another form."""
    bindings: dict[str, str] = {}
    for pair in pairs:
        token, _, other = pair.partition("=")
        if not token or not other or token in bindings or other in bindings.values():
            raise ConfigError(f"bind-token: must be TOKEN=OTHER, each of them once, got {pair}. Quote it.")
        bindings[token] = other
    return bindings
