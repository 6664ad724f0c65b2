"""The report as one HTML file that needs nothing else: words, tables, plots, pictures, provenance. No torch, no script.

    page([study(comparison) for comparison in compare(runs)])

All that models, runs and annotations say is escaped, and the page forbids itself to load or run anything.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmfix.eval.report import plots
from vlmfix.eval.report.report import (
    MARKS,
    MEANING,
    YES_NO,
    Rate,
    Study,
    confusion,
    deviation_text,
    flags,
    interval,
    number,
    object_rates,
    p_text,
    published_table,
    resolution,
    rule,
    words,
)
from vlmfix.eval.run.results import Row
from vlmfix.eval.scorers.chair import CaptionScore, explain

NO_PLOTS = "Plots need matplotlib: <code>pip install vlmfix[plots]</code>, then make the report again."
THUMBNAIL = 320
"""Longest side of a picture in the gallery, in pixels."""
OBJECTS = 12
"""Objects in each table of rates."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --quiet: #59636e; --paper: #ffffff; --line: #d8dee4; --soft: #f4f6f8;
  --wrong: #c4262e; --good: #1a7f37; --note: #fff6dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #9aa4af; --paper: #14171b; --line: #343b43;
  --soft: #1d2127; --wrong: #ff8078; --good: #57c274; --note: #33290c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; overflow-wrap: break-word; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .6rem; padding-top: 1.2rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .88rem; }
.flags { background: var(--note); border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0; max-width: 46rem; }
.flags ul { margin: 0; padding-left: 1.1rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--soft); border-radius: 4px;
  padding: .08em .3em; }
a { color: inherit; }
nav { margin: .8rem 0 0; font-size: .92rem; } nav a { margin-right: 1rem; }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; caption-side: top; padding-bottom: .3rem; }
th, td { padding: .38rem .8rem .38rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom: 1.5px solid var(--ink); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 500; } tbody th small { display: block; max-width: 15rem; white-space: normal; }
small { color: var(--quiet); font-size: .82em; font-weight: 400; }
td small { display: block; }
.real { font-weight: 700; } .real.good { color: var(--good); } .real.bad { color: var(--wrong); }
.unreal { color: var(--quiet); }
figure { margin: 1rem 0 1.4rem; max-width: 37rem; } figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
.pair { display: flex; flex-wrap: wrap; gap: 0 3.5rem; } .pair > * { min-width: 0; max-width: 100%; }
h4 { font-size: .98rem; margin: 1.6rem 0 .5rem; }
.bar { display: block; height: .42rem; border-radius: 2px; margin-top: .2rem; min-width: 1px; }
td.rate, .rates thead th { text-align: left; } td.rate { min-width: 6.5rem; } td.rate small { display: inline; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; break-inside: avoid; display: flex;
  gap: .9rem; align-items: flex-start; }
.card img, .lost { width: 9.5rem; flex: none; border-radius: 4px; }
.lost { background: var(--soft); color: var(--quiet); font-size: .85rem; padding: 1rem .6rem; }
.card dl { margin: 0; min-width: 0; flex: 1; } .card dt { font-size: .85rem; }
.card dd { margin: .15rem 0 .8rem; } .card dd:last-child { margin-bottom: 0; }
.said { unicode-bidi: isolate; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto; }
.present { border-bottom: 1px dotted var(--quiet); }
del.invented { color: var(--wrong); font-weight: 600; text-decoration-thickness: 2px; }
details { margin: 2rem 0 0; } summary { cursor: pointer; font-weight: 600; }
details pre { font: .8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--soft);
  padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) { main { padding: 1.2rem .9rem 3rem; } .card { flex-direction: column; }
  .card img, .lost { width: 100%; max-width: 20rem; } th, td { padding-right: .5rem; } table { font-size: .85rem; }
  tbody th small { max-width: 6.2rem; } td.rate { min-width: 4.6rem; } td.rate small { display: block; } }
