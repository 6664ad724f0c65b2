"""Negative controls: the same push with the method's choice taken out of it, or turned round. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import parse, spec_of


def controls_of(method: Sequence[Intervention]) -> list[tuple[Intervention, ...]]:
    """Negative controls of a method, also of one that combines several: each part replaced by its control in turn. A
    fix that is changed so is no longer what its file says."""
    method = [part for part in method if not part.traits.only_checks]
    controls: list[tuple[Intervention, ...]] = []
    for position, part in enumerate(method):
        before, after = method[:position], method[position + 1 :]
        controls += [(*before, control, *after) for control in part.controls()]
    return controls


def control_name(method: str, control: str) -> str:
    """What a negative control does otherwise than its method, both given by their labels: `select=random`.

    Returns:
        The whole label where methods are combined.
    """
    name, _, settings = control.partition(":")
    if "+" in control or name != method.partition(":")[0]:
        return control
    of_method = method.partition(":")[2].split(",")
    changed = [setting for setting in settings.split(",") if setting and setting not in of_method]
    return ",".join(changed) or control


def control_labels(label: str) -> list[str]:
    """Labels of the negative controls of a method that is given by its label.

    Returns:
        No labels where the label names no method that is known here, such as the name of a file.
    """
    try:
        return [spec_of(control) for control in controls_of(parse(label))]
    except (ValueError, TypeError):
        return []
