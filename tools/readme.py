"""Writes the README's table of methods anew, from the methods themselves: `python tools/readme.py`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from vlmfix.cli import app

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: vlmfix methods --markdown -->\n", "<!-- end of methods -->"


def main() -> None:
    """Replace what stands between the two marks."""
    table = CliRunner().invoke(app, ["methods", "--markdown"]).stdout
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + table + END + after, "utf-8")


if __name__ == "__main__":
    main()
