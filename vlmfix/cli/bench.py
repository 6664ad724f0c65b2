"""`vlmfix bench`: what methods cost on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vlmfix.cli.console import METHOD_HELP, Dtype, Json, out, progress_bar, sentences


def bench(
    shape: Annotated[
        str,
        typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-7b, internvl3-8b, or tiny."),
    ] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(min=2, help="Fewer layers than the model has, to fit the machine.")] = 4,
    method: Annotated[str, typer.Option(help=METHOD_HELP + " Separate methods with commas.")] = "var,vhr,pai",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(min=6, help="Tokens of the prompt beside those of the image.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Each measures every variant once; one more warms up.")] = 9,
    naive: Annotated[bool, typer.Option(help="Add each attention method as a naive edit of full matrices.")] = True,
    questions: Annotated[
        int, typer.Option(min=0, help="Measure instead how fast so many questions about one picture are answered.")
    ] = 0,
    dispatch: Annotated[
        bool,
        typer.Option(
            help="Measure instead what methods cost where launching operations takes longer than they do, as on a GPU: "
            "on layers so narrow that nothing else is left, eager and compiled."
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option(help="Compile the forward pass, with a cache of fixed size; leaves out naive edits.")
    ] = False,
    attention: Annotated[str, typer.Option(help="Kernel: sdpa, flash_attention_2, flex_attention, eager.")] = "sdpa",
    dtype: Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: time that this process computes, for a machine with other work.")
    ] = "wall",
    as_json: Json = False,
) -> None:
    """Measure what methods cost on this machine, on a model of real shape with random weights; nothing is loaded."""
    with sentences():
        from vlmfix.method.registry import split_methods

        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        if clock not in ("wall", "cpu"):
            raise ValueError(f"clock: expected wall or cpu, got {clock!r}")
        import torch
        from transformers.utils import logging as hf_logging

        from vlmfix.eval.bench import compare, shapes, timing
        from vlmfix.eval.bench.questions import share_questions

        hf_logging.set_verbosity_error()
        if dispatch:
            show_dispatch(split_methods(method), rounds, as_json)
            return
        methods = compare.find_methods(split_methods(method))
        model = shapes.build(shape, layers, getattr(torch, dtype), device, attention)
        inputs = shapes.build_prompt(model, shape, 1 if questions else batch_size, text_tokens)
        facts = {
            **shapes.shape_facts(shape, model, inputs),
            "rounds": rounds,
            "new_tokens": new_tokens,
            "clock": clock,
            "compiled": compiled,
            "machine": timing.machine_facts(model),
            "command": shlex.join(["vlmfix", *sys.argv[1:]]),
        }
        how: dict[str, Any] = {"new_tokens": new_tokens, "rounds": rounds, "clock": clock}
        if questions:
            own_tokens = max(text_tokens - 20, 1)
            rows = [
                share_questions(model, inputs, interventions, questions=questions, own_tokens=own_tokens, **how)
                for interventions in methods
            ]
        else:
            with progress_bar() as show:
                rows = compare.compare(
                    model,
                    inputs,
                    methods,
                    naive=naive,
                    compiled=compiled,
                    progress=lambda label, done, total: show(f"{shape} {label}", done, total, ""),
                    **how,
                )
    if as_json:
        sys.stdout.write(json.dumps({**facts, "rows": rows}) + "\n")
    elif questions:
        show_questions(rows, facts)
    else:
        show_costs(rows, facts)


UNITS = {"prefill": ("ms", 1e3), "token": ("ms", 1e3), "memory": ("MB", 1e-6)}
"""Figure -> its unit in the table, and how many of these a second or byte is."""


def show_costs(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print what `vlmfix bench` measured."""
    title = "{shape}, {layers} layers, {image_tokens} of {prompt_tokens} tokens image, batch of {batch_size}"
    table = Table("", title=Text(title.format(**facts)), title_justify="left")
    for figure, (unit, _) in UNITS.items():
        table.add_column(f"{figure}, {unit}", justify="right")
        table.add_column("ratio", justify="right")
    for row in rows:
        cells = [row["variant"]]
        for figure, (_, per_unit) in UNITS.items():
            if figure in row:
                cells += [f"{per_unit * row[figure]['median']:.1f}", f"×{with_interval(row[figure])}"]
            else:
                cells += ["", ""]
        table.add_row(*map(Text, cells))
    out().print(table)
    show_machine(facts)


