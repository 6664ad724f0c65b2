"""The tab Look inside: what the model looked at when it wrote each word of an answer."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from vlmfix.demo import maps
from vlmfix.demo.looks import bands, carved, heat_maps, notes, verdicts, vhd_heads, word_heads
from vlmfix.demo.studio import (
    METHODS,
    Answer,
    Shared,
    Studio,
    interventions,
    problem,
    read_picture,
    read_prompt,
    truth,
)
from vlmfix.demo.watch import Inspection, Sinks, inspect
from vlmfix.model.anatomy import anatomy

CLICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-word]');
  if (!button) return;
  for (const other of element.querySelectorAll('button[data-word]'))
    other.setAttribute('aria-pressed', String(other === button));
  trigger('click', {word: Number(button.dataset.word)});
});
"""
"""Buttons are marked here, not by a new strip from the server: the keyboard's place would be lost."""
KEPT = 2 * 1024**3
"""Bytes of attention that are kept for all visitors together: an answer of 100 words of a 7B model takes about half a
gigabyte, one of the embedded model less than a megabyte."""
INTRO = (
    "Asks the prompt about the picture of Compare. Then choose a word of the answer: the map shows what the model "
    "looked at when it wrote it."
)


@dataclass(frozen=True)
class Opened:
    """An answer that a visitor looks into."""

    inspection: Inspection
    kinds: list[str]
    """Of its words, see `verdicts`."""

    def first(self) -> int:
        """The first invented word, else the first that names an object, else the first."""
        for kind in ("invented", "object", "present"):
            if kind in self.kinds:
                return self.kinds.index(kind)
        return 0

    def strip(self, word: int, layers: Sequence[int], head: int | None) -> str:
        """The words of the answer, each with its share of attention on the picture."""
        inspection = self.inspection
        shares = inspection.after.shares(layers, head)
        words = [(each.text, float(shares[list(each.steps)].mean())) for each in inspection.words]
        title = f"{inspection.spec} on “{inspection.record.prompt}”: share of each word's attention on the picture"
        return f'<p class="quiet">{escape(title)}</p>{notes(inspection)}{maps.strip(words, self.kinds, word)}'


class Shelf:
    """Answers that visitors look into, up to so many bytes; those that were put there first go first."""

    def __init__(self, most: int = KEPT):
        """`most`: bytes."""
        self._most = most
        self._kept: dict[str, Opened] = {}
        self._lock = threading.Lock()

    def put(self, opened: Opened) -> str:
        """Keep an answer; returns a ticket for it."""
        ticket = secrets.token_hex(8)
        with self._lock:
            self._kept[ticket] = opened
            while len(self._kept) > 1 and self._nbytes() > self._most:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
        return ticket

    def _nbytes(self) -> int:
        return sum(opened.inspection.nbytes for opened in self._kept.values())

    def get(self, ticket: str) -> Opened:
        """The answer that a ticket stands for. `ValueError` if it is gone."""
        with self._lock:
            if ticket in self._kept:
                return self._kept[ticket]
        raise ValueError("Others have looked inside since, and this answer is no longer kept; look inside again.")


def tab(studio: Studio, shared: Shared) -> None:
    """Build the tab's content inside a `gr.Blocks`."""
    parts = anatomy(studio.model)
    known = Sinks.of(studio.model, studio.processor)
    layers = bands(parts.attention_layers)
    heads = {"All heads": None, **{f"Head {h}": h for h in range(parts.n_heads)}}
    gr.HTML(f"<style>{maps.STYLE}</style><p>{INTRO}</p>", elem_classes="inside")
    with gr.Row():
        hint = "Method: pick or type, e.g. vhr:alpha=1.5"
        method = gr.Dropdown(METHODS, value="vhr", label=hint, allow_custom_value=True, min_width=300)
        band = gr.Dropdown(list(layers), label="Layers", min_width=140)
        head = gr.Dropdown(list(heads), label="Heads", min_width=140)
    button = gr.Button("Look inside", variant="primary")
    shelf, place = Shelf(), gr.State()  # ticket and word
    strip = gr.HTML(elem_classes="inside", js_on_load=CLICK)
    drawn = gr.HTML(elem_classes="inside")
    with gr.Row(elem_classes="inside-maps"):
        by_head, vhd = (gr.HTML(elem_classes="inside") for _ in range(2))
    refined = gr.HTML(elem_classes="inside")

    def look(path: str | None, prompt: str, spec: str, band: str, head: str) -> Iterator[tuple[Any, ...]]:
        """Ask and show; what takes passes of its own comes last."""
        try:
            picture, prompt, method = read_picture(path), read_prompt(prompt), interventions(spec)
            inspection = inspect(studio, picture, prompt, method, known)
            opened = Opened(inspection, verdicts(inspection, truth(inspection.record)))
            ticket, word = shelf.put(opened), opened.first()
            words = opened.strip(word, layers[band], heads[head])
            yield (ticket, word), words, *word_maps(opened, word, band, head), "", carved(inspection)
            yield *(gr.skip() for _ in range(4)), vhd_heads(studio, picture, prompt, inspection.heads), gr.skip()
        except (ValueError, TypeError) as error:
            yield None, problem(error), "", "", "", ""

    def word_maps(opened: Opened, word: int, band: str, head: str) -> tuple[str, str]:
        inspection = opened.inspection
        return heat_maps(inspection, word, layers[band], heads[head]), word_heads(inspection, word)

    def choose(place: tuple[str, int] | None, band: str, head: str, event: gr.EventData) -> tuple[Any, ...]:
        """Another word; its number comes from the visitor's browser."""
        ticket, word = place[0] if place else "", getattr(event, "word", None)
        try:
            opened = shelf.get(ticket)
            if not isinstance(word, int) or not 0 <= word < len(opened.inspection.words):
                raise ValueError("Choose a word of the answer.")
        except ValueError as error:
            return place, problem(error), ""
        return (ticket, word), *word_maps(opened, word, band, head)

    def narrow(place: tuple[str, int] | None, band: str, head: str) -> tuple[Any, ...]:
        """Other layers or heads."""
        if place is None:
            return gr.skip(), gr.skip(), gr.skip()
        ticket, word = place
        try:
            opened = shelf.get(ticket)
        except ValueError as error:
            return gr.skip(), problem(error), ""
        return opened.strip(word, layers[band], heads[head]), *word_maps(opened, word, band, head)

    def offer(answers: tuple[Answer, ...]) -> Any:
        """Put the methods that were compared first, and take the last of them."""
        compared = list(dict.fromkeys(answer.spec for answer in answers))
        if not compared:
            return gr.skip()
        return gr.update(choices=list(dict.fromkeys([*compared, *METHODS])), value=compared[-1])

    question, view = [shared.picture, shared.prompt, method, band, head], [place, band, head]
    button.click(look, question, [place, strip, drawn, by_head, vhd, refined], api_name="look_inside")
    strip.click(choose, view, [place, drawn, by_head], api_visibility="private", show_progress="hidden")
    gr.on([band.change, head.change], narrow, view, [strip, drawn, by_head], api_visibility="private")
    shared.answers.change(offer, shared.answers, method, api_visibility="private")
