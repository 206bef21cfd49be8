"""Conversations in the form in which a model reads them: the chat template of its tokenizer makes text of messages."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from convexprune.errors import CalibrationError, shown

FIELDS = ("role", "content")


class Documents(NamedTuple):
    """The rows of a data set, all texts or all conversations, and the text between texts."""

    rows: Sequence[Any]  # texts, or lists of messages {"role": ..., "content": ...}
    separator: str = "\n\n"

    def text(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, bool]:
        """Return all rows as one text, and whether the tokenizer is to begin it: a chat template begins its own."""
        if all(isinstance(row, str) for row in self.rows):
            return self.separator.join(self.rows), True
        if tokenizer is None or not tokenizer.chat_template:
            raise CalibrationError(
                "The data set holds conversations, and the tokenizer has no chat template. Take an instruct model, or "
                "write the conversations as text."
            )
        return "".join(_rendered(row, tokenizer) for row in self.rows), False


def is_conversation(row: Any) -> bool:
    """Return True for a list of messages, each with a role and a content."""
    return isinstance(row, Sequence) and not isinstance(row, str) and len(row) > 0 and all(map(_is_message, row))


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(field), str) for field in FIELDS)


def _rendered(conversation: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(conversation), tokenize=False))
    except Exception as cause:  # a template raises what it likes
        raise CalibrationError(
            f"The chat template refuses the conversation that begins {shown(str(conversation)[:60])} ({cause})."
        ) from cause
