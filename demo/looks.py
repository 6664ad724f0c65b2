"""An answer from inside as safe HTML: maps over the picture, layers x heads, what CARVE cut out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from vlmfix.asking.batch import model_inputs
from vlmfix.demo import maps
from vlmfix.demo.studio import Studio, problem
from vlmfix.demo.watch import Inspection, Seen, Shown
from vlmfix.eval.scorers.chair import mentions
from vlmfix.eval.tune.vhd import divergence
from vlmfix.hooks.parts.refined import redraw, unpack

SAME = 1e-3
"""Attention that differs by less is the same: passes with and without a cache round differently."""


def bands(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Choices of layers by name: all, thirds of the depth, and each by itself."""
    choices = {f"All {len(layers)} layers": tuple(layers)}
    for name, third in zip(("Early", "Middle", "Late"), np.array_split(np.array(layers), 3), strict=True):
        if len(third) > 1:
            choices[f"{name}: {third[0]} to {third[-1]}"] = tuple(map(int, third))
    for layer in layers:
        choices[f"Layer {layer}"] = (layer,)
    return choices


def heat_maps(inspection: Inspection, word: int, layers: Sequence[int], head: int | None) -> str:
    """The attention that produced a word, over the picture: of the untouched model, before the edit and after it."""
    chosen = inspection.words[word]
    heat = {id(seen): seen.heat(chosen.steps, layers, head) for seen in inspection.looks}
    before, after = heat[id(inspection.before)], heat[id(inspection.after)]
    edited = bool(abs(after - before).max() > SAME)
    titled = _titled_looks(inspection, edited)
    for _, _, shown in titled:
        if shown.view is None and shown.gridless:
            return problem(f"There is no map over the picture: {shown.gridless}.")
    grids = [shown.grid(heat[id(seen)]) for _, seen, shown in titled]
    top = max(float(grid.max()) for grid in grids)
    figures = [maps.figure(inspection.original.picture, "The picture", "", "The picture")]
    for (title, seen, shown), grid in zip(titled, grids, strict=True):
        assert shown.view is not None
        row, column = np.unravel_index(grid.argmax(), grid.shape)
        caption = f"{100 * grid.sum():.1f} % of the attention; the strongest token has {100 * grid.max():.1f} %"
        place = f"in row {row + 1} and column {column + 1} of {grid.shape[0]} x {grid.shape[1]}"
        drawn = maps.over(shown.picture, grid, shown.view.box, top, shown.grid(seen.marked(layers)))
        figures.append(maps.figure(drawn, title, caption, f"{title}. Attention over the picture. {caption}, {place}"))
    plural = len(chosen.steps) > 1
    lines = [
        f"Behind “{chosen.text}”: attention of the row{'s' * plural} that predict{'s' * (not plural)} its "
        f"token{'s, averaged' * plural}. One scale for all maps; grey: none, red: most."
    ]
    if inspection.untouched is not None and not edited:
        untouched = heat[id(inspection.untouched)]
        alike = untouched.shape == after.shape and abs(untouched - after).max() < SAME
        lines.append(_why_unedited(inspection.spec, alike))
    lines.append(sinks_text(inspection, layers))
    views = [(shown.view, shown.picture.size) for _, _, shown in titled if shown.view is not None]
    if any(view.box != (0, 0, *size) for view, size in views):
        lines.append("Dark edges were cut off before the model: it has not seen them.")
    return maps.panels(figures) + "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)


def _titled_looks(inspection: Inspection, edited: bool) -> list[tuple[str, Seen, Shown]]:
    """The maps to draw: title, attention, and the picture that it lies on."""
    looks = []
    if inspection.untouched is not None:
        looks.append(("Untouched model, same words", inspection.untouched, inspection.original))
    for i, shown in enumerate(inspection.shown):
        which = f", picture {i + 1}" if len(inspection.shown) > 1 else ""
        if edited:
            looks.append((f"{inspection.spec}, before its edit{which}", inspection.before, shown))
        looks.append((f"{inspection.spec}{', after' if edited else ''}{which}", inspection.after, shown))
    return looks


def _why_unedited(spec: str, alike: bool) -> str:
    """Why the maps before and after a method are the same."""
    if alike:
        return f"{spec} leaves attention as it is, here: the untouched model looks at the same."
    return f"{spec} does not edit the attention shown here; the maps differ because what comes before does."


