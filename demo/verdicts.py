"""An answer as safe HTML: its objects judged where the picture is known, doubtful ones shaded where it is not."""

from __future__ import annotations

import re
import shlex
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmfix.asking.record import Record
from vlmfix.demo.studio import Answer, known_pictures, picture_name, truth
from vlmfix.eval.scorers.chair import Mention, Vocabulary, mentions

EXISTS = re.compile(r"(?:is|are) there (?:an?|any) ([\w ]+) in (?:the|this) (?:image|picture)\?", re.IGNORECASE)
COPY = """
element.addEventListener('click', event => {
  const button = event.target.closest('button.copy');
  if (!button) return;
  navigator.clipboard.writeText(button.nextElementSibling.textContent);
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
});
"""
"""`js_on_load` of the component that shows an answer."""


def marked(text: str, objects: frozenset[str]) -> str:
    """Text as safe HTML, with the words that name objects marked as present or invented."""

    def mark(mention: Mention, word: str) -> str:
        if mention.node in objects:
            return f'<span class="there">{word}</span>'
        return f'<del class="wrong" title="not in the picture">{word}</del>'

    return _with_marks(text, mark)


def shaded(text: str, scores: list[dict[str, Any]]) -> str:
    """Text as safe HTML, with the words that name objects shaded by the share of all words that looked at the picture
    more. `scores`: `per_word` of the monitor `lookback`."""
    score_at: dict[int, float] = {}
    for word_match, of_word in zip(re.finditer(r"\S+", text), scores, strict=False):
        if of_word["score"] is not None:
            score_at[word_match.start()] = of_word["score"]

    def mark(mention: Mention, word: str) -> str:
        own = [score for start, score in score_at.items() if mention.start <= start < mention.end]
        if not own:
            return word
        lowest = min(own)
        doubt = sum(score > lowest for score in score_at.values()) / len(score_at)
        return f'<span class="doubt" style="--doubt: {doubt:.0%}" title="lookback {lowest:.2f}">{word}</span>'

    return _with_marks(text, mark)


def _with_marks(text: str, mark: Any) -> str:
    pieces, end = [], 0
    for mention in mentions(text):
        pieces += [escape(text[end : mention.start]), mark(mention, escape(text[mention.start : mention.end]))]
        end = mention.end
    return "".join([*pieces, escape(text[end:])])


def judged(record: Record, objects: frozenset[str]) -> tuple[str, list[str]]:
    """The answer, and lines on how it compares with the picture, as safe HTML.

    Yes or no to "Is there a dog in the image?" is right or wrong as a whole; after any other prompt it is left alone.
    """
    text = escape(record.text)
    yes_or_no = re.match(r"(yes|no)\b", record.text, re.IGNORECASE)
    if yes_or_no:
        question = EXISTS.fullmatch(record.prompt.strip())
        node = Vocabulary.load().node_of.get(question[1].lower()) if question else None
        if node is None:
            return text, []
        if (node in objects) == (yes_or_no[1].lower() == "yes"):
            return text, ["Right"]
        there = "" if node in objects else "not "
        return f'<del class="wrong">{text}</del>', [f'<span class="wrong">Wrong: {node} is {there}there</span>']
    named = {mention.node for mention in mentions(record.text)}
    invented = sorted(named - objects)
    missed = sorted(node for node in objects - named if mentions(node))  # CHAIR cannot hear "bus"
    lines = [f'<span class="wrong">Invented: {", ".join(invented)}</span>' if invented else "Nothing invented"]
    if "?" not in record.prompt:
        lines.append(f"Missed: {', '.join(missed)}" if missed else "Nothing missed")
    return marked(record.text, objects), lines


def notes(record: Record) -> list[str]:
    """What a visitor should know of what the methods did."""
    lines = []
    for method, effects in zip(record.method, record.effects, strict=True):
        idle = method["facts"].get("idle")
        if idle:
            lines.append(f"{method['name']} does not act on this model: {idle}.")
        elif not effects.get("acted", True) and method["name"] != "lookback":
            lines.append(f"{method['name']} changed nothing in this answer.")
    if record.finish == "length":
        lines.append(f"Cut after {len(record.token_ids)} tokens.")
    return lines


def python(answer: Answer) -> str:
    """Code that gives the answer again, in a checkout."""
    wrapping = [f"vlmfix.wrap(model, {answer.spec!r}, processor)"] if answer.chosen else []
    lines = [
        "import vlmfix",
        f"model, processor = vlmfix.load({answer.record.model!r})",
        *wrapping,
        f"print(vlmfix.ask(model, processor, {_file(answer)!r}, {answer.record.prompt!r}).text)",
    ]
    return "\n".join(lines)


def command(answer: Answer) -> str:
    """The command line that does."""
    options = ["--model", answer.record.model, "--method", answer.spec]
    return shlex.join(["vlmfix", "ask", *options, _file(answer), answer.record.prompt])


def _file(answer: Answer) -> str:
    name = picture_name(answer.picture)
    path = known_pictures().get(name or "")
    return answer.file if path is None else Path("assets", path.relative_to(str(files("vlmfix.assets")))).as_posix()


def running(spec: str, text: str) -> str:
    """A column that is at work, as safe HTML."""
    return _page(spec, "…", escape(text), [])


def done(answer: Answer) -> str:
    """A finished column, as safe HTML."""
    record, objects = answer.record, truth(answer.record)
    scores = next((effects["per_word"] for effects in record.effects[::-1] if "per_word" in effects), None)
    lines: list[str] = []
    if objects is not None:
        text, lines = judged(record, objects)
    elif scores is not None:
        text = shaded(record.text, scores)
    else:
        text = escape(record.text)
    n = len(record.token_ids)
    cost = f"{record.seconds:.2f} s · {n} token{'s' * (n != 1)} · {record.passes:g} pass{'es' * (record.passes != 1)}"
    lines = [*lines, *map(escape, notes(record))]
    code = _code("Python", python(answer)) + _code("Command line", command(answer))
    page = _page(answer.spec, cost, text or "(no words)", lines)
    return f"{page}<details><summary>Copy as code</summary>{code}</details>"


def _code(language: str, text: str) -> str:
    return f'<p>{language}</p><button type="button" class="copy">Copy</button><pre>{escape(text)}</pre>'


def _page(spec: str, cost: str, text: str, lines: list[str]) -> str:
    small = "".join(f'<p class="small">{line}</p>' for line in lines)
    return f'<p class="head"><strong>{escape(spec)}</strong><span>{cost}</span></p><p class="text">{text}</p>{small}'
