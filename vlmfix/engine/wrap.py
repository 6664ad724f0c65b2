"""`wrap` and `unwrap`: interventions come on as forward hooks, in place, and go off without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmfix.engine.attachment import Attachment, attached
from vlmfix.method.registry import Interventions, as_interventions


def wrap(model: nn.Module, interventions: Interventions, processor: Any = None) -> nn.Module:
    """Put interventions in force on a model, in place, and return the same model.

    `interventions` is a name (`"var"`), a name with settings (`"var:p=0.4,rho=0.8"`), an `Intervention`, or a list;
    they replace those in force before, are applied in the order given, and wrapping with the same again changes
    nothing. `processor` (or a tokenizer) lets methods that calibrate themselves read real text instead of random
    tokens. The model's own `generate`, `pipeline` and `save_pretrained` go on working; `unwrap` takes everything off.
    `generate` and the forward pass accept two more arguments: `image_mask` (B, T) bool, for prompts whose image tokens
    cannot be told from `input_ids`, and `prompt_end`, where what goes in holds an answer too: the number of columns
    that are prompt. A forward pass with `labels` finds it by itself: where the first label is, the answer begins.
    `model` may also stand around the weights (PEFT's adapters, what torch.compile returns): all objects that hold the
    same weights see the same interventions.
    What torch.compile made is compiled again after `wrap`; edits run between the compiled pieces.

    Raises `ValueError` for unknown methods and unfit settings, `TypeError` for a model that cannot be wrapped.
    """
    requested = as_interventions(interventions)
    before = attached(model)
    if before is not None and before.requested == requested:
        return model
    unwrap(model)
    try:
        if requested:
            Attachment(model, requested, processor).attach()
    except BaseException:
        if before is not None:
            before.attach()
        raise
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Take all interventions off: hooks, attributes and configs are exactly as they were found. Returns the model."""
    attachment = attached(model)
    if attachment is not None:
        attachment.detach()
    return model


@contextmanager
def wrapped(model: nn.Module, interventions: Interventions, processor: Any = None) -> Iterator[nn.Module]:
    """`wrap` for the length of a `with` block; what was in force before is in force again after it."""
    with in_force(model, attached(model)):
        yield wrap(model, interventions, processor)


@contextmanager
def in_force(model: nn.Module, attachment: Attachment | None) -> Iterator[None]:
    """Put an attachment on alone, or nothing, for the length of a `with` block; afterwards all is as before."""
    before = attached(model)
    try:
        if attachment is not before:
            unwrap(model)
            if attachment is not None:
                attachment.attach()
        yield
    finally:
        if attached(model) is not before:
            unwrap(model)
            if before is not None:
                before.attach()


def effects(model: nn.Module) -> list[dict[str, Any]]:
    """What each intervention in force did in the last generation (or plain forward pass) of this model.

    One dictionary per intervention: `name`, its settings as resolved, `facts` found on the model (where values came
    from, why it is idle), and `samples`, one entry per row of the batch; their keys are the method's own and stated in
    its file.
    """
    attachment = attached(model)
    return [] if attachment is None else attachment.effects()
