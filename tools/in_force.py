"""What is in force when: asks every way to call a wrapped model, stage by stage, and writes docs/in-force.md.

    python tools/in_force.py            # writes the page; a few minutes, most of them for compiled code
    python tools/in_force.py --quick    # leaves the rows of compiled code as they stand on the page

tests/contract/ways.py holds the ways and a tiny method for each stage; tests/contract/test_in_force.py compares.
"""

import logging
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/in-force.md"
sys.path.insert(0, str(ROOT))

from tests.contract import ways  # noqa: E402

MARKS = {ways.IN_FORCE: "✓", ways.REFUSED: "✗", ways.SAID: "!", ways.NOT_POSSIBLE: "–"}
HEAD = """# What is in force when

Wherever the wrapped weights compute, a method acts exactly as in `generate`, or one sentence says that it does not.
This page is no promise written by hand: `make in-force` runs each cell on a tiny model, with a small method that acts
at that stage, and `tests/contract/test_in_force.py` runs it again. What is compared are the log-probabilities of one
fixed answer, token by token, with those that `generate` gives under the method (to 2e-4).

- ✓ in force: as in `generate`.
- ✗ refused: a `ValueError` or `TypeError`, with the numbered sentence below.
- ! said once: not in force, or not known to be; one warning says so, with the numbered sentence below.
- – not possible: transformers itself cannot do it with this model, wrapped or not.

Columns are the stages of `vlmfix/method/stages.py`; a method acts at one or several of them (`vlmfix methods NAME`).
`begin`, `layer_input` and `survey` only look: their methods edit by what they see, and need the whole prompt in one
pass. `refine` and `decode` act in `vlmfix.ask` alone. A method that acts at several stages is refused where one is.

"""


def verdicts(known):
    """Way -> stage -> mark and sentence; those of `known` are not asked again."""
    table = {}
    for way in ways.WAYS:
        table[way] = known.get(way) or {}
        for stage in () if way in known else ways.METHODS:
            outcome, sentence = ways.verdict(way, stage)
            table[way][stage] = MARKS[outcome], sentence
    return table


def to_markdown(table):
    """The page."""
    sentences, rows = {}, []
    for way, cells in table.items():
        row = []
        for mark, sentence in cells.values():
            number = sentences.setdefault(sentence, len(sentences) + 1) if sentence else ""
            row.append(f"{mark}{number}")
        rows.append(f"| {way} | {' | '.join(row)} |")
    columns = [f"`{stage}`" for stage in ways.METHODS]
    lines = [
        f"| way to call | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
        *rows,
        "",
        "## Sentences",
        "",
    ]
    lines += [f"{number}. {sentence}" for sentence, number in sentences.items()]
    return HEAD + "\n".join(lines) + "\n"


def parsed(page):
    """Way -> stage -> mark and sentence, from the page."""
    table, sentences = {}, {}
    for line in page.splitlines():
        number, _, sentence = line.partition(". ")
        if number.isdigit():
            sentences[number] = sentence
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 1 + len(ways.METHODS) and cells[1][0] in MARKS.values():
            way, *marks = cells
            table[way] = {}
            for stage, mark in zip(ways.METHODS, marks, strict=True):
                table[way][stage] = mark[0], sentences.get(mark[1:], "")
    return table


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    known = {}
    if "--quick" in sys.argv:
        known = {way: cells for way, cells in parsed(PAGE.read_text()).items() if way in ways.SLOW}
    PAGE.write_text(to_markdown(verdicts(known)))
