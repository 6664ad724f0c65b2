"""How far a run is, and its first figure so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmfix.eval.benchmarks.benchmark import Benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import stats

Progress = Callable[[str, int, int, str], None]
"""Is told how far a run is: its label, answers on disk, answers in all, and the figure so far."""


class RunningFigure:
    """The first figure of the answers so far, as text."""

    def __init__(self, bench: Benchmark, data: Data) -> None:
        self.bench, self.data = bench, data
        self.totals: dict[str, Any] = {}

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Count more answers."""
        if not records or not self.bench.running:
            return
        answers = {record["id"]: self.bench.said(record) for record in records}
        for group in self.bench.score(self.data, answers):
            if group.is_summary:
                continue
            for name, total in stats.total(group.counts).items():
                self.totals[name] = self.totals.get(name, 0) + total

    def __str__(self) -> str:
        if not self.totals:
            return ""
        name = self.bench.running
        unit, factor = self.bench.columns[name]
        return f"{name} {factor * float(self.bench.metrics[name](self.totals)):.1f} {unit}".strip()


class PlainProgress:
    """Progress on stderr for logs: a line at the start, every ten seconds, and at the end of a run."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.last: dict[str, tuple[float, float, int]] = {}
        """Label -> when it began, when its last line was written, and what was done when it began."""

    def __call__(self, label: str, done: int, total: int, figure: str = "") -> None:
        """A `Progress`."""
        now = time.monotonic()
        began, last_line, done_before = self.last.setdefault(label, (now, -self.seconds, done))
        if now - last_line < self.seconds and done < total:
            return
        rate = (done - done_before) / (now - began) if now > began else 0.0
        remaining = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate and done < total else ""
        so_far = f", {figure} so far" if figure and done < total else ""
        sys.stderr.write(f"{label}: {done}/{total}{remaining}{so_far}\n")
        self.last[label] = (began, now, done_before)