def show_questions(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print how fast `vlmfix bench --questions` was."""
    from vlmfix.eval.bench.questions import PICTURE

    title = "{shape}, {layers} layers, {image_tokens} of {prompt_tokens} tokens image".format(**facts)
    ways = list(rows[0]["times_faster"])
    table = Table("questions", "method", *ways, PICTURE, title=Text(title), title_justify="left")
    for row in rows:
        cells = [str(row["questions"]), row["method"]]
        for way in ways:
            cells.append(f"{row['seconds'][way]:.2f} s, {with_interval(row['times_faster'][way])} times as fast")
        cells.append(f"{row['seconds'][PICTURE]:.2f} s, {with_interval(row[PICTURE])} of sharing")
        table.add_row(*map(Text, cells))
    out().print(table)
    show_machine(facts)


def show_dispatch(specs: list[str], rounds: int, as_json: bool) -> None:
    """Measure and print what methods add where dispatch is the limit."""
    import torch

    from vlmfix.eval.bench import dispatch, timing

    rows: dict[str, list[dict[str, Any]]] = {}
    with progress_bar() as show:
        for way in dispatch.LAYERS:

            def progress(label: str, done: int, total: int, way: str = way) -> None:
                show(f"{way} {label}", done, total, "")

            rows[way] = dispatch.measure(specs, way, rounds, progress)
    facts = {"cpu": timing.cpu_name(), "torch": torch.__version__, "rounds": rounds}
    if as_json:
        sys.stdout.write(json.dumps({**facts, "rows": rows, "command": shlex.join(["vlmfix", *sys.argv[1:]])}) + "\n")
        return
    title = "One new token where dispatch is the limit, over the untouched model"
    table = Table("", title=Text(title), title_justify="left")
    for heading in ("eager", "operations", "formula", "compiled", "breaks"):
        table.add_column(heading, justify="right")
    for eager, compiled in zip(rows["eager"], rows["compiled"], strict=True):
        cells = [eager["method"], f"×{with_interval(eager)}", f"{eager['operations']:+.1f}", f"{eager['formula']:.1f}"]
        table.add_row(*map(Text, [*cells, f"×{with_interval(compiled)}", str(compiled["graph_breaks"])]))
    out().print(table)
    ways = []
    for way, layers in dispatch.LAYERS.items():
        milliseconds = rows[way][0]["milliseconds"]
        ways.append(f"{way}: {layers} layers, {milliseconds:.1f} ms per token")
    each = rows["eager"][0]["untouched_operations"]
    out().print(
        f"{'; '.join(ways)}. Process time of one thread, medians over {rounds} rounds with 95 % intervals. "
        f"Operations: added per layer, to {each:.0f}; formula: those of the method's own stages. {facts['cpu']}, "
        f"torch {facts['torch']}.",
        markup=False,
        soft_wrap=True,
    )


def with_interval(ratio: dict[str, Any]) -> str:
    """`1.02 [0.99, 1.04]`."""
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def show_machine(facts: dict[str, Any]) -> None:
    """Print what was measured on."""
    machine = facts["machine"]
    where = machine["gpu"]
    if machine["device"] == "cpu":
        load = machine["load"][0] if machine["load"] else 0
        where = f"{machine['cpu']}, {machine['threads']} threads, load {load:.1f}"
    compiled = "compiled, " if facts["compiled"] else ""
    clock = "Time computed by the process" if facts["clock"] == "cpu" else "Wall time"
    out().print(
        f"{clock}: medians over {facts['rounds']} rounds; ratios within rounds, with 95 % intervals; "
        f"{facts['new_tokens']} new tokens, {compiled}{machine['dtype']}, {machine['attention']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, {where}.",
        markup=False,
        soft_wrap=True,
    )
