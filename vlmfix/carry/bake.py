"""`bake`: what is in force on a model, folded into its weights."""

from __future__ import annotations

from torch import nn

from vlmfix.engine.attachment import Attachment, attached
from vlmfix.engine.wrap import unwrap
from vlmfix.model.anatomy import core_of
from vlmfix.model.gains import Gains, fold


def bake(model: nn.Module) -> nn.Module:
    """Fold the methods in force into the weights, in place, take their hooks off, and return the same model.

    What comes out is a model of transformers like any other: `save_pretrained` keeps it, and nothing at run time knows
    of this library. Gains that are powers of two are exact in every type of number, others up to one rounding of the
    weights. One thing differs from the wrapped model: prompts without a picture change, too.

    Raises `ValueError`, with what to do instead, for methods that no weights can hold, for quantised projections and
    for adapters in place; then model and methods stay as they were.
    """
    attachment = attached(model)
    if attachment is None:
        raise ValueError("nothing is in force on this model, so there is nothing to bake; wrap it first (vlmfix.wrap)")
    gains = gains_in_force(attachment)
    fold(core_of(model), gains)
    return unwrap(model)


def gains_in_force(attachment: Attachment) -> Gains:
    """The gains of all methods together. `ValueError` where a method is more than that."""
    gains: Gains = {}
    for _, method in attachment.active():
        if method.traits.only_checks:  # a fix file's look at the model
            continue
        of_method = method.static(attachment.anatomy)
        if of_method is None:
            name = method.name or type(method).__name__
            raise ValueError(
                f"{name}: what it does depends on the picture or on the answer, so no weights can hold it; bake "
                f"constant gains of heads (headgain:head_list=FILE, a list by vlmfix heads), or serve {name} as it is "
                f"(vlmfix serve --method {name})"
            )
        for layer, factors in of_method.items():
            before = gains.get(layer, [1.0] * len(factors))
            gains[layer] = [old * new for old, new in zip(before, factors, strict=True)]
    if not gains:
        raise ValueError("no method acts on this model, so there is nothing to bake")
    return gains
