"""The tab Probe: POPE on one picture. "Is there a ...?" for all of COCO's objects at once, under several methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmfix.demo import maps
from vlmfix.demo.studio import Shared, Studio, interventions, problem, read_picture, truth
from vlmfix.eval.benchmarks.pope_building import question_text
from vlmfix.eval.report.plots import PALETTE, UNTOUCHED
from vlmfix.eval.scorers.chair import Vocabulary, coco_truth
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import spec_of

BATCH = 20
"""Questions that go through the model at once."""
SMALL = 200
"""Longest side of the picture beside the bars, in pixels."""
NEAR = 10
"""Absent objects that are shown however they are answered: those seen most often with what is there."""
INTRO = (
    "Asks “Is there a … in the image?” of Compare's picture, for all 80 objects of COCO, with its methods. A bar is "
    "the probability that the answer begins with yes, of yes and no."
)
STYLE = """
.probe { --quiet: color-mix(in srgb, var(--body-text-color) 70%, transparent);
  --line: color-mix(in srgb, var(--body-text-color) 14%, transparent); }
.probe p { margin: .3em 0; } .probe .quiet, .probe small { color: var(--quiet); font-size: .88em; }
.probe h4 { margin: 1.2em 0 .4em; font-size: 1em; font-weight: 600; }
.probe ul.methods { list-style: none; margin: .4em 0; padding: 0; }
.probe ul.methods li { margin: .15em 0; overflow-wrap: anywhere; }
.probe b.key { display: inline-block; min-width: 1.35em; text-align: center; border-radius: 4px; color: #fff;
  background: var(--c); font-size: .8em; font-weight: 600; }
.probe .row { display: grid; grid-template-columns: minmax(6.2em, 11em) 1fr; gap: .1em .8em; padding: .35em 0;
  border-top: 1px solid var(--line); align-items: center; }
.probe .row small { display: block; }
.probe .bar { display: grid; grid-template-columns: 1.3em 1fr 7.4em; gap: .45em; align-items: center; height: 1.25em;
  font-size: .85em; font-variant-numeric: tabular-nums; }
.probe .bar i { display: block; height: .6em; border-radius: 2px; background: linear-gradient(to right,
  var(--c) var(--v), transparent var(--v)), linear-gradient(to right, transparent calc(50% - 1px),
  var(--quiet) calc(50% - 1px), var(--quiet) calc(50% + 1px), transparent calc(50% + 1px)), var(--line); }
