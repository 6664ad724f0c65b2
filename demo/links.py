"""What a visitor asked, as the query of a link and as a JSON file: enough to put the page back as it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode

from vlmfix.demo.settings import LONGEST_SPEC
from vlmfix.demo.studio import LONGEST_PROMPT, Answer, known_pictures

COLUMNS = (2, 4)
"""Fewest and most."""
LONGEST_FILE = 1_000_000
"""Characters of a saved page."""


@dataclass(frozen=True)
class Question:
    """A picture, a prompt and the methods of the columns."""

    picture: str | None
    """Name of an embedded picture; `None` for a visitor's own, which no link carries."""
    prompt: str
    methods: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check what came from outside."""
        if self.picture is not None and (not isinstance(self.picture, str) or self.picture not in known_pictures()):
            raise ValueError(f"picture: {str(self.picture)[:40]!r} is none of the examples")
        if not isinstance(self.prompt, str) or len(self.prompt) > LONGEST_PROMPT:
            raise ValueError(f"prompt: expected text of up to {LONGEST_PROMPT} characters")
        if not all(isinstance(method, str) and len(method) <= LONGEST_SPEC for method in self.methods):
            raise ValueError(f"methods: expected texts of up to {LONGEST_SPEC} characters")
        if not COLUMNS[0] <= len(self.methods) <= COLUMNS[1]:
            raise ValueError(f"methods: expected {COLUMNS[0]} to {COLUMNS[1]}, got {len(self.methods)}")

    def query(self) -> str:
        """`picture=test_0032&prompt=...&method=none&method=vhr`."""
        picture = [] if self.picture is None else [("picture", self.picture)]
        return urlencode([*picture, ("prompt", self.prompt), *(("method", one) for one in self.methods)])

    @classmethod
    def from_query(cls, query: str) -> Question | None:
        """The way back. `None` if the query says nothing of a question; `ValueError` if what it says cannot be."""
        found: dict[str, list[Any]] = parse_qs(query.lstrip("?"), keep_blank_values=True, max_num_fields=20)
        if not {"picture", "prompt", "method"} & set(found):
            return None
        return cls(
            found.get("picture", [None])[0], found.get("prompt", [""])[0], tuple(found.get("method", ("none", "none")))
        )

    def to_json(self, answers: Sequence[Answer]) -> str:
        """With the last answers, as records."""
        records = [json.loads(one.record.to_json()) for one in answers]
        return json.dumps({**asdict(self), "answers": records}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Question:
        """The way back. `ValueError` if it is no saved page."""
        if len(text) > LONGEST_FILE:
            raise ValueError(f"the file has {len(text):,} bytes; a saved page has up to {LONGEST_FILE:,}")
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("the file is no JSON; expected a page saved here") from None
        if not isinstance(data, dict) or not {"picture", "prompt", "methods"} <= set(data):
            raise ValueError("the file is no page saved here: expected picture, prompt and methods")
        if not isinstance(data["methods"], list):
            raise ValueError("methods: expected a list")
        return cls(data["picture"], data["prompt"], tuple(data["methods"]))
