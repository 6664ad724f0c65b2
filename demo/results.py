"""The tab Results: a leaderboard of results that come with the package, and reports of one's own run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from vlmfix.demo.leaderboard import boards
from vlmfix.demo.studio import problem
from vlmfix.eval.report import html
from vlmfix.eval.report.study import study
from vlmfix.eval.run.results import HEADER, RECORDS, Run, compare

MOST_RUNS = 24
"""Runs in one report."""
PICTURES = 4
"""Pictures of each kind in a report."""
THEME = "(kinds, methods) => [kinds, methods, document.body.classList.contains('dark')]"
"""The page's theme is known in the browser only."""
STYLE = (files("vlmfix.demo") / "results.css").read_text("utf-8")


@dataclass(frozen=True)
class RunFolder:
    """A run folder below the root."""

    folder: Path
    label: str
    """Method."""
    kind: str
    """Benchmark, model and data."""


def find(root: Path) -> tuple[list[RunFolder], list[str]]:
    """Run folders below a root, and a sentence for each that cannot be read."""
    folders, broken = [], []
    for header_file in sorted(root.rglob(HEADER)):
        try:
            folders.append(_run_folder(header_file.parent))
        except (ValueError, OSError) as error:
            broken.append(str(error))
    return folders, broken


def _run_folder(folder: Path) -> RunFolder:
    header = Run.read_header(folder)
    if not (folder / RECORDS).is_file():
        raise ValueError(f"{folder} holds no answers yet")
    identity = header["identity"]
    limit = f", first {identity['limit']}" if identity.get("limit") else ""
    kind = f"{identity['benchmark']}, model {identity.get('model')}, {Path(identity['data']).name}{limit}"
    return RunFolder(folder, header["label"], kind)


def chosen(runs: Sequence[RunFolder], kinds: Sequence[str], methods: Sequence[str]) -> list[RunFolder]:
    """Runs that pass the filters; an empty filter lets all pass."""
    of_kinds = [run for run in runs if not kinds or run.kind in kinds]
    return [run for run in of_kinds if not methods or run.label in methods]


def report(runs: Sequence[RunFolder]) -> str:
    """The report of some runs as one page. `ValueError` if there are none or too many, or one is broken."""
    if not runs:
        raise ValueError("No run passes the filters; choose more benchmarks or methods.")
    if len(runs) > MOST_RUNS:
        raise ValueError(f"These are {len(runs)} runs, and a report here takes up to {MOST_RUNS}; choose fewer.")
    return _report(tuple((run.folder, (run.folder / RECORDS).stat().st_mtime_ns) for run in runs))


@lru_cache(maxsize=8)
def _report(folders_and_times: tuple[tuple[Path, int], ...]) -> str:
    """Made anew when a run has gone on."""
    runs = sorted((Run.read(folder) for folder, _ in folders_and_times), key=lambda run: not run.untouched)
    return html.page([study(comparison) for comparison in compare(runs)], gallery=PICTURES, sample=PICTURES)


def framed(page: str, dark: bool) -> str:
    """A whole page inside this one, without scripts, with a style of its own, and with this page's theme."""
    page = page.replace("@media (prefers-color-scheme: dark)", "@media all" if dark else "@media not all", 1)
    return f'<iframe sandbox title="Report of the chosen runs" srcdoc="{escape(page)}"></iframe>'


def tab(root: str | Path = "runs") -> None:
    """Build the tab's content inside a `gr.Blocks`. Reports are of run folders below `root`, and of nothing else."""
    gr.HTML(f"<style>{STYLE}</style><h3>Leaderboard</h3>", elem_classes="results")
    _leaderboard()
    gr.HTML("<h3>Your runs</h3>", elem_classes="results")
    _own_runs(Path(root))


def _leaderboard() -> None:
    by_title = boards()
    first_title = next(iter(by_title))
    metrics = list(by_title[first_title].columns)
    with gr.Row():
        board = gr.Dropdown(list(by_title), label="Benchmark", min_width=220)
        metric = gr.Dropdown(metrics, label="Sorted by", min_width=150)
    table = gr.HTML(by_title[first_title].html(metrics[0]), elem_classes="results")

    def pick(title: str) -> tuple[Any, str]:
        """Another board, sorted by its first metric."""
        names = list(by_title[title].columns)
        return gr.update(choices=names, value=names[0]), by_title[title].html(names[0])

    def sort(title: str, metric: str) -> Any:
        """The same board, sorted by another metric."""
        return by_title[title].html(metric) if metric in by_title[title].columns else gr.skip()

    board.input(pick, board, [metric, table], api_visibility="private")
    metric.input(sort, [board, metric], table, api_visibility="private")


def _own_runs(root: Path) -> None:
    with gr.Row():
        kinds = gr.CheckboxGroup([], label="Benchmarks", min_width=260)
        methods = gr.CheckboxGroup([], label="Methods", min_width=260)
    with gr.Row():
        show = gr.Button("Show the report", variant="primary")
        again = gr.Button("Read the folder again")
    dark = gr.Checkbox(visible=False)
    summary, page = (gr.HTML(elem_classes="results") for _ in range(2))

    def list_runs() -> tuple[Any, ...]:
        """What there is below the root now."""
        runs, broken = find(root)
        choices = [sorted({run.kind for run in runs}), sorted({run.label for run in runs})]
        sentence = f"{len(runs)} runs below {root}; no tick means all of them."
        if not runs:
            sentence = f"There are no runs below {root}. Make some: vlmfix eval --output {root}"
        paragraphs = [f'<p class="quiet">{escape(sentence)}</p>', *map(problem, broken)]
        groups = [gr.update(choices=names, value=[], visible=bool(names)) for names in choices]
        return *groups, "".join(paragraphs)

    def make(kinds: list[str], methods: list[str], dark: bool) -> str:
        """The report of the chosen runs, or what is wrong with them."""
        try:
            return framed(report(chosen(find(root)[0], kinds, methods)), dark)
        except (ValueError, OSError) as error:
            return problem(error)

    show.click(make, [kinds, methods, dark], page, api_name="report", js=THEME)
    listed = [kinds, methods, summary]
    gr.on(None, list_runs, None, listed, api_visibility="private")  # when the page loads
    again.click(list_runs, None, listed, api_visibility="private")
