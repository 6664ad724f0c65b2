"""The tab Results: a leaderboard of results that come with the package, and reports of one's own run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vlmfix.demo.leaderboard import boards
from vlmfix.demo.studio import problem
from vlmfix.eval.report import html
from vlmfix.eval.report.study import study
from vlmfix.eval.run.results import HEADER, RECORDS, Run, compare

MOST = 24
"""Runs in one report."""
SHOWN = 4
"""Pictures of each kind in a report."""
THEME = "(kinds, methods) => [kinds, methods, document.body.classList.contains('dark')]"
"""The page's theme is known in the browser only."""
STYLE = """
.results { --quiet: color-mix(in srgb, var(--body-text-color) 70%, transparent);
  --line: color-mix(in srgb, var(--body-text-color) 16%, transparent); --good: #1a7f37; }
.dark .results { --good: #57c274; }
.results p { margin: .4em 0; max-width: 60em; } .results .quiet { color: var(--quiet); font-size: .88em; }
.results code { font-size: .92em; overflow-wrap: anywhere; }
.results .scroll { overflow-x: auto; max-width: 100%; }
.results table.board { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; border: 0;
  width: auto; }
.results table.board th, .results table.board td { text-align: right; padding: .4em .8em .4em 0; vertical-align: top;
  border: 0; border-bottom: 1px solid var(--line); white-space: nowrap; background: var(--body-background-fill); }
.results table.board, .results table.board tr { border: 0 !important; }
.results table.board thead th { font-weight: 600; white-space: normal; vertical-align: bottom; }
.results table.board th:first-child { text-align: left; position: sticky; left: 0; font-weight: 500; z-index: 1; }
.results table.board small { display: block; color: var(--quiet); font-size: .85em; }
.results table.board th small { display: inline; }
.results table.board tr.control { font-size: .92em; } .results table.board tr.control th { padding-left: 1em; }
.results b.good { color: var(--good); } .results b.bad { color: var(--wrong, #c62828); }
.results iframe { width: 100%; height: min(85vh, 60rem); border: 1px solid var(--line); border-radius: 8px;
  resize: vertical; background: var(--body-background-fill); color-scheme: light; }
.dark .results iframe { color-scheme: dark; }
@media (max-width: 30em) { .results table.board th:first-child { min-width: 7.5em; max-width: 8.5em;
  white-space: normal; } .results table.board tr.control th { padding-left: .4em; } }
"""


@dataclass(frozen=True)
class Found:
    """A run folder below the root."""

    folder: Path
    label: str
    """Method."""
    kind: str
    """Benchmark, model and data."""


def find(root: Path) -> tuple[list[Found], list[str]]:
    """Run folders below a root, and a sentence for each that cannot be read."""
    found, broken = [], []
    for header in sorted(root.rglob(HEADER)):
        try:
            data = Run.read_header(header.parent)
            if not (header.parent / RECORDS).is_file():
                raise ValueError(f"{header.parent} holds no answers yet")
            identity = data["identity"]
            limit = f", first {identity['limit']}" if identity.get("limit") else ""
            kind = f"{identity['benchmark']}, model {identity.get('model')}, {Path(identity['data']).name}{limit}"
            found.append(Found(header.parent, data["label"], kind))
        except (ValueError, OSError) as error:
            broken.append(str(error))
    return found, broken


def chosen(found: Sequence[Found], kinds: Sequence[str], methods: Sequence[str]) -> list[Found]:
    """Runs that pass the filters; an empty filter lets all pass."""
    return [one for one in found if (not kinds or one.kind in kinds) and (not methods or one.label in methods)]


def report(runs: Sequence[Found]) -> str:
    """The report of some runs as one page. `ValueError` if there are none or too many, or one is broken."""
    if not runs:
        raise ValueError("No run passes the filters; choose more benchmarks or methods.")
    if len(runs) > MOST:
        raise ValueError(f"These are {len(runs)} runs, and a report here takes up to {MOST}; choose fewer.")
    stamps = tuple((one.folder, (one.folder / RECORDS).stat().st_mtime_ns) for one in runs)
    return _report(stamps)


@lru_cache(maxsize=8)
def _report(stamps: tuple[tuple[Path, int], ...]) -> str:
    runs = sorted((Run.read(folder) for folder, _ in stamps), key=lambda run: not run.untouched)
    return html.page([study(one) for one in compare(runs)], gallery=SHOWN, sample=SHOWN)


def framed(page: str, dark: bool) -> str:
    """A whole page inside this one, without scripts, with a style of its own, and with this page's theme."""
    page = page.replace("@media (prefers-color-scheme: dark)", "@media all" if dark else "@media not all", 1)
    return f'<iframe sandbox title="Report of the chosen runs" srcdoc="{escape(page)}"></iframe>'


def tab(root: str | Path = "runs") -> None:
    """Build the tab's content inside a `gr.Blocks`. Reports are of run folders below `root`, and of nothing else."""
    root = Path(root)
    every = boards()
    first = next(iter(every))
    gr.HTML(f"<style>{STYLE}</style><h3>Leaderboard</h3>", elem_classes="results")
    with gr.Row():
        board = gr.Dropdown(list(every), label="Benchmark", min_width=220)
        metric = gr.Dropdown(list(every[first].columns), label="Sorted by", min_width=150)
    table = gr.HTML(every[first].html(next(iter(every[first].columns))), elem_classes="results")
    gr.HTML("<h3>Your runs</h3>", elem_classes="results")
    with gr.Row():
        kinds = gr.CheckboxGroup([], label="Benchmarks", min_width=260)
        methods = gr.CheckboxGroup([], label="Methods", min_width=260)
    with gr.Row():
        show = gr.Button("Show the report", variant="primary")
        again = gr.Button("Read the folder again")
    dark = gr.Checkbox(visible=False)
    said, page = (gr.HTML(elem_classes="results") for _ in range(2))

    def pick(title: str) -> tuple[Any, str]:
        """Another board, sorted by its first metric."""
        names = list(every[title].columns)
        return gr.update(choices=names, value=names[0]), every[title].html(names[0])

    def sort(title: str, metric: str) -> Any:
        return every[title].html(metric) if metric in every[title].columns else gr.skip()

    def list_runs() -> tuple[Any, ...]:
        """What there is below the root now."""
        found, broken = find(root)
        groups = [sorted({getattr(one, name) for one in found}) for name in ("kind", "label")]
        lines = [f"{len(found)} runs below {root}; no tick means all of them."]
        if not found:
            lines = [f"There are no runs below {root}. Make some: vlmfix eval --output {root}"]
        told = "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)
        told += "".join(problem(sentence) for sentence in broken)
        return *(gr.update(choices=group, value=[], visible=bool(group)) for group in groups), told

    def make(kinds: list[str], methods: list[str], dark: bool) -> str:
        try:
            return framed(report(chosen(find(root)[0], kinds, methods)), dark)
        except (ValueError, OSError) as error:
            return problem(error)

    board.input(pick, board, [metric, table], api_visibility="private")
    metric.input(sort, [board, metric], table, api_visibility="private")
    show.click(make, [kinds, methods, dark], page, api_name="report", js=THEME)
    listed = [kinds, methods, said]
    gr.on(None, list_runs, None, listed, api_visibility="private")  # when the page loads
    again.click(list_runs, None, listed, api_visibility="private")
