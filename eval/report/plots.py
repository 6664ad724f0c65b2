"""Plots of a report as inline SVG, without scripts, in the colours of the page around them.

They need matplotlib (`pip install vlmfix[plots]`), which is imported only when a plot is drawn.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from vlmfix.eval.report.mistakes import BINS, by_position, confusion
from vlmfix.eval.report.study import Study
from vlmfix.eval.scorers.stats import Estimate

UNTOUCHED = "#7d8590"
PALETTE = ("#3f83d6", "#d9772b", "#2f9e73", "#b4559b", "#8468d4", "#b08d00", "#1b9aaa", "#c4555a")
"""Of the methods: readable on white and on black."""
WIDTH = 5.2
"""Inches. Pages scale the plots; this keeps their text readable on a phone."""
_INK = "#010203"
"""Stands for the colour of the page's text until the SVG is done."""


def available() -> bool:
    """Whether there is a matplotlib to draw with."""
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # somebody has blocked it
        return False


def colours(study: Study) -> list[str]:
    """One for each run: grey for the untouched model."""
    methods = iter(range(len(study.names)))
    return [UNTOUCHED if run.untouched else PALETTE[next(methods) % len(PALETTE)] for run in study.comparison.runs]


def distinct(study: Study) -> list[tuple[int, str, str]]:
    """Runs to draw, with names and colours: those that answer as the untouched model does are drawn with it."""
    same = [i for i in range(len(study.names)) if i == study.base or study.same_answers(i)]
    drawn = []
    for i, colour in enumerate(colours(study)):
        if i == study.base or i not in same:
            together = [i, *(k for k in same if k != i)] if i == study.base else [i]
            drawn.append((i, " = ".join(_shown(study.names[k]) for k in together), colour))
    return drawn


@contextmanager
def _drawing(name: str, width: float, height: float, **subplots: Any) -> Iterator[tuple[Any, list[Any], list[str]]]:
    """A figure, its axes, and a list that the finished SVG is put into."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        **{"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.usetex": False},
        **{"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        **{"axes.grid": True, "grid.color": _INK, "grid.alpha": 0.12, "grid.linewidth": 0.8, "axes.axisbelow": True},
        **{"axes.unicode_minus": True, "axes.edgecolor": _INK, "axes.linewidth": 0.8},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(squeeze=False, **subplots).flat)
        finished: list[str] = []
        yield figure, axes, finished
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():  # the browser has the letters that matplotlib's font lacks
            warnings.simplefilter("ignore")
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    finished.append(_inline(file.getvalue()))


def _inline(svg: str) -> str:
    """The SVG element alone: no prolog, no addresses of name spaces, no ids but those that are referred to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace(_INK, "currentColor").strip()


def _labelled(svg: str, label: str) -> str:
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def _legend(ax: Any) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper left", fontsize=9)


def _percent(e: Estimate) -> tuple[float, list[list[float]]] | None:
    """Value and error bar in percent; None where undefined."""
    if e.value is None:
        return None
    low, high = (e.value if x is None else x for x in (e.low, e.high))
    return 100 * e.value, [[100 * max(e.value - low, 0)], [100 * max(high - e.value, 0)]]


