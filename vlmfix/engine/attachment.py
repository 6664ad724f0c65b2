"""What is attached to a wrapped model: its interventions, their hooks, and the generations under way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.engine import hooks
from vlmfix.engine.door import other_doors
from vlmfix.engine.forward import ForwardDoor, PartDoor, doors
from vlmfix.engine.generate import Generate
from vlmfix.engine.plan import Placed
from vlmfix.engine.refusals import check_company, check_model
from vlmfix.engine.running import Running
from vlmfix.engine.state import Generation
from vlmfix.method.intervention import Idle, Intervention
from vlmfix.model.anatomy import Anatomy, anatomy, core_of

ATTRIBUTE = "_vlmfix"


def attached(model: nn.Module) -> Attachment | None:
    """What is attached to the weights of a model, whichever object holds them; `None`: nothing."""
    return core_of(model).__dict__.get(ATTRIBUTE)


@dataclass
class Entry:
    """One requested intervention: what runs (`None` if idle) and what was found out about it on this model."""

    requested: Intervention
    active: Intervention | None
    facts: dict[str, Any]


Left = tuple[list[Entry], Generation | None]
"""Interventions that saw a pass, and its state."""


class Attachment:
    """All that `wrap` puts on one model: hooks, config views and the states of running generations."""

    def __init__(self, model: nn.Module, requested: tuple[Intervention, ...], processor: Any = None):
        model = core_of(model)
        self.model = model
        self.requested = requested
        self.anatomy: Anatomy = anatomy(model)
        self.entries: list[Entry] = []
        for one in requested:
            entry = _resolved(one, model, self.anatomy, processor)
            if not one.traits.only_checks:
                self.entries.append(entry)
        self._handles: list[Any] = []
        self._start_afresh()
        for _, one in self.active():
            check_model(one, self.anatomy)
        check_company(self.active())

    @classmethod
    def joint(cls, several: Sequence[Attachment]) -> Attachment:
        """All that several attachments of one model put on it, for a pass in which none of them edits a row."""
        new = copy.copy(several[0])
        new.requested = tuple(one for each in several for one in each.requested)
        new.entries = [entry for each in several for entry in each.entries]
        new._handles = []
        new._start_afresh()
        return new

    def _start_afresh(self) -> None:
        self.running = Running(self.active(), len(self.entries))
        self.wrapper = Generate(self.running, self.anatomy, self.model)
        self.kept: list[dict[Any, Any]] = [{} for _ in self.entries]
        """What each intervention keeps from one question to the next, for as long as it is on."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a wrapped model stay wrapped, but take along nothing that interventions keep."""
        return {**self.__dict__, "kept": [{} for _ in self.entries]}

    # ---- on and off -------------------------------------------------------------------------------------------------

    def active(self) -> list[Placed]:
        """Interventions that are not idle, by their place among those requested."""
        return [(i, entry.active) for i, entry in enumerate(self.entries) if entry.active is not None]

    def only(self, places: Iterable[int]) -> AbstractContextManager[None]:
        """In this thread, these interventions alone are in force for a while; none of them: the plain model."""
        return self.running.only(places)

    def asking(self) -> AbstractContextManager[None]:
        """`ask` is at work in this thread and sees to the stages that are its own."""
        return self.running.asking()

    def attach(self) -> None:
        """Put hooks and config views on; nothing stays behind if that fails half-way."""
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    def _attach(self) -> None:
        torch.compiler.reset()  # compiled code does not see that hooks came, only that they went
        for module in doors(self.model, self.anatomy):
            kind = ForwardDoor if module is self.model else PartDoor
            door = kind(self.running, self.anatomy, self.model, module)
            door.put_on()
            self._handles.append(door)
        for other in other_doors(self.running, self.model, self.anatomy.generator):
            other.put_on()
            self._handles.append(other)
        for handle in hooks.put_on(self.running, self.anatomy):
            self._handles.append(handle)
        self.wrapper.put_on()
        self._handles.append(self.wrapper)
        self.model.__dict__[ATTRIBUTE] = self

    def detach(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.model.__dict__.pop(ATTRIBUTE, None)
        self.running.forget()
        self.kept = [{} for _ in self.entries]

    # ---- generations ------------------------------------------------------------------------------------------------

    def last(self) -> Generation | None:
        """The last generation of this thread, or anyone's if this thread had none."""
        return self.running.last()

    def left(self, cache: Any) -> Left:
        """What the pass that filled a cache left here, for `go_on`."""
        return self.entries, self.running.generation_of(cache)

    def go_on(self, cache: Any, index: Tensor, left: Left) -> None:
        """Let several prompts that begin alike go on from a cache: the b-th from sample `index[b]` of a pass in which
        these interventions were in force, perhaps among others."""
        entries, generation = left
        if generation is None:  # all interventions are idle
            return
        memos = []
        for own in self.entries:
            place = next(i for i, entry in enumerate(entries) if entry is own)
            memos.append(generation.memos[place])
        begun = replace(generation, memos=memos, force=self.running.force(), plan=None, laid=False)
        self.running.remember(cache, begun.branched(index))

    def effects(self, last: Generation | None = None) -> list[dict[str, Any]]:
        """See `vlmfix.effects`: of a generation, else this thread's last one, or anyone's if this thread had none."""
        generation = last or self.last()
        reports = []
        for i, entry in enumerate(self.entries):
            samples: list[dict[str, Any]] = []
            if entry.active is not None and generation is not None:
                samples = entry.active.effects(generation.memos[i])
            reports.append({**describe(entry), "samples": samples})
        return reports


def describe(entry: Entry) -> dict[str, Any]:
    """An intervention for a record: name, settings as resolved on the model, and the facts found."""
    return {**(entry.active or entry.requested).to_json(), "facts": entry.facts}


def _resolved(one: Intervention, model: nn.Module, parts: Anatomy, processor: Any) -> Entry:
    """What an intervention is on this model; a warning says so if it is idle."""
    try:
        one.check_layers(len(parts.layers))
        active, facts = one.resolve(model, parts, processor)
    except Idle as idle:
        warnings.warn(f"{one.name or type(one).__name__} will not act on this model: {idle}", stacklevel=5)
        return Entry(one, None, {"idle": str(idle)})
    return Entry(one, active, facts)
