"""The tab Probe: POPE on one picture. "Is there a ...?" for all of COCO's objects at once, under several methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmfix.asking.asking import ask_batch, spellings
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
    at = {name: i for i, name in enumerate(names)}
    pictures = coco_truth("rohrbach", "val")
    shows = np.zeros((len(pictures), len(names)), dtype=np.float32)
    for i, objects in enumerate(pictures.values()):
        shows[i, [at[name] for name in objects]] = 1
    both = shows.T @ shows
    return names, both / np.maximum(both.diagonal(), 1)[:, None]


def beside(shown: frozenset[str]) -> dict[str, float]:
    """How often each object is seen with what is shown: the share of COCO's pictures of a shown object that also show
    this one, averaged over the other shown objects. 0 where nothing else is shown."""
    names, share = _together()
    found = {}
    for j, name in enumerate(names):
        others = [i for i, other in enumerate(names) if other in shown and other != name]
        found[name] = float(share[others, j].mean()) if others else 0.0
    return found


def p_yes(
    studio: Studio, picture: Image.Image, chosen: Sequence[Intervention], names: Sequence[str]
) -> dict[str, float]:
    """For each object, how likely the answer begins with yes, of yes and no, after all interventions.

    `ValueError` for methods that decode in a way of their own: they leave the first token's probability as it is.
    """
    if deciders := [one.name for one in chosen if one.acts_at("decode")]:
        raise ValueError(
            f"{deciders[0]} works on whole answers; it leaves the first token's probabilities as they are."
        )
    words = {word: spellings(studio.processor, word) for word in ("yes", "no")}
    found = {}
    with studio.under(chosen) as twin:
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            asked = [(picture, question_text(name)) for name in batch]
            for name, record in zip(
                batch, ask_batch(twin, studio.processor, asked, max_new_tokens=1, first_token=words), strict=True
            ):
                said = record.first_token or {}
                found[name] = 1 / (1 + math.exp(min(said["no"] - said["yes"], 700.0)))
    return found


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
        first = next((one for one in self.answers.values() if not isinstance(one, str)), {})
        return frozenset(n for n, p in first.items() if p >= 0.5) if self.known is None else self.known

    def wrong(self, name: str, p: float) -> str:
        """`invented`, `missed`, or nothing."""
        if self.known is None or (p >= 0.5) == (name in self.known):
            return ""
        return "invented" if p >= 0.5 else "missed"

    def html(self) -> str:
        """Bars of every object, those that are there first, the others by how often they are seen with these."""
        told = [one for one in self.answers.values() if not isinstance(one, str)]
        if not told:
            return self._methods()
        near = beside(self.there)
        names = sorted(near, key=lambda name: (-near[name], name))
        there = [name for name in names if name in self.there]
        absent = [name for name in names if name not in self.there]
        said_yes = {name for name in absent if any(one[name] >= 0.5 for one in told)}
        first = [name for i, name in enumerate(absent) if i < NEAR or name in said_yes]
        rest = [name for name in absent if name not in first]
        shown, behind = (
            (f"In the picture: {len(there)}", f"Not in the picture: {len(absent)}")
            if self.known is not None
            else (f"Said to be there: {len(there)}", f"Said to be absent: {len(absent)}")
        )
        percent = "Percent: of COCO's pictures of the objects that are there, the share that also shows this one."
        parts = [
            self._methods(),
            f'<p class="quiet">{percent}</p><h4>{shown}</h4>',
            *(self._row(name, near) for name in there),
        ]
        parts += [f"<h4>{behind}, most likely beside these first</h4>", *(self._row(name, near) for name in first)]
        if rest:
            rows = "".join(self._row(name, near) for name in rest)
            parts.append(f"<details><summary>The other {len(rest)}, no from all methods</summary>{rows}</details>")
        return "".join(parts)

    def _methods(self) -> str:
        lines = []
        for key, colour, (spec, one) in self._keyed():
            if isinstance(one, str):
                text = f'<span class="wrong">{escape(one)}</span>' if one else "…"
            else:
                kinds = [self.wrong(name, p) for name, p in one.items()]
                right = f"{kinds.count('')} of {len(one)} right, {kinds.count('invented')} invented, "
                text = f"yes to {sum(p >= 0.5 for p in one.values())}"
                text = text if self.known is None else f"{right}{kinds.count('missed')} missed; {text}"
            lines.append(f'<li><b class="key" style="--c:{colour}">{key}</b> <code>{escape(spec)}</code> {text}</li>')
        where = (
            ""
            if self.known is not None
            else (
                "<p class='quiet'>What this picture shows is not known here, so no answer is called right or wrong.</p>"
            )
        )
        methods = f'<div><ul class="methods">{"".join(lines)}</ul>{where}</div>'
        return f'<div class="head"><img src="{maps.source(self.picture, SMALL)}" alt="The picture">{methods}</div>'

    def _row(self, name: str, near: dict[str, float]) -> str:
        bars = []
        for key, colour, (spec, one) in self._keyed():
            if isinstance(one, str):
                continue
            p, wrong = one[name], self.wrong(name, one[name])
            bars.append(
                f'<div class="bar" style="--c:{colour};--v:{100 * p:.1f}%" title="{escape(spec)}: {p:.3f} {wrong}">'
                f'<b class="key">{key}</b><i></i><span{" class=wrong" if wrong else ""}>{p:.2f} {wrong}</span></div>'
            )
        seen = f"<small>{100 * near[name]:.0f} %</small>"
        return f'<div class="row"><div>{escape(name)}{seen}</div><div>{"".join(bars)}</div></div>'

    def _keyed(self) -> Iterator[tuple[str, str, tuple[str, dict[str, float] | str]]]:
        """Letter, colour, and the answers of each method."""
        colours = iter(PALETTE)
        for key, (spec, one) in zip("ABCD", self.answers.items(), strict=False):
            yield key, UNTOUCHED if spec == "none" else next(colours), (spec, one)


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