@media print { :root { --ink: #000; --paper: #fff; --quiet: #444; --soft: #f4f4f4; --line: #ccc; --wrong: #b00;
  --good: #060; --note: #fff; } body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  .scroll, .said { overflow: visible; max-height: none; }
  h2, h3, caption { break-after: avoid; } figure, tr { break-inside: avoid; } nav { display: none; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


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
    title = f"vlmfix report: {about}" if studies else "What the models said"
    links = "".join(f'<a href="#part{i}">{text(_title(one))}</a>' for i, one in enumerate(studies, start=1))
    parts = "".join(_part(i, one, gallery, sample, seed) for i, one in enumerate(studies, start=1))
    nav = f"<nav>{links}</nav>" if len(studies) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{text(title)}</h1><p>{text(_origin(studies))}</p>{nav}{parts}</main></body></html>\n"
    )


def text(said: object) -> str:
    """Anything as safe HTML: escaped, without control characters and halves of characters."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(said))
    return escape(clean, quote=True)


def _coded(said: str) -> str:
    """Safe HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(said))


def _code(name: object) -> str:
    return f"<code>{text(name)}</code>"


def _listed(names: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, names)))


def _title(study: Study) -> str:
    model = f", model {study.comparison.model}" if study.comparison.model else ""
    return f"{study.comparison.title}{model}{study.comparison.testing}"


def _origin(studies: Sequence[Study]) -> str:
    """Where it all comes from, in a line."""
    runs = [run for study in studies for run in study.comparison.runs]
    identities = [run.header["identity"] for run in runs]
    days = sorted({str(run.header.get("environment", {}).get("started", ""))[:10] for run in runs} - {""})
    versions = _listed(i["vlmfix"] for i in identities if i.get("vlmfix"))
    models, pictures = (_listed(i[key] for i in identities if i[key]) for key in ("model", "data"))
    facts = [
        f"Model {models}" if models else "",
        f"methods {_listed(run.label for run in runs)}",
        f"benchmarks {_listed(study.comparison.title for study in studies)}",
        f"pictures {pictures}" if pictures else "",
        _listed(f"testing only, the first {i['limit']} pictures" for i in identities if i.get("limit")),
        f"answered {days[0] if days[0] == days[-1] else f'{days[0]} to {days[-1]}'}" if days else "",
        f"vlmfix {versions}" if versions else "",
    ]
    said = "; ".join(filter(None, facts))
    return f"{said[0].upper()}{said[1:]}." if runs else "No run was given."


def _part(i: int, study: Study, gallery: int, sample: int, seed: int) -> str:
    paragraphs = "".join(f"<p>{_coded(said)}</p>" for said in words(study))
    if study.verdicts:
        paragraphs += f'<p class="quiet">{text(" ".join(filter(None, [rule(study), resolution(study)])))}</p>'
    return (
        f'<section id="part{i}"><h2>{text(_title(study))}, {study.pictures} pictures</h2>{paragraphs}{_flags(study)}'
        f"{_tables(study)}{_published(study)}{_control(study)}{_plots(study)}{_confusion(study)}{_objects(study)}"
        f"{_gallery(study, gallery, sample, seed)}{_provenance(study)}</section>\n"
    )


def _flags(study: Study) -> str:
    found = [*filter(None, [deviation_text(study.comparison)]), *flags(study), *study.comparison.notes]
    return '<div class="flags"><ul>' + "".join(f"<li>{_coded(f)}</li>" for f in found) + "</ul></div>" if found else ""


# Tables


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of cells that are HTML already; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    said = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _metric(study: Study, name: str) -> str:
    """A figure's name, unit and meaning."""
    unit, _ = study.columns[name]
    meaning = MEANING.get(name, "") if study.captions else YES_NO.get(name, MEANING.get(name, ""))
    return f"{text(name)} {unit}" + (f"<small>{meaning}</small>" if meaning else "")


