"""An answer from inside as safe HTML: maps over the picture, layers x heads, what CARVE cut out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from vlmfix.asking.batch import Batch
from vlmfix.demo import maps
from vlmfix.demo.studio import Studio, problem
from vlmfix.demo.watch import Inspection, Seen, Shown
from vlmfix.eval.scorers.chair import mentions
from vlmfix.eval.tune.vhd import divergence
from vlmfix.hooks import carve

SAME = 1e-3
"""Attention that differs by less is the same: passes with and without a cache round differently."""


def bands(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Choices of layers by name: all, thirds of the depth, and each by itself."""
    found = {f"All {len(layers)} layers": tuple(layers)}
    for name, part in zip(("Early", "Middle", "Late"), np.array_split(np.array(layers), 3), strict=True):
        if len(part) > 1:
            found[f"{name}: {part[0]} to {part[-1]}"] = tuple(map(int, part))
    return {**found, **{f"Layer {layer}": (layer,) for layer in layers}}


def heat_maps(found: Inspection, word: int, layers: Sequence[int], head: int | None) -> str:
    """The attention that produced a word, over the picture: of the untouched model, before the edit and after it."""
    chosen = found.words[word]
    heat = {id(seen): seen.heat(chosen.steps, layers, head) for seen in found.looks}
    before, after = heat[id(found.before)], heat[id(found.after)]
    edited = bool(abs(after - before).max() > SAME)
    looks: list[tuple[str, Seen, Shown]] = []
    if found.untouched is not None:
        looks.append(("Untouched model, same words", found.untouched, found.original))
    for i, shown in enumerate(found.shown):
        which = f", picture {i + 1}" if len(found.shown) > 1 else ""
        if edited:
            looks.append((f"{found.spec}, before its edit{which}", found.before, shown))
        looks.append((f"{found.spec}{', after' if edited else ''}{which}", found.after, shown))
    if gridless := next((shown.gridless for *_, shown in looks if shown.view is None), ""):
        return problem(f"There is no map over the picture: {gridless}.")
    grids = [shown.grid(heat[id(seen)]) for _, seen, shown in looks]
    top = max(float(grid.max()) for grid in grids)
    figures = [maps.figure(found.original.picture, "The picture", "", "The picture")]
    for (title, seen, shown), grid in zip(looks, grids, strict=True):
        assert shown.view is not None
        row, column = np.unravel_index(grid.argmax(), grid.shape)
        said = f"{100 * grid.sum():.1f} % of the attention; the strongest token has {100 * grid.max():.1f} %"
        alt = f"Attention over the picture. {said}, in row {row + 1} and column {column + 1} of {grid.shape[0]} x "
        drawn = maps.over(shown.picture, grid, shown.view.box, top, shown.grid(seen.marked(layers)))
        figures.append(maps.figure(drawn, title, said, f"{title}. {alt}{grid.shape[1]}"))
    several = len(chosen.steps) > 1
    lines = [
        f"Behind “{chosen.text}”: attention of the row{'s' * several} that predict{'s' * (not several)} its "
        f"token{'s, averaged' * several}. One scale for all maps; grey: none, red: most."
    ]
    if found.untouched is not None and not edited:
        plain = heat[id(found.untouched)]
        alike = plain.shape == after.shape and abs(plain - after).max() < SAME
        lines.append(
            f"{found.spec} leaves attention as it is, here: the untouched model looks at the same."
            if alike
            else f"{found.spec} does not edit the attention shown here; the maps differ because what comes before does."
        )
    lines.append(sinks_text(found, layers))
    if any(shown.view.box != (0, 0, *shown.picture.size) for *_, shown in looks if shown.view is not None):
        lines.append("Dark edges were cut off before the model: it has not seen them.")
    return maps.panels(figures) + "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)


