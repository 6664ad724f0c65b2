"""The report as one HTML file that needs nothing else: words, tables, plots, pictures, provenance. No torch, no script.

    page([study(comparison) for comparison in compare(runs)])

The page is drawn by the templates beside this file. They escape all that models, runs and annotations say, and the page
forbids itself to load or run anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from vlmfix.eval.report import plots, words
from vlmfix.eval.report.figures import p_text
from vlmfix.eval.report.gallery import gallery as chosen_pictures
from vlmfix.eval.report.mistakes import Rates, confusion, object_rates
from vlmfix.eval.report.study import Study
from vlmfix.eval.report.tables import MethodTable, control_columns, every_figure, published_table

OBJECTS = 12
"""Objects in each table of rates."""


def page(studies: Sequence[Study], *, gallery: int = 8, sample: int = 8, seed: int = 0) -> str:
    """The report.

    Args:
        studies: One per benchmark, model and set of pictures.
        gallery: How many of the pictures where methods differ most are shown.
        sample: How many pictures are shown that were drawn at random.
        seed: Of that draw.

    Returns:
        The whole file, to be written as UTF-8.
    """
    about = _listed(study.comparison.model or study.comparison.title for study in studies)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=f"vlmfix report: {about}" if studies else "What the models said",
            origin=_origin(studies),
            style=Markup((files("vlmfix.eval.report") / "templates" / "page.css").read_text("utf-8")),
            parts=[_part(study, gallery, sample, seed) for study in studies],
        )
    )


@cache
def environment(package: str = "vlmfix.eval.report") -> Environment:
    """What draws the templates of a package. Everything that they write is escaped, and free of control characters."""
    folder = files(package) / "templates"
    made = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["code_spans"] = code_spans
    made.filters["p_text"] = p_text
    return made


def _clean(value: object) -> str:
    """Without control characters and halves of characters. What is safe HTML stays so."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(value))
    return Markup(text) if isinstance(value, Markup) else text