def _tables(study: Study) -> str:
    """Figures, and beside them the differences."""
    parts = ["<h3>Figures</h3>"]
    if study.verdicts:
        who = _coded(study.baseline)
        explained = f" Cured: pictures where only {who} invents something; spoiled: where only the method does."
        parts.append(
            '<p class="quiet">Differences are paired, on the same pictures. Bold: real, green for the better, red for '
            "the worse; grey: not told from 0. p is adjusted for the number of methods."
            + (explained if any(v.discordant for v in study.verdicts) else "")
            + "</p>"
        )
    for group, rows in study.rows():
        title = f"<b>{text(group)}</b>: " if group else ""
        caption = f"{title}95 % intervals, bootstrap over {rows[0].n} pictures"
        parts.append('<div class="pair">')
        parts.append(_table(["", *map(_code, study.names)], _estimates(study, rows), caption))
        of = {(v.metric, v.method): v for v in study.verdicts if v.group == group}
        methods = [name for name in study.names if any(method == name for _, method in of)]
        apart = [
            [f"{text(metric)} {study.columns[metric][0]}"]
            + [_difference(study, of.get((metric, name))) for name in methods]
            for metric in study.columns
        ]
        if methods:
            parts.append(_table(["", *map(_code, methods)], apart, f"{title}difference to {_coded(study.baseline)}"))
        parts.append("</div>")
    return "".join(parts)


def _published(study: Study) -> str:
    """What others report for the protocol."""
    head, body = published_table(study.comparison)
    if not body:
        return ""
    caption = f"LLaVA-1.5-7B, in percent; {text(MARKS)}"
    cells = [[text(cell) or "–" for cell in line] for line in body]
    return f"<h3>Published figures of this protocol</h3>{_table([text(name) for name in head], cells, caption)}"


def _estimates(study: Study, rows: Sequence[Row]) -> Iterable[list[str]]:
    for metric, (_, factor) in study.columns.items():
        found = [row.estimates[metric] for row in rows]
        cells = [f"{number(e.value, factor)}<small>{interval(e, factor)}</small>" for e in found]
        yield [_metric(study, metric), *cells]


def _difference(study: Study, verdict: Any) -> str:
    if verdict is None:
        return "–"
    _, factor = study.columns[verdict.metric]
    d = verdict.difference
    if d.value == d.low == d.high == 0:
        return '<span class="unreal">same</span>'
    kind = "real" if verdict.real else "unreal"
    if verdict.real and verdict.better is not None:
        kind += " good" if verdict.better else " bad"
    pair = verdict.discordant
    told = f"<small>{pair.only_base} cured, {pair.only_method} spoiled</small>" if pair else ""
    behind = f"<small>{interval(d, factor, True)}, {p_text(verdict.p_holm)}</small>{told}"
    return f'<span class="{kind}">{number(d.value, factor, True)}</span>{behind}'


def _control(study: Study) -> str:
    shown = [(name, c) for name, c in zip(study.names, study.controls, strict=True) if c is not None]
    if not shown:
        return ""
    lines: list[list[str]] = [
        ["recall %<small>of the method</small>", *(number(c.recall, 100) for _, c in shown)],
        [f"N*<small>words of {_coded(study.baseline)}, cut to it</small>", *(number(c.cut_words, 1) for _, c in shown)],
        ["CHAIR_S %<small>of these cut captions</small>", *(number(c.cut_chair_s, 100) for _, c in shown)],
    ]
    for name, field in (("CHAIR_S", "chair_s"), ("CHAIR_I_unique", "chair_i_unique"), ("F1", "f1")):
        better = 1 if field == "f1" else -1
        cells = []
        for _, control in shown:
            gap = getattr(control, field)
            if gap.value == gap.low == gap.high == 0:
                cells.append('<span class="unreal">same</span>')
                continue
            clear = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
            kind = ("real good" if gap.value * better > 0 else "real bad") if clear else "unreal"
            spread = f"<small>{interval(gap, 100, True)}</small>"
            cells.append(f'<span class="{kind}">{number(gap.value, 100, True)}</span>{spread}')
        lines.append([f"{name}<small>method minus cut captions, points</small>", *cells])
    lines.append(["", *(_where(c.status, c.below_curve, c.chair_s.low) for _, c in shown)])
    return (
        "<h3>Truncation control: better than saying less?</h3>"
        f'<p class="quiet">Short captions invent less. So the captions of {_coded(study.baseline)} are cut, word by '
        "word, to the recall of each method; what is left of the difference is the method's own. A method is below the "
        "curve only if its CHAIR_S is lower beyond chance.</p>"
        + _table(["", *(_code(name) for name, _ in shown)], lines)
    )


