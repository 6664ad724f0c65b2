"""One answer, and all that it takes to get it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Record:
    """One answer, and all that it takes to get it again. One JSON line."""

    model: str
    """Name or path that the model was loaded from."""
    image: list[str]
    """Path of each picture, or its size where it came without one."""
    image_sha256: list[str]
    """Hash of each picture's RGB pixels."""
    prompt: str
    method: list[dict[str, Any]]
    """Interventions in force: name, settings as resolved on this model, facts found; empty for the untouched model."""
    text: str
    """The answer, special tokens removed."""
    token_ids: list[int]
    """Generated tokens, the end token included."""
    finish: str
    """`stop` if the model ended its answer, `length` if it was cut."""
    seconds: float
    """Wall time of the generation, shared equally by the answers of a batch. In `seconds`, `passes` and `tokens`, a
    pass over pictures that several methods share counts in full for each of them."""
    batch_size: int
    generation: dict[str, Any]
    """Settings of `generate` in force, those of the model's own configuration included, and the seed."""
    effects: list[dict[str, Any]] = field(default_factory=list)
    """What each intervention did to this answer, in short (`acted` ...)."""
    passes: float = 0.0
    """Forward passes of the text decoder that the answer took, those of methods included; a pass over a batch counts
    once for each sequence in it."""
    tokens: float = 0.0
    """Rows that went through the text decoder in these passes, padding included."""
    id: str | None = None
    """Name of the question within an evaluation."""
    first_token: dict[str, float] | None = None
    """Word -> natural log of the probability that the answer begins with it, where that was asked for."""

    def to_json(self) -> str:
        """The record as one line of JSON, without the line's end; `from_json` is the way back."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """A record from its line of JSON. `ValueError` if the line is no record."""
        data = json.loads(line)
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or not {"text", "prompt", "image"} <= set(data) or set(data) - known:
            raise ValueError(f"not a record: expected the fields {', '.join(sorted(known))}")
        return cls(**data)
