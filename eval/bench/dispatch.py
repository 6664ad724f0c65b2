"""What methods add to a decoding step where dispatch, not arithmetic, is the limit: as on a GPU, where the kernels of a
layer take less time than launching them. The layers are so narrow that hardly anything else is left.

Two ways of running: eager with a cache that grows, and compiled with a static cache. Times are of one CPU thread.
Counts are the same on every machine: operations that a method adds per layer and token, those that its formula itself
is made of, and breaks that it brings into the graph of the compiled model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfix.engine.attachment import attached
from vlmfix.engine.plan import Plan
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.bench import shapes
from vlmfix.eval.bench.compare import Method, find_methods
from vlmfix.eval.bench.timing import STATIC, ratio
from vlmfix.method.registry import spec_of

SHAPE = "narrow"
LAYERS = {"eager": 32, "compiled": 8}
"""By way of running: a compiled layer takes long to compile."""
SHORT, LONG = 8, 40
"""Lengths of answers; what lies between is time per token, without the prefill."""


class Operations(TorchDispatchMode):
    """Counts operations, and apart from that those of stages."""

    def __init__(self) -> None:
        super().__init__()
        self.n = self.n_of_formulas = 0
        self.in_formula = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        self.n_of_formulas += self.in_formula
        return func(*args, **(kwargs or {}))


class Counted:
    """An intervention in a plan, whose stages are counted apart."""

    def __init__(self, one: Any, operations: Operations):
        self.one, self.operations = one, operations

    def __getattr__(self, stage: str) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.operations.in_formula = True
            new = getattr(self.one, stage)(*args)
            self.operations.in_formula = False
            return new

        return counted


@torch.no_grad()
def operations(model: Any, prompt: dict[str, Any], method: Method) -> Operations:
    """The operations of a pass over one new token."""
    counts = Operations()
    newest = prompt["input_ids"][:, -1:]
    with wrapped(model, method), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a forward pass by itself is without the choice of tokens
        cache = model(**prompt, use_cache=True).past_key_values
        model(input_ids=newest, past_key_values=cache)
        attachment = attached(model)
        generation = None if attachment is None else attachment.last()
        if generation is not None and isinstance(generation.plan, Plan):
            edits = generation.plan.edits
            for place in edits:
                edits[place] = tuple((Counted(one, counts), site) for one, site in edits[place])  # type: ignore[misc]
        with counts:
            model(input_ids=newest, past_key_values=cache)
    return counts


def milliseconds_per_token(model: Any, prompt: dict[str, Any], settings: dict[str, Any]) -> float:
    """Process time per token of one answer."""
    seconds = []
    for length in (SHORT, LONG):
        start = time.process_time()
        model.generate(**prompt, max_new_tokens=length, do_sample=False, pad_token_id=0, **settings)
        seconds.append(time.process_time() - start)
    return (seconds[1] - seconds[0]) / (LONG - SHORT) * 1e3


def find(specs: Sequence[str], way: str) -> list[Method]:
    """Methods by name; a bare name stands for its worst case, edits in every layer."""
    last = LAYERS[way] - 1
    heads = "/".join(f"L{layer}H1" for layer in range(LAYERS[way]))
    worst = {"vhr": f"vhr:layers=0-{last}", "hgai": f"hgai:layers=0-{last}", "headgain": f"headgain:head_list={heads}"}
    return find_methods([worst.get(spec, spec) for spec in specs])


def measure(
    specs: Sequence[str], way: str, rounds: int, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """A row per method: time per token, its ratio to the untouched model with an interval, and counts. The first row is
    the untouched model against itself: the noise."""
    names = ["untouched again", *specs]
    rows = []
    for i, (name, method) in enumerate(zip(names, [(), *find(specs, way)], strict=True)):
        progress(name, i, len(names))
        rows.append({"method": name, "settings": spec_of(method), **_compared(method, way, rounds)})
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compared(method: Method, way: str, rounds: int) -> dict[str, Any]:
    plain, model = (shapes.build(SHAPE, LAYERS[way], torch.float32, "cpu") for _ in range(2))
    prompt = shapes.build_prompt(plain, SHAPE, 1, 8)
    counts = operations(plain, prompt, ()), operations(model, prompt, method)
    settings = STATIC if way == "compiled" else {}
    breaks = []
    times: list[list[float]] = [[], []]
    with _one_thread(), wrapped(model, method):
        both = (plain, model)
        doors = [each.__dict__.get("forward") for each in both]
        if way == "compiled":
            for each in both:
                each.forward = torch.compile(each.forward)
        for each in both:
            before = _graph_breaks()
            for length in (SHORT, LONG):
                for _ in range(2):
                    each.generate(**prompt, max_new_tokens=length, do_sample=False, pad_token_id=0, **settings)
            breaks.append(_graph_breaks() - before)
        for _ in range(rounds):
            for each, found in zip(both, times, strict=True):
                found.append(milliseconds_per_token(each, prompt, settings))
        for each, door in zip(both, doors, strict=True):
            each.__dict__.pop("forward", None)
            if door is not None:
                each.__dict__["forward"] = door
    n_layers = LAYERS[way]
    return {
        "milliseconds": sorted(times[1])[rounds // 2],
        **ratio(times[1], times[0]),
        "operations": (counts[1].n - counts[0].n) / n_layers,
        "formula": counts[1].n_of_formulas / n_layers,
        "untouched_operations": counts[0].n / n_layers,
        "graph_breaks": max(breaks[1] - breaks[0], 0) if method else 0,
    }


def _graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())
