"""What each thread is doing with a wrapped model, and which generations are under way."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vlmfix.engine.passes import Pass
from vlmfix.engine.plan import Placed, can_plan
from vlmfix.engine.state import Capture, Generation, Scope
from vlmfix.engine.ticket import Ticket, stamp, ticket_of
from vlmfix.method.stages import ASK_STAGES
from vlmfix.model.geometry import Geometry

CHECKPOINTED = (
    "cannot act under gradient checkpointing, which computes the layers once more when the pass is over; switch it off "
    "(model.gradient_checkpointing_disable(), or model.eval()), or unwrap the model"
)
"""How the sentence goes on."""


def names_of(placed: Sequence[Placed]) -> str:
    """Interventions in a sentence."""
    return " and ".join(one.name or type(one).__name__ for _, one in placed)


class _Thread(threading.local):
    """What a thread is doing with the model at this moment."""

    scope: Scope | None = None
    """The call of `generate` that it is in."""
    current: Pass | None = None
    """The forward pass that it is in. `None`: the model runs untouched."""
    inside: bool = False
    """Whether a pass through one of the model's doors is under way, edited or not."""
    capture: Capture | None = None
    last: Generation | None = None
    only: frozenset[int] | None = None
    """Interventions that alone are in force."""
    last_ids: torch.Tensor | None = None
    """Token ids of the last pass outside of `generate`, where it had no cache and nothing told the prompt's end."""
    asking: bool = False
    """Whether `ask` is at work and sees to the stages that are its own."""


class Running:
    """What runs on one wrapped model: hooks and the wrapper of `generate` share it. Copies and pickles of a model take
    no running generation along."""

    def __init__(self, active: Sequence[Placed], n_memos: int):
        self.active, self.n_memos = list(active), n_memos
        self.warned_of_ask: set[int] = set()
        """Interventions of which it was said that they act in `ask` only."""
        self.forget()

    def forget(self) -> None:
        """Nothing has run yet."""
        self.thread = _Thread()
        self.owner = object()
        """Told by the caches that are filled from now on."""
        self.warned_of_parts = self.warned_of_guides = self.warned_of_loops = False
        self._last: Generation | None = None
        self._plans: dict[frozenset[int], bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active, "n_memos": self.n_memos}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.warned_of_ask = set()
        self.forget()

    def current(self) -> Pass | None:
        """The pass that this thread is in; `None`: the model runs untouched."""
        return self.thread.current

    def pass_to_edit(self, edits: Sequence[Placed]) -> Pass | None:
        """The pass that this thread is in, where these interventions have something to edit; a warning says once that
        they are not in force where a part of the model was called by itself. Raises `ValueError` where layers are
        computed again on the way back of gradients."""
        thread = self.thread
        if thread.current is None and not thread.inside and thread.capture is None:
            self._look_at_part(edits)
        return thread.current

    @torch.compiler.disable(reason="a warning is given, once")
    def _look_at_part(self, edits: Sequence[Placed]) -> None:
        """Say, of a part of the model that no door knows of, that interventions are not in force in it."""
        backward = torch._C._current_graph_task_id() != -1
        if self.warned_of_parts and not backward:
            return
        force = self.force()
        left_out = [(i, one) for i, one in edits if i in force]
        if left_out and backward:
            raise ValueError(f"{names_of(left_out)} {CHECKPOINTED}")
        if left_out:
            self.warned_of_parts = True
            warnings.warn(
                f"{names_of(left_out)} is not in force in this pass: a part of the model was called by itself, and "
                f"nothing tells it where the image is; call the model",
                stacklevel=4,
            )

    def force(self) -> frozenset[int]:
        """Interventions in force in this thread: those told by `only`, else all but those that look beforehand."""
        if self.thread.only is not None:
            return self.thread.only
        return frozenset(i for i, one in self.active if not one.acts_at("refine"))

    def plans(self, force: frozenset[int]) -> bool:
        """Whether passes over one new token go by plan, with these interventions in force."""
        if force not in self._plans:
            self._plans[force] = can_plan([(i, one) for i, one in self.active if i in force])
        return self._plans[force]

    def in_force(self) -> list[Placed]:
        """Those of `force`, in their order."""
        force = self.force()
        return [(i, one) for i, one in self.active if i in force]

    def names(self) -> str:
        """Those of `force`, in a sentence; where all of them look beforehand, these."""
        return names_of(self.in_force() or self.active)

    def warn_of_ask(self, stacklevel: int = 3) -> None:
        """Say once of methods that act in `ask` that this is no `ask`."""
        thread = self.thread
        for i, one in self.active:
            left_out = thread.only is not None and i not in thread.only
            if thread.asking or left_out or i in self.warned_of_ask or not any(map(one.acts_at, ASK_STAGES)):
                continue
            self.warned_of_ask.add(i)
            warnings.warn(
                f"{one.name or type(one).__name__} acts in vlmfix.ask only, not in a plain generate or forward pass",
                stacklevel=stacklevel,
            )

    def begun(self, batch: int, device: torch.device) -> Generation:
        """A new generation, before its first key."""
        memos: list[dict[str, Any]] = [{} for _ in range(self.n_memos)]
        return Generation(Geometry.empty(batch, device), memos, self.force())

    def ended(self, generation: Generation, cache: Any) -> None:
        """A pass of a generation is over; it left a cache, or `None`."""
        self._last = self.thread.last = generation
        if cache is not None:
            self.remember(cache, generation)

    def remember(self, cache: Any, generation: Generation) -> None:
        """A cache was filled, or is to go on, in a generation."""
        stamp(cache, Ticket(self.owner, generation))

    def generation_of(self, cache: Any) -> Generation | None:
        """The generation that filled a cache, or a cache that this one is a copy of; `None` where it was not filled
        under this wrapping."""
        ticket = ticket_of(cache)
        return ticket.generation if ticket is not None and ticket.owner is self.owner else None

    def last(self) -> Generation | None:
        """The last generation of this thread, or anyone's if this thread had none."""
        return self.thread.last or self._last

    @contextmanager
    def only(self, places: Iterable[int]) -> Iterator[None]:
        """In this thread, these interventions alone are in force for a while; none of them: the plain model."""
        thread = self.thread
        before, thread.only = thread.only, frozenset(places)
        current, thread.current = thread.current, None
        try:
            yield
        finally:
            thread.only, thread.current = before, current

    @contextmanager
    def asking(self) -> Iterator[None]:
        """`ask` is at work in this thread for a while."""
        thread = self.thread
        before, thread.asking = thread.asking, True
        try:
            yield
        finally:
            thread.asking = before

    @contextmanager
    def capturing(self, capture: Capture) -> Iterator[None]:
        """Layers note what `capture` reads, and no intervention is in force, for a while."""
        self.thread.capture = capture
        try:
            yield
        finally:
            self.thread.capture = None
