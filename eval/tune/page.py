"""What tuning found, as a page: in words, the frontier, what was confirmed and what was tried."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path

from vlmfix.eval.report import plots
from vlmfix.eval.scorers.stats import Difference, total
from vlmfix.eval.tune.tune import Confirmed, Tuned

NAMES = {
    "recall": "recall",
    "repetition": "captions that repeat themselves",
    "words": "words",
    "cost": "passes a token",
}


def in_words(tuned: Tuned) -> list[str]:
    """The outcome in a few sentences."""
    goal, winner, facts = tuned.goal, tuned.winner, tuned.facts
    pictures = facts["pictures"]
    n_tried = sum(bool(trial.n) for trial in tuned.race.trials)
    effort = (
        f"{n_tried} candidates were tried on up to {pictures['search']} pictures: {facts['answers']} answers in "
        f"{facts['answer_seconds'] / 60:.0f} minutes, {tuned.seconds / 60:.0f} minutes in all; truth: {tuned.labels}."
    )
    if winner is None:
        return ["None of the candidates was ahead of the untouched model within the limits.", effort]
    difference = winner.verdict.differences[goal.objective]
    value, low, high = (number or 0.0 for number in (difference.value, difference.low, difference.high))
    before = winner.verdict.figures[goal.objective] - value
    beyond = [f"{NAMES[name]} by {excess:.1f}" for name, excess in winner.verdict.broken.items()]
    kept = [NAMES[name] for name in (*goal.figures[1:], "cost") if name not in winner.verdict.broken]
    lines = [
        f"Winner: {winner.candidate.title}. On {pictures['confirm']} pictures that nothing was chosen on, "
        f"{goal.objective} {before:.1f} -> {before + value:.1f} ({value:+.1f} [{low:+.1f}, {high:+.1f}]).",
        f"Within the limits there: {', '.join(kept) or 'nothing'}; beyond: {', '.join(beyond) or 'nothing'}.",
    ]
    if tuned.control is not None:
        other = tuned.control.verdict.differences[goal.objective]
        lines.append(f"Its negative control: {other.value or 0:+.1f} [{other.low or 0:+.1f}, {other.high or 0:+.1f}].")
    if tuned.fix is None:
        lines.append("The winner is not told apart from the untouched model there, so no fix is written.")
    return [*lines, effort]


def write_page(tuned: Tuned, folder: Path) -> None:
    """`index.html` in the folder: no script, nothing loaded."""
    style = (files("vlmfix.eval.report") / "templates" / "page.css").read_text("utf-8")
    title = f"vlmfix tune: {tuned.facts['model']}"
    words = "".join(f"<p>{escape(line)}</p>" for line in in_words(tuned))
    body = [
        f"<h1>{escape(title)}</h1>",
        words,
        _frontier(tuned),
        "<h2>Confirmed</h2>",
        _confirmed(tuned, _shown(tuned)),
    ]
    body += ["<h2>Tried</h2>", _tried(tuned), f"<p>Made by: <code>{escape(str(tuned.facts['command']))}</code></p>"]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"><meta name=\"viewport\" "
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{style}</style></head>'
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(f"{head}<body><main>{''.join(body)}</main></body></html>\n", "utf-8")


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _confirmed(tuned: Tuned, shown: list[tuple[str, Confirmed]]) -> str:
    figures = tuned.goal.figures
    rows = []
    for name, each in shown:
        p = "" if each.p_holm is None else f"{each.p_holm:.4f}"
        rows.append(
            [name, each.candidate.title, *(_cell(each, figure) for figure in figures), f"{each.verdict.cost:.2f}", p]
        )
    return _table(["", "methods", *figures, "passes a token", "p (Holm)"], rows)


def _cell(each: Confirmed, figure: str) -> str:
    difference = each.verdict.differences[figure]
    if difference.value is None:
        return ""
    return (
        f"{each.verdict.figures[figure]:.1f} ({difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}])"
    )


def _tried(tuned: Tuned) -> str:
    race, goal = tuned.race, tuned.goal
    rows = []
    ran = [trial for trial in race.trials if trial.n]
    ran.sort(key=lambda trial: (-trial.n, race.verdict(trial).score))
    for trial in ran:
        verdict = race.verdict(trial)
        changes = [f"{verdict.differences[name].value or 0:+.1f}" for name in goal.figures]
        rows.append([trial.candidate.title, str(trial.n), *changes, f"{verdict.cost:.2f}", trial.out or "in the final"])
    rows += [
        [trial.candidate.title, "0", *[""] * (len(goal.figures) + 1), trial.out] for trial in race.trials if not trial.n
    ]
    return _table(["methods", "pictures", *goal.figures, "passes a token", ""], rows)


def _frontier(tuned: Tuned) -> str:
    """CHAIR_S against recall of all that was tried on some pictures, beside the untouched captions cut short."""
    goal, race = tuned.goal, tuned.race
    if not goal.bench.describes or not plots.available():
        return ""
    course = race.course
    last = len(course.blocks) - 1
    run, part = course.run((), last), course.blocks[last]
    against = part.bench.against(part.data, part.bench.score(part.data, {r["id"]: r["text"] for r in run.records}))
    metrics, sums = goal.bench.metrics, total(tuned.base.counts)
    recall, chair_s = (100 * float(metrics[name](sums)) for name in ("recall", goal.objective))

    def moved(value: float, difference: Difference) -> tuple[float, float, float]:
        low, high = difference.low or 0.0, difference.high or 0.0
        return value + (difference.value or 0.0), value + low, value + high

    tried = []
    for trial in race.trials:
        if trial.n:
            changes = race.verdict(trial).differences
            x, y = moved(recall, changes["recall"])[0], moved(chair_s, changes[goal.objective])[0]
            tried.append((x, y, trial.n))
    confirmed = []
    for name, each in _shown(tuned):
        changes = each.verdict.differences
        place = (moved(recall, changes["recall"]), moved(chair_s, changes[goal.objective]))
        confirmed.append((f"{name} {each.candidate.title}", *place))
    return plots.frontier(None if against is None else against.cut(), (recall, chair_s), tried, confirmed)


def _shown(tuned: Tuned) -> list[tuple[str, Confirmed]]:
    """The winner, the next ones and the control."""
    names = ["winner", *(f"{place}." for place in range(2, len(tuned.finalists) + 1))]
    shown = list(zip(names, tuned.finalists, strict=False))
    return shown + ([("control", tuned.control)] if tuned.control else [])
