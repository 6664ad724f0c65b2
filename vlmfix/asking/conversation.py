"""A prompt with what was said before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
"""`role` (system, user, assistant) and `content`: parts `{"type": "text", "text": ...}` and `{"type": "image"}`."""


class Conversation(str):
    """A whole conversation, asked like a prompt: as text it is what the user said last; `messages` is all of it.

    Pictures are given beside it, in the order of their places in the messages; there may be none at all. Methods see
    the last turn as the prompt. Goes through the model by the processor's chat template.
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Sequence[Message]) -> Conversation:
        """`ValueError` where the last message is not the user's, or says nothing."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("messages: the last one must be the user's, since that is what the model answers")
        text = "\n".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        conversation = super().__new__(cls, text)
        conversation.messages = tuple(messages)
        return conversation

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Copies hold all of it."""
        return (self.messages,)

    @property
    def n_images(self) -> int:
        """Places of pictures."""
        return sum(part["type"] == "image" for message in self.messages for part in message["content"])

    def rendered(self, processor: Any, n_images: int) -> str:
        """The text in the processor's chat template. `ValueError` where it does not take such a conversation."""
        if n_images != self.n_images:
            raise ValueError(
                f"the conversation shows {self.n_images} pictures, and a method made {n_images} of them; methods that "
                f"change how many there are take single prompts only"
            )
        template = getattr(processor, "chat_template", None)
        if not template:
            raise ValueError("this model's processor has no chat template, so it takes single prompts only")
        messages = list(self.messages)
        if messages[0]["role"] == "system" and "system" not in str(template):
            messages = _before_the_first_turn(messages)
        try:
            return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # jinja's, raised by the template itself
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error


def _before_the_first_turn(messages: list[Message]) -> list[Message]:
    """Templates that know no system message get its text at the beginning of the user's first turn."""
    system, first, *rest = messages
    told = [{"type": "text", "text": part["text"] + "\n"} for part in system["content"]]
    return [{**first, "content": [*told, *first["content"]]}, *rest]
