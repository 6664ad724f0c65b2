"""Numbers that a monitor notes of every head row while an answer is written, put in order afterwards.

A layer gets its rows pass by pass, of samples whose prompts end at different places. What a sample's t-th token was
predicted from is its t-th row that belongs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.method.site import Site


def note(ratio: Tensor, site: Site, this_pass: Any) -> None:
    """Add the ratios (B, H, R) of a layer's rows; from the beginning if `this_pass` holds a prompt not seen before, or
    all of it again without a cache."""
    site.memo["n_layers"] = site.n_layers
    notes = site.memo.setdefault("steps", {}).setdefault(site.layer, {"start": None, "r": [], "rows": []})
    if site.n_prompt and notes["start"] != this_pass:
        notes.update(start=this_pass, r=[], rows=[])
    notes["r"].append(ratio)
    notes["rows"].append(site.rows)


def in_order(memo: dict[str, Any]) -> Tensor:
    """The ratios (B, T, L, H) of the answers of one generation, on the CPU; NaN after the last token of answers that
    were shorter, and for heads that a layer does not have. `ValueError` where attention weights were no numbers."""
    import torch

    notes = memo.get("steps", {})
    state = [len(steps["r"]) for steps in notes.values()], memo.get("pass")
    if memo.get("stacked", (None,))[0] == state:
        return memo["stacked"][1]
    layers = {layer: _of_layer(layer, steps) for layer, steps in notes.items()}
    every = torch.empty(0, 0, 0, 0)
    if layers:
        n_heads = max(r.shape[-1] for r in layers.values())
        first = next(iter(layers.values()))
        every = first.new_full((*first.shape[:2], memo["n_layers"], n_heads), torch.nan)
        for layer, r in layers.items():
            every[:, :, layer, : r.shape[-1]] = r
    memo["stacked"] = state, every
    return every


def _of_layer(layer: int, notes: dict[str, Any]) -> Tensor:
    """(B, T, H): the rows that belong to each sample, moved to the front."""
    import torch

    rows = torch.cat(notes["rows"], 1).cpu()  # (B, R)
    order = rows.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(rows.sum(1).max())]
    r = torch.cat(notes["r"], -1).cpu()  # (B, H, R)
    r = r.where(rows[:, None], torch.nan).gather(-1, order[:, None].expand(-1, r.shape[1], -1))
    bad_steps = r.isinf().flatten(0, 1).any(0)
    if bad_steps.any():
        raise ValueError(
            f"attention weights of layer {layer} are no numbers at step {int(bad_steps.to(torch.int8).argmax())}; "
            f"load the model in bfloat16 or float32"
        )
    return r.transpose(1, 2)
