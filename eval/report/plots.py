"""Plots of a report as inline SVG, without scripts, in the colours of the page around them.

They need matplotlib (`pip install vlmfix[plots]`), which is imported only when a plot is drawn.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

from vlmfix.eval.report.mistakes import BINS, by_position, confusion
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.words import plain
from vlmfix.eval.scorers.stats import Estimate
from vlmfix.eval.scorers.truncation import CutCaptions

UNTOUCHED = "#7d8590"
PALETTE = ("#3f83d6", "#d9772b", "#2f9e73", "#b4559b", "#8468d4", "#b08d00", "#1b9aaa", "#c4555a")
"""Of the methods: readable on white and on black."""
WIDTH = 5.2
"""Inches. Pages scale the plots; this keeps their text readable on a phone."""
LABELS_APART = 9
"""Least distance of two labels on the curve of cut captions, in points of recall plus points of CHAIR_S."""
_INK = "#010203"
"""Stands for the colour of the page's text until the SVG is done."""
_STYLE: dict[Any, Any] = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "font.size": 10,
    "text.usetex": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
}


def available() -> bool:
    """Whether there is a matplotlib to draw with."""
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # somebody has blocked it
        return False


# The three plots


def trade_off(study: Study) -> str:
    """CHAIR_S against recall: the methods with their intervals, and the untouched model cut shorter and shorter."""
    with _drawing("trade-off", WIDTH, 3.9) as drawing:
        (ax,) = drawing.axes
        if study.curve is not None:
            _cut_captions(ax, study.curve, f"{plain(study.baseline)}, cut after N words")
        for series in distinct(study):
            row = study.comparison.rows[series.run]
            recall, chair_s = _percent(row.estimates["recall"]), _percent(row.estimates["CHAIR_S"])
            if recall is None or chair_s is None:
                continue
            ax.errorbar(
                recall.value,
                chair_s.value,
                xerr=[[recall.below], [recall.above]],
                yerr=[[chair_s.below], [chair_s.above]],
                fmt="s" if study.comparison.runs[series.run].untouched else "o",
                color=series.colour,
                markersize=7,
                capsize=0,
                elinewidth=1.3,
                label=_shortened(series.name, 70),
                zorder=2,
            )
        ax.set_xlabel("recall: objects in the pictures that are named, %")
        ax.set_ylabel("CHAIR_S: captions that invent, %")
        _legend(ax)
    return _labelled(drawing.svg, "CHAIR_S against recall; the tables above hold the same figures")


Point = tuple[float, float, float]
"""Of a plot: a value and the ends of its interval."""


def frontier(
    cut: CutCaptions | None,
    base: tuple[float, float],
    tried: Sequence[tuple[float, float, int]],
    confirmed: Sequence[tuple[str, Point, Point]],
) -> str:
    """What a search found: recall and CHAIR_S in percent of all that was `tried`, with the number of pictures behind
    it, and of what was `confirmed`, with intervals; `base` is the untouched model."""
    with _drawing("frontier", WIDTH, 3.9) as drawing:
        (ax,) = drawing.axes
        if cut is not None:
            _cut_captions(ax, cut, "the untouched model, cut after N words")
        most = max((n for _, _, n in tried), default=1)
        sizes = [8 + 40 * n / most for _, _, n in tried]
        ax.scatter(
            [x for x, _, _ in tried], [y for _, y, _ in tried], s=sizes, color=_INK, alpha=0.25, linewidths=0,
            label="tried, on fewer (small) or more pictures",
        )  # fmt: skip
        ax.plot(*base, "s", color=UNTOUCHED, markersize=7, label="the untouched model")
        for colour, (name, recall, chair_s) in zip(PALETTE, confirmed, strict=False):
            ax.errorbar(
                recall[0], chair_s[0], xerr=[[recall[0] - recall[1]], [recall[2] - recall[0]]],
                yerr=[[chair_s[0] - chair_s[1]], [chair_s[2] - chair_s[0]]], fmt="o", color=colour, markersize=7,
                capsize=0, elinewidth=1.3, label=_shortened(name, 70), zorder=3,
            )  # fmt: skip
        ax.set_xlim(left=max(0, min(x for x, _, _ in [*tried, (*base, 0)]) - 3))
        ax.set_xlabel("recall: objects in the pictures that are named, %")
        ax.set_ylabel("CHAIR_S: captions that invent, %")
        _legend(ax)
    return _labelled(drawing.svg, "CHAIR_S against recall of all that was tried")


