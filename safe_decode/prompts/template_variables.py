"""Variables of chat templates that a request may set: words and numbers, never text.

Knows templates as text, tokenizers and the names that a template has of its own. Does not know
messages or models. A value stands in the prompt outside of every message, so it may not spell
anything but a word; a name that belongs to the template itself may not be set at all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from safe_decode.errors import PromptError
from safe_decode.prompts.plain_text import controls_of
from safe_decode.typing import Tokenizer

__all__ = ["variables_read"]

_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_OWN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"raise_exception", "strftime_now", "chat_template", "tools_in_user_message"}
)
"""Names that say what is rendered, and how."""


def variables_read(tokenizer: Tokenizer, asked: Mapping[str, object]) -> dict[str, object]:
    """Return those of the variables that a tokenizer's template reads.

    Args:
        tokenizer: With its chat template.
        asked: Of a request, by name.

    Returns:
        Those whose names stand in the template: it cannot read any other.

    Raises:
        PromptError: A name is the template's own, or a value is more than a word or a number.
    """
    if not asked:
        return {}
    render = inspect.signature(tokenizer.apply_chat_template).parameters
    own = _OWN | set(render) | set(getattr(tokenizer, "special_tokens_map", {}))
    template = str(getattr(tokenizer, "chat_template", None) or "")
    read = {}
    for name, value in asked.items():
        if not _NAME.fullmatch(name) or name in own:
            raise PromptError(
                f"chat_template_kwargs has {name[:64]!r}, which is the template's own; pass "
                "variables such as enable_thinking alone."
            )
        is_word = isinstance(value, str) and _WORD.fullmatch(value) is not None
        if isinstance(value, str) and (
            not is_word or any(controls_of(tokenizer).spelt_in([value]))
        ):
            raise PromptError(
                f"chat_template_kwargs.{name} is text; pass a number, true, false or one word of "
                "at most 64 letters, digits, '_', '.', '+' and '-'."
            )
        if not (is_word or value is None or isinstance(value, bool | int | float)):
            raise PromptError(
                f"chat_template_kwargs.{name} is a {type(value).__name__}; pass a number, true, "
                "false or one word."
            )
        if re.search(rf"\b{name}\b", template):
            read[name] = value
    return read
