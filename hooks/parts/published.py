"""Head lists that authors published, for one checkpoint each; `assets/heads/published.json` has the sources."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from vlmfix.model.anatomy import Anatomy

NAMES = {
    "llava-1.5-7b": ("llava-1.5-7b", "llava-v1.5-7b"),
    "llava-1.5-13b": ("llava-1.5-13b", "llava-v1.5-13b"),
    "llava-v1.6-34b": ("llava-v1.6-34b", "llava-1.6-34b"),
}
"""What a checkpoint's own name contains, whatever folder or owner stands before it."""


def published(method: str, model: nn.Module, anatomy: Anatomy) -> tuple[str, dict[str, Any]]:
    """The checkpoint that a loaded model is, and the lists of a method for it. `ValueError` where there are none: heads
    of one checkpoint mean nothing in another, be it of the same shape."""
    checkpoints = json.loads((files("vlmfix.assets") / "heads/published.json").read_text("utf-8"))["checkpoints"]
    name = str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2].lower()
    shape = [len(anatomy.layers), anatomy.n_heads]
    with_lists = [known for known in checkpoints if method in checkpoints[known]]
    for known in with_lists:
        if any(part in name for part in NAMES[known]) and checkpoints[known]["shape"] == shape:
            return known, checkpoints[known][method]
    raise ValueError(
        f"{method}: the authors published heads for {' and '.join(with_lists)}, and heads of one checkpoint mean "
        f"nothing in another; this model is {name or 'without a name'} ({shape[0]} layers x {shape[1]} heads): give "
        f"heads of its own, such as a file made by vlmfix heads"
    )
