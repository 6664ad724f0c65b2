"""`vlmfix methods`, `protocols` and `models`: what there is."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vlmfix.cli.console import (
    Json,
    out,
    sentences,
)


def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, such as the README's.")] = False,
) -> None:
    """List the interventions: name, stages, what they do and cost, what to expect, paper."""
    from vlmfix.hooks import REGISTRY
    from vlmfix.method.registry import method_class

    classes, texts = [method_class(name) for name in REGISTRY], ("summary", "expect", "cost", "paper")
    if as_json:
        rows = [
            {**c().to_json(), **{k: getattr(c, k) for k in texts}, "stages": c.stages(), "needs": c.needs()}
            for c in classes
        ]
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    head = ("name", "stages", "what it does", "what to expect", "cost", "paper")
    cells = [(c.name, ", ".join(c.stages()), *(getattr(c, k) for k in texts)) for c in classes]
    if markdown:
        lines = [head, ("---",) * len(head), *((f"`{name}`", *rest) for name, *rest in cells)]
        sys.stdout.writelines("| " + " | ".join(line) + " |\n" for line in lines)
        return
    table = Table(*head, show_lines=True)
    for row in cells:
        table.add_row(*row)
    out().print(table)


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