def _where(status: str, below: bool, low: float | None) -> str:
    if status == "outside":
        return "outside: recall below every cut"
    place = "below the curve" if below else "above the curve" if low is not None and low > 0 else "on the curve"
    return place if status == "inside" else f"{place} <small>recall above vanilla</small>"


def _confusion(study: Study) -> str:
    splits = confusion(study)
    if not splits:
        return ""
    unread = any(sums["unknown"] + sums["dropped"] for table in splits.values() for sums in table)
    head = ["", "present,<br>said yes", "present,<br>denied", "absent,<br>said no", "absent,<br>invented"]
    rows = [
        [f"{_code(name)}{f' <small>{text(split)}</small>' if split else ''}"]
        + [str(sums[key]) for key in ("tp", "fn", "tn", "fp")]
        + ([str(sums["unknown"] + sums["dropped"])] if unread else [])
        for split, table in splits.items()
        for name, sums in zip(study.names, table, strict=True)
    ]
    return _table(head + (["neither yes<br>nor no"] if unread else []), rows, "Answers, counted")


def _objects(study: Study) -> str:
    invented, missed = object_rates(study)
    if not invented and not missed:
        return ""
    chances = ("of the questions about it where it is absent", "of the questions about it where it is present")
    if study.captions:
        chances = ("of the pictures without it", "of the pictures that show it")
    return (
        '<h3>Objects</h3><div class="pair rates">'
        + _rates(study, invented, f"Invented most: {chances[0]}")
        + _rates(study, missed, f"{'Missed' if study.captions else 'Denied'} most: {chances[1]}")
        + "</div>"
    )


def _rates(study: Study, rates: Mapping[str, Sequence[Rate]], caption: str) -> str:
    shown = dict(list(rates.items())[:OBJECTS])
    if not shown:
        return f'<p class="quiet">{caption}: never.</p>'
    most = max((rate.share for all_of_it in shown.values() for rate in all_of_it), default=0) or 1
    rows = [
        [text(name), *(_rate(r, most, c) for r, c in zip(all_of_it, plots.colours(study), strict=True))]
        for name, all_of_it in shown.items()
    ]
    return _table(["", *map(_code, study.names)], rows, caption)


def _rate(rate: Rate, most: float, colour: str) -> str:
    bar = f'<span class="bar" style="width:{100 * rate.share / most:.1f}%;background:{colour}"></span>'
    return f'<td class="rate">{100 * rate.share:.1f} % <small>{rate.times}/{rate.of}</small>{bar}</td>'


# Plots


def _plots(study: Study) -> str:
    drawn = []
    if study.captions:
        drawn = [
            (
                plots.trade_off,
                "Down and to the right is better. Crosses are 95 % intervals. The line is "
                f"{_coded(study.baseline)} with its captions cut: a method on it does no more than saying less.",
            ),
            (
                plots.position,
                "Share of the mentions that are invented, in each fifth of the caption, with 95 % intervals.",
            ),
        ]
    elif confusion(study):
        said = "Wrong answers: objects that are there but denied to the left, invented ones to the right."
        drawn = [(plots.errors, said)]
    if not drawn:
        return ""
    if not plots.available():
        return f"<h3>Plots</h3><p>{NO_PLOTS}</p>"
    return "<h3>Plots</h3>" + "".join(
        f"<figure>{draw(study)}<figcaption>{caption}</figcaption></figure>" for draw, caption in drawn
    )


# Gallery


@dataclass(frozen=True)
class _Answer:
    """One caption, and the methods that gave it."""

    names: list[str]
    score: CaptionScore


