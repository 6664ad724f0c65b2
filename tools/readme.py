"""Writes the tables and outputs of the docs anew: `make readme`.

The README's table and sentences come from the kept answers of the main job (tests/data/main_job.json.gz),
docs/main-job.md has all figures of it, docs/methods.md the table of methods.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tools.main_job import restore
from vlmfix.eval.api import compare
from vlmfix.eval.report import markdown, words
from vlmfix.eval.report.study import Study, study
from vlmfix.eval.report.tables import Cell, MethodTable, method_tables

ROOT = Path(__file__).parent.parent
MARKS = {
    "README.md": ("<!-- main job: vlmfix eval -->\n", "<!-- end of main job -->"),
    "docs/methods.md": ("<!-- methods: vlmfix methods --markdown -->\n", "<!-- end of methods -->"),
    "docs/main-job.md": ("<!-- main job: vlmfix eval -->\n", "<!-- end of main job -->"),
}


def main_job() -> list[Study]:
    """The main job's answers, scored and judged."""
    with tempfile.TemporaryDirectory() as folder:
        return [study(comparison) for comparison in compare(restore(Path(folder)))]


def short_table(one: Study) -> str:
    """A row a method; its control's first figure in the last column."""
    (table,) = method_tables(one)
    kept = [column for column in table.columns if column.head[0] != "passes"]
    rows = [["", *(" ".join(column.head) for column in kept), f"{kept[0].head[0]} of its control"]]
    for row, name in enumerate(table.names):
        if table.is_control[row]:
            continue
        followed = row + 1 < len(table.names) and table.is_control[row + 1]
        control = _short(kept[0].cells[row + 1]) if followed else ""
        rows.append([f"`{name}`", *(_short(column.cells[row]) for column in kept), control])
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _short(cell: Cell) -> str:
    if cell.difference is None:
        return cell.number
    change = f"{cell.change_number} {cell.change_interval}"
    return f"**{change}**" if cell.real else change


def blocks(studies: list[Study]) -> dict[str, str]:
    """File -> what stands between its marks."""
    from typer.testing import CliRunner

    from vlmfix.cli import app

    captions = studies[0]
    sentences = "\n".join(f"> {sentence}" for sentence in words.in_short(captions))
    return {
        "README.md": f"{short_table(captions)}\n{sentences}\n",
        "docs/methods.md": CliRunner().invoke(app, ["methods", "--markdown"]).stdout,
        "docs/main-job.md": "\n".join(markdown.method_table(table) for one in studies for table in _all(one)),
    }


def _all(one: Study) -> list[MethodTable]:
    return method_tables(one, full=True)


def main() -> None:
    """Replace what stands between the marks of each file."""
    for name, block in blocks(main_job()).items():
        begin, end = MARKS[name]
        path = ROOT / name
        before, _, rest = path.read_text("utf-8").partition(begin)
        path.write_text(before + begin + block + end + rest.partition(end)[2], "utf-8")


if __name__ == "__main__":
    main()
