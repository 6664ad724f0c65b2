"""`vlmfix methods`, `protocols` and `models`: what there is."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    """List the interventions, a line each. With NAME: all about one, with every setting."""
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
    if not markdown:
        _print_lines([(cls.name, cls.summary) for cls in classes])
        out().print("\nAll about one: vlmfix methods NAME", markup=False)
        return
    head = ("name", "stages", "what it does", "what to expect", "cost", "paper")
    rows = []
    for cls in classes:
        texts = [getattr(cls, key) for key in TEXTS]
        rows.append((f"`{cls.name}`", ", ".join(cls.stages()), *texts))
    for line in (head, ("---",) * len(head), *rows):
        sys.stdout.write("| " + " | ".join(line) + " |\n")


def _print_lines(rows: Sequence[tuple[str, ...]]) -> None:
    """One line an entry, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        out().print("  ".join(cells).rstrip(), markup=False, soft_wrap=True)


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


def protocols(
    name: Annotated[
        str | None, typer.Argument(help="One set-up, with its prompt, template, scorer and source.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the named set-ups of `vlmfix eval --protocol`, a line each. With NAME: all about one."""
    from dataclasses import asdict

    from vlmfix.eval.run.protocols import PROTOCOLS, find_protocol, published

    with sentences():
        one = find_protocol(name)
    chosen = list(PROTOCOLS.values()) if one is None else [one]
    if as_json:
        rows = [{**asdict(p), "published": [asdict(one) for one in published(p.name)]} for p in chosen]
        sys.stdout.write(json.dumps(rows) + "\n")
    elif name is None:
        _print_lines(
            [
                (p.name, p.benchmark, f"{p.max_new_tokens} tokens", p.decoding, p.source.partition(";")[0])
                for p in chosen
            ]
        )
        out().print("\nAll about one: vlmfix protocols NAME", markup=False)
    else:
        for p in chosen:
            facts = {
                "benchmark": p.benchmark, "pictures": p.images or "pope500", "prompt": p.prompt, "template": p.template,
                "tokens": str(p.max_new_tokens), "decoding": p.decoding, "scorer": ", ".join(p.scoring),
                "source": p.source,
            }  # fmt: skip
            out().print(p.name, markup=False)
            for title, text in facts.items():
                lines = textwrap.wrap(text, WIDTH, initial_indent=f"  {title:11}", subsequent_indent=" " * 13)
                out().print("\n".join(lines), markup=False, soft_wrap=True)


def models(
    name: Annotated[str | None, typer.Argument(help="One model type, such as llava, with all that is known.")] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
) -> None:
    """List the model types of the installed transformers, a line each: what can be done on them. With NAME: stages,
    how image tokens are found, and why not."""
    with sentences():
        from vlmfix.engine import support
        from vlmfix.method.settings import did_you_mean

        if name not in (None, *support.MODEL_TYPES):
            raise ValueError(f"unknown model type {name!r}; {did_you_mean(str(name), support.MODEL_TYPES)}")
        rows = support.table() if name is None else support.table((name,))
    if as_json:
        sys.stdout.write(json.dumps([row.to_json() for row in rows]) + "\n")
    elif markdown:
        sys.stdout.write(support.to_markdown(rows))
    elif name is not None:
        (row,) = rows
        facts = {"stages": ", ".join(row.stages) or "none", "image tokens by": row.image_tokens, "note": row.note}
        out().print(row.model_type, markup=False)
        for title, text in facts.items():
            if text:
                lines = textwrap.wrap(text, WIDTH, initial_indent=f"  {title:16}", subsequent_indent=" " * 18)
                out().print("\n".join(lines), markup=False, soft_wrap=True)
    else:
        most = max((row.stages for row in rows), key=len)
        ordered = sorted(rows, key=lambda row: not row.stages)
        _print_lines([(row.model_type, _can_do(row.stages, most)) for row in ordered])
        supported = sum(bool(row.stages) for row in rows)
        out().print(f"\n{supported} of {len(rows)} model types are supported. All about one: vlmfix models NAME")


def _can_do(stages: Sequence[str], most: Sequence[str]) -> str:
    """`every stage`, `all but layer inputs`, `not supported`."""
    missing = [stage for stage in most if stage not in stages]
    if not stages:
        return "not supported"
    return f"all but {', '.join(missing)}" if missing else "every stage"
