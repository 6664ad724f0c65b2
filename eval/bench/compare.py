"""Methods compared with the untouched model: what is compared, and how it is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.eval.bench.naive import naively
from vlmfix.eval.bench.shapes import SINK
from vlmfix.eval.bench.timing import STATIC, Timing, measure, summary
from vlmfix.hooks import VCD
from vlmfix.method.intervention import Intervention
from vlmfix.method.prompt import Prompt
from vlmfix.method.registry import parse, spec_of
from vlmfix.method.stages import ASK_STAGES, ATTENTION_STAGES

Method = tuple[Intervention, ...]
"""Interventions that are in force together; empty for the untouched model."""
WORST_CASES = {
    "var": f"var:dims={SINK},tau=3,rho=0,min_visual_mass=0,skip_first=0,skip_last=false",
    "pai": "pai:skip_first=0",
}
"""What a bare name stands for here: every head row of every layer is edited."""
NAIVE = "naive "


@dataclass(frozen=True)
class TowerlessVCD(VCD):
    """VCD for prompts whose image tokens come without pixels, as here: the second stream gets the same tokens again, as
    many as a noised picture has. It costs what VCD costs but for the vision tower."""

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Prepare the second stream."""
        memo["seen"] = prompt.geometry.image.any(1)
        memo["blurred"] = prompt.stream_with()


def find_methods(specs: Sequence[str]) -> list[Method]:
    """Methods by name; a bare name stands for its worst case. `ValueError` for those that act in `ask` only, which is
    not what is measured here."""
    methods = []
    for spec in specs:
        interventions = parse(WORST_CASES.get(spec, spec))
        methods.append(tuple(measurable(intervention) for intervention in interventions))
    return methods


def measurable(intervention: Intervention) -> Intervention:
    """The same, or what stands for it on models without pixels."""
    if any(intervention.acts_at(stage) for stage in ASK_STAGES):
        raise ValueError(
            f"{intervention.name} acts in vlmfix.ask only; what it costs there is in the records of vlmfix eval"
        )
    if type(intervention) is VCD:
        return TowerlessVCD(**{field.name: getattr(intervention, field.name) for field in fields(intervention)})
    return intervention


def variants(
    model: Any, methods: Sequence[Method], naive: bool
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is compared, by name, and how it is put in force: the untouched model twice, which tells the noise; each
    method; and, if `naive`, each method that edits attention done the naive way."""
    in_force: dict[str, Callable[[], AbstractContextManager[Any]]] = {"none": nullcontext, "none again": nullcontext}
    for method in methods:
        if not method:
            continue
        name = "+".join(intervention.name for intervention in method)
        if name in in_force:  # the same methods with other settings
            name = spec_of(method)
        in_force[name] = Asker(model, None, method).applied
        if naive and edits_attention(method):
            in_force[NAIVE + name] = partial(naively, model, method)
    return in_force


def twin(model: Any) -> Any:
    """The same model once more, on the same weights."""
    return copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})


def compiled_variants(
    model: Any, methods: Sequence[Method], stack: ExitStack
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """The same for models whose forward pass torch compiles. Each variant is a twin on the same weights, in force until
    `stack` ends: putting a method on and off one model would compile it anew in every round."""
    twins: dict[str, Any] = {}
    # All twins run the same code, so torch counts each as one more compilation of it.
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=8 * (2 + len(methods))))
    for method in [(), (), *filter(None, methods)]:
        name = "+".join(intervention.name for intervention in method) or ("none again" if twins else "none")
        each = twins[spec_of(method) if name in twins else name] = twin(model)
        if method:
            stack.enter_context(Asker(each, None, method).applied())
        door = each.__dict__.get("forward")
        each.forward = torch.compile(each.forward)
        stack.callback(_put_back, each, door)
    return {name: partial(nullcontext, each) for name, each in twins.items()}


def _put_back(model: Any, door: Any) -> None:
    """What stood in the place of the forward pass before it was compiled."""
    del model.__dict__["forward"]
    if door is not None:
        model.__dict__["forward"] = door


def edits_attention(method: Method) -> bool:
    """Whether one of the interventions acts at a stage inside attention."""
    return any(intervention.acts_at(stage) for intervention in method for stage in ATTENTION_STAGES)


def compare(
    model: Any,
    inputs: dict[str, Tensor],
    methods: Sequence[Method],
    *,
    new_tokens: int,
    rounds: int,
    clock: str = "wall",
    naive: bool = True,
    compiled: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Measure all variants in turn; `compiled` ones with a cache of fixed size, and without naive ones beside them.
    `RuntimeError` if anything of a method stays on the model."""
    before = traces(model, inputs)
    with ExitStack() as stack:
        in_force = compiled_variants(model, methods, stack) if compiled else variants(model, methods, naive)
        timings: dict[str, list[Timing]] = {name: [] for name in in_force}
        for number in range(rounds + 1):
            for name, put_on in in_force.items():
                with put_on() as each:
                    timing = measure(each or model, inputs, new_tokens, clock, STATIC if compiled else {})
                if number > 0:  # the first round warms up
                    timings[name].append(timing)
            progress("rounds", number, rounds)
    after = traces(model, inputs)
    if not torch.equal(before[0], after[0]) or before[1] != after[1]:
        raise RuntimeError("the model is not what it was before the methods were put on and taken off")
    return [{"variant": name, **summary(measured, timings["none"])} for name, measured in timings.items()]


@torch.inference_mode()
def traces(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """What would change if anything stayed on a model: its logits, and the number of hooks on its modules."""
    logits = model(**inputs, logits_to_keep=1).logits
    n_hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return logits, n_hooks