def _shown(name: str, most: int = 34) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def trade_off(study: Study) -> str:
    """CHAIR_S against recall: the methods with their intervals, and the untouched model cut shorter and shorter."""
    with _drawing("trade-off", WIDTH, 3.9) as (_, (ax,), finished):
        if study.curve is not None:
            curve = study.curve.curve
            recalls, shares = ([100 * point[what] for point in curve.values()] for what in ("recall", "CHAIR_S"))
            ax.plot(recalls, shares, color=_INK, alpha=0.55, linewidth=1.4, marker=".", markersize=5, zorder=1)
            told: list[tuple[float, float]] = []
            for cut, at in zip(curve, zip(recalls, shares, strict=True), strict=True):
                far = all(abs(at[0] - other[0]) + abs(at[1] - other[1]) > 9 for other in told)
                if cut is not None and cut % 10 == 0 and far:
                    offset: dict[str, Any] = {"xytext": (7, -9), "textcoords": "offset points"}
                    ax.annotate(f"{cut} words", at, **offset, fontsize=8, alpha=0.7, color=_INK)
                    told.append(at)
            ax.plot(
                [], [], color=_INK, alpha=0.55, marker=".", label=f"{study.baseline.strip(chr(96))}, cut after N words"
            )
        for i, name, colour in distinct(study):
            row, run = study.comparison.rows[i], study.comparison.runs[i]
            x, y = _percent(row.estimates["recall"]), _percent(row.estimates["CHAIR_S"])
            if x is not None and y is not None:
                marker = "s" if run.untouched else "o"
                ax.errorbar(
                    x[0], y[0], xerr=x[1], yerr=y[1], fmt=marker, color=colour, markersize=7, capsize=0,
                    elinewidth=1.3, label=_shown(name, 70), zorder=2,
                )  # fmt: skip
        ax.set_xlabel("recall: objects in the pictures that are named, %")
        ax.set_ylabel("CHAIR_S: captions that invent, %")
        _legend(ax)
    return _labelled(finished[0], "CHAIR_S against recall; the tables above hold the same figures")


def position(study: Study) -> str:
    """Share of mentions that are invented, along the caption."""
    with _drawing("position", WIDTH, 2.9) as (_, (ax,), finished):
        runs = distinct(study)
        for k, (i, name, colour) in enumerate(runs):
            shift = (k - (len(runs) - 1) / 2) * 0.08
            points = [(b, p) for b, e in enumerate(by_position(study.captions[i])) if (p := _percent(e)) is not None]
            xs, ys = [b + shift for b, _ in points], [p[0] for _, p in points]
            bars = [[p[1][side][0] for _, p in points] for side in (0, 1)]
            ax.errorbar(xs, ys, yerr=bars, fmt="o-", color=colour, markersize=5, elinewidth=1.1, label=_shown(name, 70))
        ax.set_xticks(range(BINS), [f"{100 * b // BINS}–{100 * (b + 1) // BINS} %" for b in range(BINS)])
        ax.set_ylim(bottom=0)
        ax.set_ylabel("mentions that are invented, %")
        ax.set_xlabel("how far into the caption")
        _legend(ax)
    return _labelled(finished[0], "Share of mentions that are invented, by position in the caption")


def errors(study: Study) -> str:
    """Wrong answers to yes/no questions, by split: objects denied to the left, objects invented to the right."""
    splits = confusion(study)
    methods = len(study.names)
    height = 0.7 + len(splits) * (0.35 + 0.26 * methods)
    with _drawing("errors", WIDTH, height, nrows=len(splits), sharex=True) as (_, axes, finished):
        for ax, (split, table) in zip(axes, splits.items(), strict=True):
            for k, (sums, colour) in enumerate(zip(table, colours(study), strict=True)):
                yes = sums["tp"] + sums["fn"] + sums["unknown_yes"]
                no = sums["tn"] + sums["fp"] + sums["unknown"] - sums["unknown_yes"]
                left = 100 * (yes - sums["tp"]) / max(yes, 1)
                right = 100 * (no - sums["tn"]) / max(no, 1)
                ax.barh([k, k], [-left, right], height=0.72, color=colour)
                for x, side in ((-left, "right"), (right, "left")):
                    pad = -3 if x <= 0 and side == "right" else 3
                    ax.annotate(
                        f"{abs(x):.1f}", (x, k), (pad, 0), textcoords="offset points", ha=side, va="center", fontsize=8
                    )
            ax.set_yticks(range(methods), [_shown(name, 24) for name in study.names])
            ax.set_ylim(methods - 0.4, -0.6)
            ax.axvline(0, color=_INK, linewidth=0.8)
            ax.margins(x=0.14)
            ax.grid(False, axis="y")
            if split:
                ax.set_title(split, loc="left", fontsize=10, fontweight="bold")
        low, high = axes[-1].get_xlim()
        reach = max(-low, high, 1)
        axes[-1].set_xlim(-reach, reach)
        axes[-1].xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        axes[-1].set_xlabel("← denied, % of present   |   invented, % of absent →")
    return _labelled(finished[0], "Wrong answers by split; the table below holds the counts")
