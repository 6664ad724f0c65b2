"""Draws `effect.png`, the picture of the README: what the untouched embedded model says of three scenes, and what it
says with VHR.

    python assets/figures/effect.py

The scenes are picked by a rule, not by hand: of the test scenes, in their order, the first of each kind of outcome
(mended, no better, spoilt). So they show what can happen, and not how often; the table of the README gives that.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
from PIL import Image

import vlmfix
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.benchmarks.chair import PROMPT
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import chair

KINDS = ("mended", "no better", "spoilt")
COLOURS = {"present": "#1a7f37", "invented": "#cf222e", "": "#24292f"}


def outcome(untouched: chair.CaptionScore, edited: chair.CaptionScore) -> str | None:
    """Kind of what the method did to inventions in one scene; `None` where there are none, or some fewer or more."""
    before, after = len(untouched.hallucinated), len(edited.hallucinated)
    if before and not after:
        return "mended"
    if after and not before:
        return "spoilt"
    return "no better" if before and before == after else None


def first_of_each_kind(model: Any, processor: Any, data: Data) -> dict[str, tuple[int, list[chair.CaptionScore]]]:
    """Kind -> number of its first scene, and the scored captions, untouched and with VHR."""
    scenes: dict[str, tuple[int, list[chair.CaptionScore]]] = {}
    for number, picture in data.images.items():
        scores = []
        for method in (None, "vhr"):
            with wrapped(model, method, processor):
                text = vlmfix.ask(model, processor, picture, PROMPT).text
            scores += chair.score_captions([(number, text)], data.truth)
        kind = outcome(*scores)
        if kind is not None:
            scenes.setdefault(kind, (number, scores))
        if len(scenes) == len(KINDS):
            break
    return scenes


def pieces(score: chair.CaptionScore) -> list[tuple[str, str]]:
    """The caption word by word, each with the verdict on the object that it names."""
    words, at = [], 0
    for word in score.caption.split(" "):
        named = [m for m in score.mentions if m.start < at + len(word) and m.end > at]
        verdicts = ["present" if m.node in score.truth else "invented" for m in named]
        words.append((word, verdicts[0] if verdicts else ""))
        at += len(word) + 1
    return words


def lines(words: list[tuple[str, str]], width: int = 50) -> VPacker:
    """Words set in lines, coloured by verdict."""
    rows, row, used = [], [], 0
    for text, verdict in words:
        if used + len(text) > width:
            rows.append(row)
            row, used = [], 0
        used += len(text) + 1
        style = {"color": COLOURS[verdict], "size": 11, "weight": "bold" if verdict else "normal"}
        row.append(TextArea(text, textprops=style))
    rows.append(row)
    return VPacker(children=[HPacker(children=r, pad=0, sep=4) for r in rows if r], pad=0, sep=4)


def main() -> None:
    """Ask, score, draw."""
    model, processor = vlmfix.load("organism")
    data = Data.load()
    scenes = first_of_each_kind(model, processor, data)
    figure, axes = plt.subplots(len(KINDS), 1, figsize=(10.5, 1.95 * len(KINDS) + 0.35), dpi=110)
    for axis, kind in zip(axes, KINDS, strict=True):
        number, scores = scenes[kind]
        axis.set_axis_off()
        axis.set_xlim(0, 10.5)
        axis.set_ylim(0, 1.95)
        axis.imshow(Image.open(data.images[number]), extent=(0.05, 1.75, 0.15, 1.85), aspect="auto", zorder=1)
        objects = ", ".join(sorted(data.truth[number]))
        axis.text(1.95, 1.8, f"VHR: {kind}. In the picture: {objects}", size=10, color="#57606a", va="top")
        for x, label, score in zip((1.95, 6.3), ("untouched", "with VHR"), scores, strict=True):
            axis.text(x, 1.48, label, size=10, weight="bold", va="top")
            caption = lines(pieces(score), 44)
            axis.add_artist(AnnotationBbox(caption, (x, 1.25), frameon=False, box_alignment=(0, 1), pad=0))
    figure.subplots_adjust(0.01, 0.07, 0.99, 0.99, hspace=0.05)
    figure.text(0.015, 0.015, "green: in the picture", color=COLOURS["present"], size=9)
    figure.text(0.16, 0.015, "red: invented (CHAIR)", color=COLOURS["invented"], size=9)
    figure.savefig(Path(__file__).with_name("effect.png"))


if __name__ == "__main__":
    main()
