"""`vlmfix methods`, `protocols` and `models`: what there is."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vlmfix.cli.console import (
    Json,
    out,
    sentences,
)

if TYPE_CHECKING:
    from vlmfix.method.intervention import Intervention

WIDTH = 80
"""Columns of a page of text."""


TEXTS = ("summary", "expect", "cost", "paper")


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, with all its settings; package.module:Class for one's own.")
    ] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, such as the README's.")] = False,
) -> None:
    """List the interventions: name, stages, what they do and cost, what to expect, paper. With NAME: all about one."""
    from vlmfix.method.names import REGISTRY
    from vlmfix.method.registry import method_class

    with sentences():
        classes = [method_class(each) for each in ([name] if name else REGISTRY)]
    if as_json:
        sys.stdout.write(json.dumps([_facts(cls) for cls in classes]) + "\n")
    elif name:
        sys.stdout.write(_all_about(classes[0]))
    else:
        _show_table(classes, markdown)


def _facts(cls: type[Intervention]) -> dict[str, Any]:
    """Default settings and texts of a method, JSON-ready."""
    texts = {key: getattr(cls, key) for key in TEXTS}
    return {**cls().to_json(), **texts, "stages": cls.stages(), "needs": cls.needs()}


def _show_table(classes: Sequence[type[Intervention]], markdown: bool) -> None:
    head = ("name", "stages", "what it does", "what to expect", "cost", "paper")
    rows = []
    for cls in classes:
        texts = [getattr(cls, key) for key in TEXTS]
        rows.append((f"`{cls.name}`" if markdown else cls.name, ", ".join(cls.stages()), *texts))
    if markdown:
        for line in (head, ("---",) * len(head), *rows):
            sys.stdout.write("| " + " | ".join(line) + " |\n")
        return
    table = Table(*head, show_lines=True)
    for row in rows:
        table.add_row(*row)
    out().print(table)


def _all_about(cls: type[Intervention]) -> str:
    """One method on a page of 80 columns: what it is, then each setting with default, what it may be, and meaning."""
    from vlmfix.method.names import name_of
    from vlmfix.method.settings import settings_of

    about = (cls.__doc__ or "").split("\n\n")[0]
    lines = textwrap.wrap(f"{name_of(cls)}: {cls.summary}", WIDTH)
    lines += ["", *textwrap.wrap(" ".join(about.split()), WIDTH), ""]
    facts = {
        "paper": cls.paper, "cost": cls.cost, "expect": cls.expect, "stages": ", ".join(cls.stages()),
        "needs": ", ".join(cls.needs()),
    }  # fmt: skip
    for title, text in facts.items():
        if text:
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"{title + ':':10}", subsequent_indent=" " * 10)
    for variant, values in cls.variants.items():
        filled = ", ".join(f"{key}={value}" for key, value in values.items() if value != "")
        lines += textwrap.wrap(f"{variant}: {filled}", WIDTH, initial_indent="variant   ", subsequent_indent=" " * 10)
    settings = settings_of(cls)
    lines += ["", "Settings:" if settings else "It has no settings."]
    for setting in settings:
        default = setting.written(setting.default)
        heading = f"{setting.name}={default.lower() if setting.default is None else default}  {setting.expected}"
        lines += textwrap.wrap(heading, WIDTH, initial_indent="  ", subsequent_indent="    ")
        lines += textwrap.wrap(setting.doc.replace("`", ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def protocols(as_json: Json = False) -> None:
    """List the named set-ups of `vlmfix eval --protocol`: pictures, prompt, budget, decoding, scorer, source."""
    from dataclasses import asdict

    from vlmfix.eval.run.protocols import PROTOCOLS, published

    if as_json:
        rows = [{**asdict(p), "published": [asdict(one) for one in published(p.name)]} for p in PROTOCOLS.values()]
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    table = Table("name", "pictures", "prompt", "template", "tokens", "decoding", "scorer", "source", show_lines=True)
    for p in PROTOCOLS.values():
        cells = (p.name, p.images or "pope500", p.prompt, p.template, str(p.max_new_tokens), p.decoding)
        table.add_row(*map(Text, (*cells, ", ".join(p.scoring), p.source)))
    out().print(table)


def models(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
) -> None:
    """List the model types of the installed transformers: what can be done on each, and how image tokens are found."""
    with sentences():
        from vlmfix.engine import support

        rows = support.table()
    if as_json:
        sys.stdout.write(json.dumps([row.to_json() for row in rows]) + "\n")
        return
    if markdown:
        sys.stdout.write(support.to_markdown(rows))
        return
    shown = Table("model type", "stages", "image tokens by", "note")
    for row in sorted(rows, key=lambda row: not row.stages):
        shown.add_row(row.model_type, ", ".join(row.stages) or "-", row.image_tokens, row.note)
    out().print(shown)
    out().print(f"{sum(bool(row.stages) for row in rows)} of {len(rows)} model types are supported.")
