"""Draws `effect.png`, the picture of the README: what the untouched embedded model says of three scenes, and what it
says with VHR.

    python assets/figures/effect.py

The scenes were picked to show the kinds of outcome (mended, mended at a price, spoilt), not at random; the table of the
README gives the whole.
"""

from pathlib import Path

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

SCENES = {58: "mended", 322: "mended, but it repeats itself", 167: "spoilt"}
COLOURS = {"present": "#1a7f37", "invented": "#cf222e", "": "#24292f"}


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
    model, processor = vlmfix.load("tiny")
    data = Data.load()
    figure, axes = plt.subplots(len(SCENES), 1, figsize=(10.5, 1.75 * len(SCENES) + 0.35), dpi=110)
    for axis, (scene, verdict) in zip(axes, SCENES.items(), strict=True):
        axis.set_axis_off()
        axis.set_xlim(0, 10.5)
        axis.set_ylim(0, 1.75)
        axis.imshow(Image.open(data.images[scene]), extent=(0.05, 1.65, 0.05, 1.65), aspect="auto", zorder=1)
        axis.text(
            1.85,
            1.6,
            f"VHR: {verdict}. In the picture: {', '.join(sorted(data.truth[scene]))}",
            size=10,
            color="#57606a",
            va="top",
        )
        for x, method in ((1.85, None), (6.25, "vhr")):
            with wrapped(model, method, processor):
                text = vlmfix.ask(model, processor, data.images[scene], PROMPT).text
            (score,) = chair.score_captions([(scene, text)], data.truth)
            axis.text(x, 1.28, "untouched" if method is None else "with VHR", size=10, weight="bold", va="top")
            box = AnnotationBbox(lines(pieces(score), 44), (x, 1.05), frameon=False, box_alignment=(0, 1), pad=0)
            axis.add_artist(box)
    figure.subplots_adjust(0.01, 0.07, 0.99, 0.99, hspace=0.05)
    figure.text(0.015, 0.015, "green: in the picture", color=COLOURS["present"], size=9)
    figure.text(0.16, 0.015, "red: invented (CHAIR)", color=COLOURS["invented"], size=9)
    figure.savefig(Path(__file__).with_name("effect.png"))


if __name__ == "__main__":
    main()
