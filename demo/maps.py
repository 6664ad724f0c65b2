"""Attention as pictures and as safe HTML: heat over a picture, layers x heads, the words of an answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from heapq import nlargest
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[Any]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1, half open, in pixels of the picture; may reach beyond it."""
SIDE = 420
"""Longest side of a drawn picture, in pixels."""
COLD, HOT = (255, 214, 64), (214, 22, 44)
"""Of little and of much attention; where there is none, the picture is grey."""

STYLE = """
.inside { --quiet: color-mix(in srgb, var(--body-text-color) 70%, transparent);
  --line: color-mix(in srgb, var(--body-text-color) 22%, transparent); --bar: #d97706; --heat: #d4551c; }
.inside p { margin: .3em 0; } .inside .quiet, .inside figcaption { color: var(--quiet); font-size: .88em; }
.inside h4 { margin: .9em 0 .3em; font-size: 1em; font-weight: 600; }
.inside .words { display: flex; flex-wrap: wrap; gap: .25em .2em; align-items: stretch; }
.inside .words button { display: inline-flex; flex-direction: column; gap: .15em; padding: .25em .4em; font: inherit;
  color: inherit; background: none; border: 1px solid transparent; border-radius: 6px; cursor: pointer; }
.inside .words button:hover { border-color: var(--line); }
.inside .words button:focus-visible, .inside .heads button:focus-visible { outline: 2px solid var(--bar);
  outline-offset: 1px; }
.inside .words button[aria-pressed=true] { border-color: var(--bar);
  background: color-mix(in srgb, var(--bar) 16%, transparent); }
.inside .words i { display: block; height: 4px; border-radius: 2px; background: linear-gradient(to right,
  var(--bar) var(--v), var(--line) var(--v)); }
.inside .words .invented { color: var(--wrong, #c62828); text-decoration: line-through; }
.inside .words .present { border-bottom: 1px dotted currentColor; }
.inside .words small { font-size: .72em; color: var(--quiet); text-align: left; font-variant-numeric: tabular-nums; }
.inside .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); gap: 1em;
  margin: .6em 0; }
.inside .panels figure { margin: 0; max-width: 420px; }
.inside .panels img { width: 100%; height: auto; display: block; border-radius: 6px; }
.inside .panels figcaption b { display: block; color: var(--body-text-color); font-weight: 600; }
.inside-maps { flex-wrap: wrap; }
.inside-maps > * { flex: 1 1 300px !important; min-width: min(100%, 300px) !important; }
.inside .scroll { overflow-x: auto; max-width: 100%; }
.inside table.heads { border-collapse: separate; border-spacing: 2px; font-size: .8em; margin: .2em 0;
  font-variant-numeric: tabular-nums; width: auto; border: 0; }
.inside table.heads caption { text-align: left; color: var(--quiet); padding-bottom: .2em; }
.inside table.heads th { font-weight: 400; color: var(--quiet); padding: 0 .3em; text-align: center; border: 0; }
.inside table.heads td { padding: 0; border: 2px solid transparent; border-radius: 4px; min-width: 2.5em; height: 1.9em;
  text-align: center; background: color-mix(in srgb, var(--heat) var(--v), transparent); }
.inside table.heads.many td { min-width: 1em; width: 1em; height: 1em; border-width: 1px; }
.inside table.heads td.on { border-color: var(--body-text-color); }
"""
FEW_HEADS = 12
"""Up to so many heads a layer, their numbers fit into the map."""
TOLD = 8
"""Of more heads, so many are told in words."""


def over(picture: Image.Image, heat: Array, box: Box, top: float, marked: Array | None = None) -> Image.Image:
    """A map (rows, columns) over the pixels `box` of a picture: grey where it is 0, red where it is `top` or more.

    Cells are drawn as they are, one for each image token, without smoothing. Cells in `marked` (rows, columns) bool get
    a cross. What lies outside the box is dark: the model has not seen it.
    """
    scale = SIDE / max(picture.size)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    base = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    grey = Image.blend(base, base.convert("L").convert("RGB"), 0.75)
    share = np.clip(heat / top if top > 0 else np.zeros_like(heat), 0, 1)
    cells = np.empty((*share.shape, 4), dtype=np.uint8)
    for i, (cold, hot) in enumerate(zip(COLD, HOT, strict=True)):
        cells[..., i] = np.round(cold + (hot - cold) * share)
    cells[..., 3] = np.round(225 * share**0.8)
    x0, y0, x1, y1 = (round(edge * scale) for edge in box)
    layer = Image.fromarray(cells).resize((max(x1 - x0, 1), max(y1 - y0, 1)), Image.Resampling.NEAREST)
    drawn = Image.blend(grey, Image.new("RGB", size), 0.75)
    drawn.paste(grey.crop((max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1]))), (max(x0, 0), max(y0, 0)))
    drawn.paste(layer, (x0, y0), layer)
    pen = ImageDraw.Draw(drawn)
    for row, column in np.argwhere(marked) if marked is not None else ():
        width, height = (x1 - x0) / heat.shape[1], (y1 - y0) / heat.shape[0]
        left, up = x0 + column * width, y0 + row * height
        arms = left + 0.35 * width, up + 0.35 * height, left + 0.65 * width, up + 0.65 * height
        for colour, thick in (("black", 3), ("white", 1)):
            pen.line((arms[0], arms[1], arms[2], arms[3]), colour, thick)
            pen.line((arms[0], arms[3], arms[2], arms[1]), colour, thick)
    return drawn