def _gallery(study: Study, most: int, sample: int, seed: int) -> str:
    shared = set.intersection(*map(set, study.captions)) if study.captions else set()
    if not shared:
        return ""
    ranked = sorted(shared, key=lambda image: (-_spread(study, image), image))
    differing = [image for image in ranked if _spread(study, image) > 0][:most]
    drawn = random.Random(seed).sample(sorted(shared), min(sample, len(shared)))
    parts = [
        '<h3>Pictures</h3><p class="quiet"><span class="present">Dotted</span>: named and in the picture. '
        '<del class="invented">Struck</del>: invented. Judged as the scorer reads the words, which can be wrong.</p>'
    ]
    if differing:
        parts.append(f"<h4>Where methods differ most</h4>{_cards(study, differing)}")
    if drawn:
        parts.append(
            "<h4>Drawn at random</h4>"
            f'<p class="quiet">{len(drawn)} of {len(shared)} pictures, seed {seed}, whatever they show.</p>'
            f"{_cards(study, drawn)}"
        )
    return "".join(parts)


def _spread(study: Study, image: int) -> float:
    """How much methods differ on a picture: in objects invented, then in objects missed."""
    scores = [captions[image] for captions in study.captions]
    invented, missed = [len(s.objects - s.truth) for s in scores], [len(s.missed) for s in scores]
    return max(invented) - min(invented) + (max(missed) - min(missed)) / 100


def _cards(study: Study, images: Sequence[int]) -> str:
    return f'<div class="gallery">{"".join(_card(study, image) for image in images)}</div>'


def _card(study: Study, image: int) -> str:
    answers: dict[str, _Answer] = {}
    for name, captions in zip(study.names, study.captions, strict=True):
        score = captions[image]
        answers.setdefault(score.caption, _Answer([], score)).names.append(name)
    told = "".join(
        f"<dt>{' = '.join(map(_code, a.names))}</dt><dd>"
        f'<div class="said" dir="auto">{marked(a.score)}</div>{_missed(a.score)}</dd>'
        for a in answers.values()
    )
    path = study.data.images.get(image)
    return f'<div class="card">{_picture(path, image)}<dl>{told}</dl></div>'


def _missed(score: CaptionScore) -> str:
    told = f"missed: {text(', '.join(sorted(score.missed)))}" if score.missed else "nothing missed"
    return f"<small>{told}</small>"


def marked(score: CaptionScore) -> str:
    """A caption as safe HTML, with the words that name objects marked as present or invented."""
    pieces, end = [], 0
    for mention in explain(score)["mentions"]:
        start, stop = max(mention["start"], end), mention["end"]
        if start >= stop:
            continue
        word, node = text(score.caption[start:stop]), text(mention["node"])
        tag = "span" if mention["verdict"] == "present" else "del"
        pieces.append(text(score.caption[end:start]))
        pieces.append(f'<{tag} class="{mention["verdict"]}" title="{node}">{word}</{tag}>')
        end = stop
    return "".join([*pieces, text(score.caption[end:])]) or "<small>(an empty answer)</small>"


def _picture(path: Path | None, image: int) -> str:
    if path is None:
        return f'<div class="lost">{image}</div>'
    name, source = text(path.name), thumbnail(path)
    if source is None:
        return f'<div class="lost">{name} is not on this machine</div>'
    return f'<img src="{source}" alt="{name}" title="{name}" loading="lazy">'


def thumbnail(path: Path) -> str | None:
    """A small copy of a picture as a data address; None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            small = ImageOps.exif_transpose(opened).convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            file = io.BytesIO()
            small.quantize(256).save(file, "PNG", optimize=True)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# Provenance


def _provenance(study: Study) -> str:
    told = "".join(
        f"<h3>{_code(name)}</h3><p class='quiet'>{text(run.folder)}: {len(run.records)} answers</p>"
        f"<pre>{text(json.dumps(run.header, indent=2, ensure_ascii=False))}</pre>"
        for name, run in zip(study.names, study.comparison.runs, strict=True)
    )
    return f"<details><summary>Provenance: identity and environment of every run</summary>{told}</details>"