def _cut_captions(ax: Any, cut_captions: CutCaptions, label: str) -> None:
    """A line through the captions after each cut; every tenth word is named where there is room."""
    curve = cut_captions.curve
    recalls = [100 * figures["recall"] for figures in curve.values()]
    chair_s = [100 * figures["CHAIR_S"] for figures in curve.values()]
    ax.plot(recalls, chair_s, color=_INK, alpha=0.55, linewidth=1.4, marker=".", markersize=5, zorder=1)
    named: list[tuple[float, float]] = []
    for cut, x, y in zip(curve, recalls, chair_s, strict=True):
        free = all(abs(x - other_x) + abs(y - other_y) > LABELS_APART for other_x, other_y in named)
        if cut is not None and cut % 10 == 0 and free:
            ax.annotate(
                f"{cut} words",
                (x, y),
                xytext=(7, -9),
                textcoords="offset points",
                fontsize=8,
                alpha=0.7,
                color=_INK,
            )
            named.append((x, y))
    ax.plot([], [], color=_INK, alpha=0.55, marker=".", label=label)


def position(study: Study) -> str:
    """Share of mentions that are invented, along the caption."""
    with _drawing("position", WIDTH, 2.9) as drawing:
        (ax,) = drawing.axes
        every_series = distinct(study)
        for place, series in enumerate(every_series):
            shift = (place - (len(every_series) - 1) / 2) * 0.08  # so that bars do not hide each other
            fifths, shares = [], []
            for fifth, estimate in enumerate(by_position(study.captions[series.run])):
                share = _percent(estimate)
                if share is not None:
                    fifths.append(fifth + shift)
                    shares.append(share)
            ax.errorbar(
                fifths,
                [share.value for share in shares],
                yerr=[[share.below for share in shares], [share.above for share in shares]],
                fmt="o-",
                color=series.colour,
                markersize=5,
                elinewidth=1.1,
                label=_shortened(series.name, 70),
            )
        ticks = [f"{100 * fifth // BINS}–{100 * (fifth + 1) // BINS} %" for fifth in range(BINS)]
        ax.set_xticks(range(BINS), ticks)
        ax.set_ylim(bottom=0)
        ax.set_ylabel("mentions that are invented, %")
        ax.set_xlabel("how far into the caption")
        _legend(ax)
    return _labelled(drawing.svg, "Share of mentions that are invented, by position in the caption")


def errors(study: Study) -> str:
    """Wrong answers to yes/no questions, by split: objects denied to the left, objects invented to the right."""
    splits = confusion(study)
    methods = len(study.names)
    height = 0.7 + len(splits) * (0.35 + 0.26 * methods)
    with _drawing("errors", WIDTH, height, nrows=len(splits), sharex=True) as drawing:
        for ax, (split, table) in zip(drawing.axes, splits.items(), strict=True):
            for place, (sums, colour) in enumerate(zip(table, colours(study), strict=True)):
                _bars(ax, place, *_wrong_shares(sums), colour)
            ax.set_yticks(range(methods), [_shortened(name, 24) for name in study.names])
            ax.set_ylim(methods - 0.4, -0.6)
            ax.axvline(0, color=_INK, linewidth=0.8)
            ax.margins(x=0.14)
            ax.grid(False, axis="y")
            if split:
                ax.set_title(split, loc="left", fontsize=10, fontweight="bold")
        last = drawing.axes[-1]
        low, high = last.get_xlim()
        reach = max(-low, high, 1)
        last.set_xlim(-reach, reach)
        last.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        last.set_xlabel("← denied, % of present   |   invented, % of absent →")
    return _labelled(drawing.svg, "Wrong answers by split; the table below holds the counts")


