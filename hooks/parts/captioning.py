"""Which prompts ask for a description of the whole picture."""

from __future__ import annotations

import re

_NOUN = r"(?:image|picture|photo(?:graph)?|scene)\b"
_CAPTION = re.compile(
    r"^(?!\W*(?:is|are|was|were|do|does)\b).*(?:"
    rf"\b(?:describe|description|caption|summari[sz]e)(?:\s+(?:of|for|the|this|that|an?|given|provided|whole|entire))*\s+{_NOUN}"
    rf"|\bwhat(?:'s| is| do you see| can you see)(?: shown| depicted| happening)? in (?:the|this) {_NOUN}"
    r"|\b(?:write|give|provide|generate)\s+(?:\w+\s+){0,4}(?:caption|description)\W*$)",
    re.IGNORECASE | re.DOTALL,
)


def asks_for_a_caption(prompt: str) -> bool:
    """Whether a prompt asks for a description or says what to describe; questions that begin with a verb do not."""
    return _CAPTION.search(prompt) is not None