def sinks_text(inspection: Inspection, layers: Sequence[int]) -> str:
    """How many image tokens are visual sinks, or why none is marked."""
    sinks = inspection.sinks
    if not sinks.dims:
        return f"No visual sinks are marked: {sinks.origin}."
    n_sinks, n_tokens = int(inspection.after.marked(layers).sum()), inspection.after.image.shape[-1]
    rule = f"dimensions {', '.join(map(str, sinks.dims))}, tau {sinks.tau:.3g}, {sinks.origin}"
    if not n_sinks:
        return f"No image token is a visual sink in at least half of these layers ({rule})."
    return (
        f"✕ marks the {n_sinks} of {n_tokens} image tokens that are visual sinks in at least half of these layers "
        f"({rule})."
    )


def notes(inspection: Inspection) -> str:
    """What the method has to say: that it is idle, or did nothing, and which answer it gave."""
    lines = []
    for method, effects in zip(inspection.record.method, inspection.record.effects, strict=True):
        idle = method["facts"].get("idle")
        if idle:
            lines.append(f"{method['name']} does not act on this model: {idle}.")
        elif not effects.get("acted"):
            lines.append(f"{method['name']} found nothing to act on in this answer.")
    return "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)


def word_heads(inspection: Inspection, word: int) -> str:
    """Layers x heads: how much each looks at the picture behind a word."""
    chosen, seen = inspection.words[word], inspection.after
    shares = 100 * seen.by_head(chosen.steps)
    values = {layer: row.tolist() for layer, row in zip(seen.layers, shares, strict=True)}
    title = f"Behind “{chosen.text}”: attention on the picture, in percent"
    return maps.heads(values, inspection.heads, title, " %")


def vhd_heads(studio: Studio, picture: Image.Image, prompt: str, chosen: dict[int, tuple[int, ...]]) -> str:
    """Layers x heads: VHD, over the mean of the layer."""
    inputs = model_inputs(studio.model, studio.processor, [([picture], prompt)])
    values = {}
    for layer, choice in divergence(studio.twin(), inputs).items():
        vhd = choice.vhd[0]
        values[layer] = (vhd / vhd.mean().clamp(min=1e-12)).tolist()
    return maps.heads(values, chosen, "VHD: change of a head's output when the picture is there, over its layer's mean")


def carved(inspection: Inspection) -> str:
    """CARVE's contrast, mask and crop, as its record has them; empty where CARVE was not asked for or did not look."""
    for method, effects in zip(inspection.record.method, inspection.record.effects, strict=True):
        if method["name"] == "carve" and "heat" in effects:
            figures = _carve_figures(effects, inspection.original.picture)
            return f"<h4>What CARVE cut out</h4>{maps.panels(figures)}"
    return ""


def _carve_figures(effects: dict[str, Any], picture: Image.Image) -> list[str]:
    """What CARVE saw in a picture and made of it, from its part of the record."""
    heat = np.array(effects["heat"])
    contrast = maps.over(picture, heat, tuple(effects["covers"]), float(heat.max()))
    caption = f"Question against description. Its first look said “{effects['first']}”."
    figures = [maps.figure(contrast, "CARVE's contrast", caption, "contrast map")]
    if not effects["acted"]:
        figures.append("<p>The mask takes in everything, so the answer saw the picture as it is.</p>")
        return figures
    if effects["mask"] is None:
        mask, kept = None, "a square window"
    else:
        mask = unpack(effects["mask"])
        kept = f"{100 * effects['area']:.0f} % of the pixels, with {100 * effects['share']:.0f} % of the contrast"
    width, height = effects["size"]
    masked = maps.masked(picture, mask, tuple(effects["box"]))
    refined = redraw(effects, picture)
    figures.append(maps.figure(masked, "Mask and box", f"Kept: {kept}.", "mask"))
    figures.append(maps.figure(refined, "Refined picture", f"Enlarged to {width} x {height}.", "crop"))
    return figures


def verdicts(inspection: Inspection, known: frozenset[str] | None) -> list[str]:
    """Of each word: `present` or `invented` where it names an object of a picture whose content is known, `object`
    where it is not, else empty."""
    text = inspection.record.text
    spans = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    kinds = [""] * len(inspection.words)
    for mention in mentions(text):
        kind = "object"
        if known is not None:
            kind = "present" if mention.node in known else "invented"
        for i, (start, end) in enumerate(spans[: len(kinds)]):
            if start < mention.end and mention.start < end:
                kinds[i] = kind
    return kinds
