"""Columns: one picture and one prompt, asked under several methods at the same time, the words shown as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlmfix.demo import verdicts
from vlmfix.demo.studio import Answer, Studio, interventions, problem, truth
from vlmfix.hooks import Lookback
from vlmfix.method.intervention import Intervention
from vlmfix.model.anatomy import anatomy

EVERY = 0.08
"""Seconds between two looks at what has been written."""


class Stopped(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class Tokens:
    """A streamer of `generate`: keeps the ids of new tokens, and ends the generation when it is told to stop."""

    ids: list[int] = field(default_factory=list)
    stop: bool = False
    _begun: bool = False

    def put(self, value: Any) -> None:
        """The prompt first, then one token after the other."""
        if self.stop:
            raise Stopped
        if self._begun:
            self.ids += value.flatten().tolist()
        self._begun = True

    def end(self) -> None:
        """Called after the last token."""


@dataclass
class Column:
    """One method's answer, while it is made and after."""

    spec: str
    tokens: Tokens
    future: Future[Answer]

    def html(self, processor: Any) -> str:
        """As it stands."""
        if not self.future.done():
            text = processor.decode(list(self.tokens.ids), skip_special_tokens=True).strip()
            return verdicts.running(self.spec, text)
        error = self.future.exception()
        if error is None:
            return verdicts.done(self.future.result())
        if isinstance(error, (ValueError, TypeError)):
            return problem(error)
        logging.getLogger(__name__).error("%s failed", self.spec, exc_info=error)
        return problem("This answer failed on the server, whose log says why.")


def monitors(studio: Studio, picture: Image.Image, chosen: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The monitor that tells doubtful words, for a picture that is not known, where it can be in force."""
    watched = any(one.name == "lookback" or one.acts_at("decode") for one in chosen)
    can = "attention" not in anatomy(studio.model).lacks
    return () if watched or not can or truth(picture) is not None else (Lookback(),)


def stream(
    studio: Studio, picture: Image.Image, file: str, prompt: str, specs: Sequence[str]
) -> Iterator[tuple[list[str], tuple[Answer, ...] | None]]:
    """The columns as safe HTML, again and again until all are done; with the last, the answers. `file` is what the
    visitor calls the picture. When the iterator is closed, generation ends."""

    def answer(spec: str, tokens: Tokens) -> Answer:
        chosen = interventions(spec)
        record = studio.ask(picture, prompt, [*chosen, *monitors(studio, picture, chosen)], streamer=tokens)
        return Answer((spec or "").strip() or "none", chosen, picture, file, record)

    with ThreadPoolExecutor(len(specs)) as pool:
        columns = []
        for spec in specs:
            tokens = Tokens()
            columns.append(Column(spec, tokens, pool.submit(answer, spec, tokens)))
        try:
            while running := [column.future for column in columns if not column.future.done()]:
                yield [column.html(studio.processor) for column in columns], None
                wait(running, EVERY, FIRST_COMPLETED)
            made = tuple(c.future.result() for c in columns if c.future.exception() is None)
            yield [column.html(studio.processor) for column in columns], made
        finally:
            for column in columns:
                column.tokens.stop = True
