"""Something that stands in the place of one method of one module, and goes off without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from vlmfix.engine.running import Running

PENALTIES = (
    EncoderRepetitionPenaltyLogitsProcessor, ExponentialDecayLengthPenalty, RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)  # fmt: skip
"""Processors that change scores by an amount. Others rule tokens out, before or after makes no difference to them."""


class Door:
    """Stands in the place of `module.method`, on this one object: its class stays as it is."""

    def __init__(self, running: Running, module: nn.Module, method: str):
        self.running, self.module, self.method = running, module, method
        self.is_on = False

    @property
    def original(self) -> Callable[..., Any]:
        """What stood here before. It is looked up anew, since copies and pickles have modules of their own."""
        return MethodType(getattr(type(self.module), self.method), self.module) if self.own is None else self.own

    def put_on(self) -> None:
        """In the place of the module's own."""
        self.own = self.module.__dict__.get(self.method)
        self.module.__dict__[self.method] = self
        self.is_on = True

    def remove(self) -> None:
        """As it was found. Where somebody has put a function around this one since, it lets everything pass from now
        on; accelerate's hooks get what stood here before, of others a warning says it."""
        self.is_on = False
        attributes = self.module.__dict__
        if attributes.get(self.method) is self:
            del attributes[self.method]
            if self.own is not None:
                attributes[self.method] = self.own
        elif self.method == "forward" and attributes.get("_old_forward") is self:
            attributes["_old_forward"] = self.original
        else:
            warnings.warn(
                f"{type(self.module).__name__}.{self.method} was replaced while methods were in force; vlmfix's own "
                f"function stays inside what replaced it, and does nothing from now on",
                stacklevel=2,
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the module's own."""
        return self.original(*args, **kwargs)


class ClosedDoor(Door):
    """Refuses a method of the model that computes with its weights where interventions could not follow."""

    def __init__(self, running: Running, module: nn.Module, method: str, reason: str):
        super().__init__(running, module, method)
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`ValueError` while interventions are in force."""
        if self.is_on and (self.running.force() or self.running.thread.only is None):
            raise ValueError(f"{self.running.names()} cannot act {self.reason}, or unwrap the model")
        return self.original(*args, **kwargs)


CLOSED = {
    "init_continuous_batching": (
        "in continuous batching (generate_batch), which packs prompts into one row; use generate with padded prompts"
    ),
    "_replicate_for_data_parallel": (
        "in the copies that nn.DataParallel makes for each pass; use DistributedDataParallel, or one process per device"
    ),
}
"""Methods of a model that are refused, and how the sentence goes on."""


class ProcessorsDoor(Door):
    """Orders the logits processors of a generation: a `logits` stage that comes before the penalties in its release
    comes before them here."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The processors that the model's own function prepares, in that order."""
        processors = list(self.original(*args, **kwargs))
        early = [at for at, each in enumerate(processors) if getattr(each, "before_penalties", False)]
        if early:
            first = processors[: early[-1] + 1]
            penalties = [each for each in first if isinstance(each, PENALTIES)]
            for at in early:
                processors[at].penalties_follow = bool(penalties)
            first = [each for each in first if each not in penalties]
            processors = [*first, *penalties, *processors[early[-1] + 1 :]]
        return LogitsProcessorList(processors)


def other_doors(running: Running, model: nn.Module, generator: nn.Module) -> list[Door]:
    """All doors but those around passes and `generate`."""
    doors: list[Door] = []
    for method, reason in CLOSED.items():
        if hasattr(type(model), method):
            doors.append(ClosedDoor(running, model, method, reason))
    if any(one.traits.before_penalties for _, one in running.active):
        for module in dict.fromkeys((model, generator)):
            doors.append(ProcessorsDoor(running, module, "_get_logits_processor"))
    return doors