def masked(picture: Image.Image, mask: Array | None, box: Box) -> Image.Image:
    """A picture, dark outside a mask (height, width), with the box around what is cut out."""
    kept = picture.convert("RGB")
    if mask is not None:
        kept = Image.composite(kept, Image.blend(kept, Image.new("RGB", kept.size), 0.8), Image.fromarray(mask))
    scale = SIDE / max(kept.size)
    drawn = kept.resize((max(round(kept.width * scale), 1), max(round(kept.height * scale), 1)))
    edges = [min(max(round(edge * scale), 0), drawn.size[i % 2] - 1) for i, edge in enumerate(box)]
    pen = ImageDraw.Draw(drawn)
    pen.rectangle(edges, outline="black", width=5)
    pen.rectangle([edges[0] + 1, edges[1] + 1, edges[2] - 1, edges[3] - 1], outline=(255, 190, 40), width=3)
    return drawn


def source(picture: Image.Image, longest: int = SIDE) -> str:
    """A picture as a data address, made smaller if it is larger than `longest`."""
    small, file = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((longest, longest))
    small.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def figure(picture: Image.Image, title: str, caption: str, alt: str) -> str:
    """A picture as safe HTML."""
    return (
        f'<figure><img src="{source(picture)}" alt="{escape(alt)}"><figcaption><b>{escape(title)}</b>{escape(caption)}'
        "</figcaption></figure>"
    )


def panels(figures: Sequence[str]) -> str:
    """Figures side by side, or below each other where there is little room."""
    return f'<div class="panels">{"".join(figures)}</div>'


def strip(words: Sequence[tuple[str, float]], kinds: Sequence[str], chosen: int) -> str:
    """The words of an answer as buttons (`data-word`), each with its share of attention (0..1) on the picture, and its
    kind (`invented`, `present` or empty)."""
    buttons = []
    for i, ((word, share), kind) in enumerate(zip(words, kinds, strict=True)):
        percent = f"{100 * share:.0f}"
        buttons.append(
            f'<button type="button" data-word="{i}" aria-pressed="{str(i == chosen).lower()}" '
            f'aria-label="{escape(word)}{", " * bool(kind)}{kind}: {percent} percent of the attention on the picture" '
            f'title="{percent} % of the attention on the picture">'
            f'<span class="{kind}">{escape(word)}</span><i style="--v:{100 * share:.1f}%"></i>'
            f"<small>{percent} %</small></button>"
        )
    return f'<div class="words" role="group" aria-label="Words of the answer">{"".join(buttons)}</div>'


def heads(
    values: Mapping[int, Sequence[float]], chosen: Mapping[int, Collection[int]], caption: str, unit: str = ""
) -> str:
    """Layers x heads as a table: `values` by layer, `chosen` heads framed. The highest value has the full colour."""
    largest = max((v for row in values.values() for v in row), default=0.0)
    n = max(map(len, values.values()), default=0)
    many, every = n > FEW_HEADS, max(1, n // 8)

    def cell(layer: int, head: int, value: float) -> str:
        on = head in chosen.get(layer, ())
        said = f"{value:.0f}" if unit else f"{value:.1f}"
        full = 85 * max(value / largest, 0) if largest > 0 else 0
        return (
            f'<td{" class=on" if on else ""} style="--v:{full:.0f}%" '
            f'title="layer {layer}, head {head}: {said}{unit}{", chosen" if on else ""}">{"" if many else said}</td>'
        )

    top = "".join(f'<th scope="col">{h if not many or h % every == 0 else ""}</th>' for h in range(n))
    lines = (
        f'<tr><th scope="row">{layer}</th>{"".join(cell(layer, h, value) for h, value in enumerate(row))}</tr>'
        for layer, row in values.items()
    )
    told = ""
    if many:
        every_head = ((value, layer, h) for layer, row in values.items() for h, value in enumerate(row))
        best = (f"L{layer}H{h} {value:.1f}{unit}" for value, layer, h in nlargest(TOLD, every_head))
        told = f'<p class="quiet">Highest: {", ".join(best)}</p>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="heads{" many" if many else ""}"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col" title="layers down, heads across">L\\H</th>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{told}"
    )