def code_spans(text: str) -> Markup:
    """Safe HTML, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _listed(names: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, names)))


def _origin(studies: Sequence[Study]) -> str:
    """Where it all comes from, in a line."""
    runs = [run for study in studies for run in study.comparison.runs]
    if not runs:
        return "No run was given."
    identities = [run.header["identity"] for run in runs]
    started = [str(run.header.get("environment", {}).get("started", "")) for run in runs]
    days = sorted({time[:10] for time in started if time})
    facts = [
        ("model", _listed(identity["model"] for identity in identities if identity["model"])),
        ("methods", _listed(run.label for run in runs)),
        ("benchmarks", _listed(study.comparison.title for study in studies)),
        ("pictures", _listed(identity["data"] for identity in identities if identity["data"])),
        ("testing only, the first", _listed(_first_pictures(identities))),
        ("answered", _listed(days[:1] + days[-1:]).replace(", ", " to ")),
        ("vlmfix", _listed(identity["vlmfix"] for identity in identities if identity.get("vlmfix"))),
    ]
    sentence = "; ".join(f"{name} {value}" for name, value in facts if value)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _first_pictures(identities: Iterable[dict[str, Any]]) -> list[str]:
    return [f"{identity['limit']} pictures" for identity in identities if identity.get("limit")]


def _part(study: Study, most: int, sample: int, seed: int) -> dict[str, Any]:
    """What the template of one comparison draws."""
    tables = every_figure(study)
    return {
        "heading": words.heading(study),
        "pictures": words.counted(study.pictures, "picture"),
        "summary": words.summary(study),
        "judgement": words.judgement(study),
        "notes": words.notes(study),
        "baseline": study.baseline,
        "methods": study.names,
        "tables": tables,
        "differences": _differences(tables),
        "discordant": any(verdict.discordant for verdict in study.verdicts),
        "published": published_table(study.comparison),
        "marks": words.MARKS,
        "controls": control_columns(study),
        **_plots(study),
        "confusion": _confusion(study),
        "rates": _rates(study),
        "gallery": chosen_pictures(study, most, sample, seed),
        "runs": _provenance(study),
    }


def _differences(tables: Sequence[MethodTable]) -> dict[str, MethodTable]:
    """Of each group of answers, the methods that are compared with the baseline."""
    compared: dict[str, MethodTable] = {}
    for table in tables:
        columns = [column for column in table.columns if any(cell.difference for cell in column.cells)]
        rows = [row for row in range(len(table.names)) if any(column.cells[row].difference for column in columns)]
        if rows:
            compared[table.group] = replace(
                table,
                names=[table.names[row] for row in rows],
                is_control=[table.is_control[row] for row in rows],
                columns=[replace(column, cells=[column.cells[row] for row in rows]) for column in columns],
            )
    return compared


@dataclass(frozen=True)
class Plot:
    """A drawing with the words below it."""

    svg: Markup
    caption: str


TRADE_OFF = (
    "Down and to the right is better. Crosses are 95 % intervals. The line is {baseline} with its captions cut: a "
    "method on it does no more than saying less."
)
POSITION = "Share of the mentions that are invented, in each fifth of the caption, with 95 % intervals."
ERRORS = "Wrong answers: objects that are there but denied to the left, invented ones to the right."


def _plots(study: Study) -> dict[str, Any]:
    if not study.captions and not confusion(study):
        return {"plots": [], "lacks_matplotlib": False}
    if not plots.available():
        return {"plots": [], "lacks_matplotlib": True}
    if study.captions:
        drawn = [
            Plot(Markup(plots.trade_off(study)), TRADE_OFF.format(baseline=study.baseline)),
            Plot(Markup(plots.position(study)), POSITION),
        ]
    else:
        drawn = [Plot(Markup(plots.errors(study)), ERRORS)]
    return {"plots": drawn, "lacks_matplotlib": False}


def _confusion(study: Study) -> dict[str, Any] | None:
    """Counts of right and wrong answers, a row for each split and method; `None` where there are no questions."""
    rows = []
    for split, table in confusion(study).items():
        for method, sums in zip(study.names, table, strict=True):
            unread = sums["unknown"] + sums["dropped"]
            rows.append({"method": method, "split": split, "unread": unread, **sums})
    if not rows:
        return None
    return {"rows": rows, "unread": any(row["unread"] for row in rows)}


@dataclass(frozen=True)
class Bar:
    """How often one method is wrong about one object."""

    percent: str
    times: int
    of: int
    length: str
    """Of the bar, as a share of the longest one in the table."""
    colour: str


def _rates(study: Study) -> list[dict[str, Any]]:
    """Objects that are invented, and missed, most often."""
    invented, missed = object_rates(study)
    if not invented and not missed:
        return []
    if study.captions:
        captions = ("Invented most: of the pictures without it", "Missed most: of the pictures that show it")
    else:
        captions = (
            "Invented most: of the questions about it where it is absent",
            "Denied most: of the questions about it where it is present",
        )
    return [
        {"caption": caption, "rows": _bars(study, rates)}
        for caption, rates in zip(captions, (invented, missed), strict=True)
    ]


def _bars(study: Study, rates: Rates) -> list[tuple[str, list[Bar]]]:
    shown = dict(list(rates.items())[:OBJECTS])
    highest = max((rate.share for of_runs in shown.values() for rate in of_runs), default=0.0) or 1.0
    colours = plots.colours(study)
    rows = []
    for name, of_runs in shown.items():
        bars = []
        for rate, colour in zip(of_runs, colours, strict=True):
            length = f"{rate.share / highest:.3f}"
            bars.append(Bar(f"{100 * rate.share:.1f}", rate.times, rate.of, length, colour))
        rows.append((name, bars))
    return rows


def _provenance(study: Study) -> list[dict[str, Any]]:
    runs = []
    for name, run in zip(study.names, study.comparison.runs, strict=True):
        header = json.dumps(run.header, indent=2, ensure_ascii=False)
        runs.append({"name": name, "folder": run.folder, "answers": len(run.records), "header": header})
    return runs