.probe .head { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
.probe .head img { max-width: 9em; max-height: 9em; border-radius: 6px; } .probe .head > div { flex: 1 1 15em; }
.probe .bar span { white-space: nowrap; }
.probe .wrong { color: var(--wrong, #c62828); }
.probe details summary { cursor: pointer; margin: .8em 0 .3em; font-weight: 600; }
@media (max-width: 30em) { .probe .bar { grid-template-columns: 1.3em 1fr 7em; gap: .3em; }
  .probe .row { grid-template-columns: 5.4em 1fr; gap: .1em .5em; } }
"""


@cache
def _together() -> tuple[tuple[str, ...], NDArray[Any]]:
    """COCO's objects, and of the pictures of COCO val2014 that show one (row) the share that show another (column)."""
    names = Vocabulary.load().nodes
    column_of = {name: i for i, name in enumerate(names)}
    pictures = coco_truth("rohrbach", "val")
    shows = np.zeros((len(pictures), len(names)), dtype=np.float32)
    for row, objects in enumerate(pictures.values()):
        shows[row, [column_of[name] for name in objects]] = 1
    n_with_both = shows.T @ shows
    return names, n_with_both / np.maximum(n_with_both.diagonal(), 1)[:, None]


def beside(shown: frozenset[str]) -> dict[str, float]:
    """How often each object is seen with what is shown: the share of COCO's pictures of a shown object that also show
    this one, averaged over the other shown objects. 0 where nothing else is shown."""
    names, share = _together()
    shown_rows = [i for i, name in enumerate(names) if name in shown]
    shares = {}
    for j, name in enumerate(names):
        others = [i for i in shown_rows if i != j]
        shares[name] = float(share[others, j].mean()) if others else 0.0
    return shares


def p_yes(
    studio: Studio, picture: Image.Image, chosen: Sequence[Intervention], names: Sequence[str]
) -> dict[str, float]:
    """For each object, how likely the answer begins with yes, of yes and no, after all interventions.

    `ValueError` for methods that decode in a way of their own: they leave the first token's probability as it is.
    """
    asker = studio.asker(chosen)
    probabilities: dict[str, float] = {}
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        questions = [(picture, question_text(name)) for name in batch]
        probabilities.update(zip(batch, asker.p_yes(questions), strict=True))
    return probabilities


@dataclass(frozen=True)
class Probe:
    """Answers about all objects of one picture."""

    picture: Image.Image
    known: frozenset[str] | None
    """Objects that are there, where that is known."""
    answers: dict[str, dict[str, float] | str]
    """Method -> P(yes) of each object; or what went wrong, in a sentence."""

    @property
    def there(self) -> frozenset[str]:
        """What is shown: as known, else what the first method says yes to."""
        if self.known is not None:
            return self.known
        first = next(iter(self._probabilities()), {})
        return frozenset(name for name, p in first.items() if p >= 0.5)

    def wrong(self, name: str, p: float) -> str:
        """`invented`, `missed`, or nothing."""
        if self.known is None or (p >= 0.5) == (name in self.known):
            return ""
        return "invented" if p >= 0.5 else "missed"

    def html(self) -> str:
        """Bars of every object, those that are there first, the others by how often they are seen with these."""
        answered = self._probabilities()
        if not answered:
            return self._methods()
        near, there = beside(self.there), self.there
        names = sorted(near, key=lambda name: (-near[name], name))
        present = [name for name in names if name in there]
        absent = [name for name in names if name not in there]
        first: list[str] = []
        rest: list[str] = []
        for i, name in enumerate(absent):
            someone_says_yes = any(p[name] >= 0.5 for p in answered)
            (first if i < NEAR or someone_says_yes else rest).append(name)
        if self.known is not None:
            above, below = f"In the picture: {len(present)}", f"Not in the picture: {len(absent)}"
        else:
            above, below = f"Said to be there: {len(present)}", f"Said to be absent: {len(absent)}"
        percent = "Percent: of COCO's pictures of the objects that are there, the share that also shows this one."
        parts = [
            self._methods(),
            f'<p class="quiet">{percent}</p><h4>{above}</h4>',
            *(self._row(name, near) for name in present),
            f"<h4>{below}, most likely beside these first</h4>",
            *(self._row(name, near) for name in first),
        ]
        if rest:
            rows = "".join(self._row(name, near) for name in rest)
            parts.append(f"<details><summary>The other {len(rest)}, no from all methods</summary>{rows}</details>")
        return "".join(parts)

    def _probabilities(self) -> list[dict[str, float]]:
        """P(yes) by object, of each method that has answered."""
        return [answer for answer in self.answers.values() if not isinstance(answer, str)]

    def _methods(self) -> str:
        lines = []
        for key, colour, spec, answer in self._keyed():
            text = self._summary(answer)
            lines.append(f'<li><b class="key" style="--c:{colour}">{key}</b> <code>{escape(spec)}</code> {text}</li>')
        unknown = "What this picture shows is not known here, so no answer is called right or wrong."
        where = f"<p class='quiet'>{unknown}</p>" if self.known is None else ""
        methods = f'<div><ul class="methods">{"".join(lines)}</ul>{where}</div>'
        return f'<div class="head"><img src="{maps.source(self.picture, SMALL)}" alt="The picture">{methods}</div>'

    def _summary(self, answer: dict[str, float] | str) -> str:
        """A method's answers in a line, or what went wrong; three dots where it has not answered yet."""
        if isinstance(answer, str):
            return f'<span class="wrong">{escape(answer)}</span>' if answer else "…"
        yes = f"yes to {sum(p >= 0.5 for p in answer.values())}"
        if self.known is None:
            return yes
        kinds = [self.wrong(name, p) for name, p in answer.items()]
        right, invented, missed = (kinds.count(kind) for kind in ("", "invented", "missed"))
        return f"{right} of {len(answer)} right, {invented} invented, {missed} missed; {yes}"

    def _row(self, name: str, near: dict[str, float]) -> str:
        bars = []
        for key, colour, spec, answer in self._keyed():
            if isinstance(answer, str):
                continue
            p = answer[name]
            wrong = self.wrong(name, p)
            bars.append(
                f'<div class="bar" style="--c:{colour};--v:{100 * p:.1f}%" title="{escape(spec)}: {p:.3f} {wrong}">'
                f'<b class="key">{key}</b><i></i><span{" class=wrong" if wrong else ""}>{p:.2f} {wrong}</span></div>'
            )
        share = f"<small>{100 * near[name]:.0f} %</small>"
        return f'<div class="row"><div>{escape(name)}{share}</div><div>{"".join(bars)}</div></div>'

    def _keyed(self) -> Iterator[tuple[str, str, str, dict[str, float] | str]]:
        """Letter, colour, spec and answers of each method."""
        colours = iter(PALETTE)
        for key, (spec, answer) in zip("ABCD", self.answers.items(), strict=False):
            yield key, UNTOUCHED if spec == "none" else next(colours), spec, answer


def probe(studio: Studio, path: str | None, specs: Sequence[str]) -> Iterator[str]:
    """The bars as safe HTML, once for each method that has answered. What is wrong is said in its place."""
    try:
        picture = read_picture(path)
    except ValueError as error:
        yield problem(error)
        return
    names, _ = _together()
    methods: dict[str, Sequence[Intervention]] = {}
    answers: dict[str, dict[str, float] | str] = {}
    for spec in specs:
        try:
            chosen = interventions(spec)
            methods[spec_of(chosen)], answers[spec_of(chosen)] = chosen, ""
        except (ValueError, TypeError) as error:
            answers[spec] = str(error)
    known = truth(picture)
    for spec, method in methods.items():
        try:
            answers[spec] = p_yes(studio, picture, method, names)
        except (ValueError, TypeError) as error:
            answers[spec] = str(error)
        yield Probe(picture, known, dict(answers)).html()
    if not methods:
        yield Probe(picture, known, answers).html()


def tab(studio: Studio, shared: Shared) -> None:
    """Build the tab's content inside a `gr.Blocks`."""
    gr.HTML(f"<style>{STYLE}</style><p>{INTRO}</p>", elem_classes="probe")
    button = gr.Button("Probe", variant="primary")
    bars = gr.HTML(elem_classes="probe")

    def run(path: str | None, n_columns: int, *specs: str) -> Iterator[str]:
        yield from probe(studio, path, specs[: int(n_columns)])

    button.click(run, [shared.picture, shared.n_columns, *shared.methods], bars, api_name="probe")