def _wrong_shares(sums: dict[str, int]) -> tuple[float, float]:
    """Wrong answers in percent, where yes is right and where no is; answers that are neither are wrong."""
    yes_is_right = sums["tp"] + sums["fn"] + sums["unknown_yes"]
    no_is_right = sums["tn"] + sums["fp"] + sums["unknown"] - sums["unknown_yes"]
    denied = 100 * (yes_is_right - sums["tp"]) / max(yes_is_right, 1)
    invented = 100 * (no_is_right - sums["tn"]) / max(no_is_right, 1)
    return denied, invented


def _bars(ax: Any, place: int, denied: float, invented: float, colour: str) -> None:
    """One bar to the left and one to the right, with their numbers at the ends."""
    ax.barh([place, place], [-denied, invented], height=0.72, color=colour)
    for x, side, pad in ((-denied, "right", -3), (invented, "left", 3)):
        ax.annotate(
            f"{abs(x):.1f}",
            (x, place),
            (pad, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
        )


# What is drawn


@dataclass(frozen=True)
class Series:
    """One run, or several that answer alike, as drawn."""

    run: int
    name: str
    colour: str


def colours(study: Study) -> list[str]:
    """One for each run: grey for the untouched model."""
    methods = 0
    chosen = []
    for run in study.comparison.runs:
        if run.untouched:
            chosen.append(UNTOUCHED)
        else:
            chosen.append(PALETTE[methods % len(PALETTE)])
            methods += 1
    return chosen


def distinct(study: Study) -> list[Series]:
    """Runs to draw: those that answer as the untouched model does are drawn with it."""
    runs = range(len(study.names))
    same = [run for run in runs if run != study.base and study.same_answers(run)]
    drawn = []
    for run, colour in zip(runs, colours(study), strict=True):
        if run in same:
            continue
        together = [run, *same] if run == study.base else [run]
        drawn.append(Series(run, " = ".join(_shortened(study.names[one]) for one in together), colour))
    return drawn


@dataclass(frozen=True)
class Percent:
    """A value with the lengths of its error bar, in percent."""

    value: float
    below: float
    above: float


def _percent(estimate: Estimate) -> Percent | None:
    """`None` where undefined; no error bar where there is no interval."""
    value = estimate.value
    if value is None:
        return None
    low = value if estimate.low is None else estimate.low
    high = value if estimate.high is None else estimate.high
    return Percent(100 * value, 100 * max(value - low, 0), 100 * max(high - value, 0))


def _shortened(name: str, most: int = 34) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# From matplotlib to the page


@dataclass
class Drawing:
    """Axes to draw on, and the SVG once that is done."""

    axes: list[Any] = field(default_factory=list)
    svg: str = ""


@contextmanager
def _drawing(name: str, width: float, height: float, **subplots: Any) -> Iterator[Drawing]:
    """A figure of so many inches, whose SVG is the same whenever it is drawn of the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        drawing = Drawing(list(figure.subplots(squeeze=False, **subplots).flat))
        yield drawing
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():  # the browser has the letters that matplotlib's font lacks
            warnings.simplefilter("ignore")
            figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    drawing.svg = _inline(file.getvalue())


def _inline(svg: str) -> str:
    """The SVG element alone: no prolog, no addresses of name spaces, no ids but those that are referred to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    return svg.replace(_INK, "currentColor").strip()


def _labelled(svg: str, label: str) -> str:
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def _legend(ax: Any) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper left", fontsize=9)