def sinks_text(found: Inspection, layers: Sequence[int]) -> str:
    """How many image tokens are visual sinks, or why none is marked."""
    told = found.sinks
    if not told.dims:
        return f"No visual sinks are marked: {told.origin}."
    n, of = int(found.after.marked(layers).sum()), found.after.image.shape[-1]
    which = f"dimensions {', '.join(map(str, told.dims))}, tau {told.tau:.3g}, {told.origin}"
    if not n:
        return f"No image token is a visual sink in at least half of these layers ({which})."
    return f"✕ marks the {n} of {of} image tokens that are visual sinks in at least half of these layers ({which})."


def notes(found: Inspection) -> str:
    """What the method has to say: that it is idle, or did nothing, and which answer it gave."""
    lines = []
    for method, did in zip(found.record.method, found.record.effects, strict=True):
        if idle := method["facts"].get("idle"):
            lines.append(f"{method['name']} does not act on this model: {idle}.")
        elif not did.get("acted"):
            lines.append(f"{method['name']} found nothing to act on in this answer.")
    return "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)


def word_heads(found: Inspection, word: int) -> str:
    """Layers x heads: how much each looks at the picture behind a word."""
    chosen = found.words[word]
    shares = 100 * found.after.by_head(chosen.steps)
    values = {layer: row.tolist() for layer, row in zip(found.after.layers, shares, strict=True)}
    return maps.heads(values, found.heads, f"Behind “{chosen.text}”: attention on the picture, in percent", " %")


def vhd_heads(studio: Studio, picture: Image.Image, prompt: str, chosen: dict[int, tuple[int, ...]]) -> str:
    """Layers x heads: VHD, over the mean of the layer."""
    inputs = Batch.of(studio.model, studio.processor, [([picture], prompt)], {}).inputs
    with studio.under() as twin:
        vhd = {layer: choice.vhd[0] for layer, choice in divergence(twin, inputs).items()}
    values = {layer: (row / row.mean().clamp(min=1e-12)).tolist() for layer, row in vhd.items()}
    return maps.heads(values, chosen, "VHD: change of a head's output when the picture is there, over its layer's mean")


def carved(found: Inspection) -> str:
    """CARVE's contrast, mask and crop, as its record has them; empty where CARVE was not asked for or did not look."""
    for method, did in zip(found.record.method, found.record.effects, strict=True):
        if method["name"] == "carve" and "heat" in did:
            heat, picture = np.array(did["heat"]), found.original.picture
            drawn = maps.over(picture, heat, tuple(did["covers"]), float(heat.max()))
            first = f"Its first look said “{did['first']}”."
            figures = [maps.figure(drawn, "CARVE's contrast", f"Question against description. {first}", "contrast map")]
            if did["acted"]:
                mask = None if did["mask"] is None else carve.unpack(did["mask"])
                kept = "a square window" if mask is None else f"{100 * did['area']:.0f} % of the pixels"
                kept += "" if mask is None else f", with {100 * did['share']:.0f} % of the contrast"
                box, size = did["box"], did["size"]
                figures += [
                    maps.figure(maps.masked(picture, mask, tuple(box)), "Mask and box", f"Kept: {kept}.", "mask"),
                    maps.figure(
                        carve.redraw(did, picture), "Refined picture", f"Enlarged to {size[0]} x {size[1]}.", "crop"
                    ),
                ]
            else:
                figures.append("<p>The mask takes in everything, so the answer saw the picture as it is.</p>")
            return f"<h4>What CARVE cut out</h4>{maps.panels(figures)}"
    return ""


def verdicts(found: Inspection, known: frozenset[str] | None) -> list[str]:
    """Of each word: `present` or `invented` where it names an object of a picture whose content is known, `object`
    where it is not, else empty."""
    spans = [(m.start(), m.end()) for m in re.finditer(r"\S+", found.record.text)]
    kinds = [""] * len(found.words)
    for mention in mentions(found.record.text):
        kind = "object" if known is None else "present" if mention.node in known else "invented"
        for i, (start, end) in enumerate(spans[: len(kinds)]):
            if start < mention.end and mention.start < end:
                kinds[i] = kind
    return kinds
