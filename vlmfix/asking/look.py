"""Looks at a question before it is answered, for interventions that refine pictures or prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmfix.asking.batch import Batch
from vlmfix.engine.attachment import Attachment, attached


@dataclass(frozen=True)
class Looked:
    """One look of an intervention at a question: what the model was given, what it said, and what was seen."""

    inputs: dict[str, Any]
    """The processor's output, on the model's device."""
    token_ids: list[int]
    """Generated tokens, the end token included."""
    ended: bool
    """Whether the last token is an end token."""
    text: str
    memo: dict[str, Any]
    """What the intervention's stages left in `site.memo`."""
    geometry: Any
    """`Geometry` of the prompt."""


@dataclass(frozen=True)
class Look:
    """Asks the model on the way to an answer, for `Intervention.refine`: greedily, with one intervention in force."""

    model: Any
    processor: Any
    index: int
    """Of the intervention among those that the model is wrapped with."""

    @property
    def kept(self) -> dict[Any, Any]:
        """The intervention's own shelf, which lasts as long as the model stays wrapped with it."""
        return self._attachment.kept[self.index]

    def __call__(self, images: Sequence[Image.Image], prompt: str, max_new_tokens: int) -> Looked:
        """One look: an answer of up to `max_new_tokens` tokens, with what the intervention's stages saw meanwhile."""
        settings = {"max_new_tokens": max_new_tokens, "num_beams": 1}
        batch = Batch.of(self.model, self.processor, [(list(images), prompt)], settings)
        with self._attachment.only({self.index}):
            (tokens,) = batch.generate()
            generation: Any = self._attachment.last()
        ended = batch.end(tokens) is not None
        memo = generation.memos[self.index]
        return Looked(batch.inputs, tokens, ended, batch.text(tokens), memo, generation.geometry)

    @property
    def _attachment(self) -> Attachment:
        attachment = attached(self.model)
        assert attachment is not None, "an intervention looks while it is attached"
        return attachment
