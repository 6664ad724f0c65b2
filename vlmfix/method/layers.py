"""Layers of a model that methods name by number."""

from __future__ import annotations


def layers_of(first: int, last: int, n_layers: int, of: int = 32) -> range:
    """The layers `first` .. `last`, 0-based and both included, that a paper states for a model of `of` layers, at the
    same depth in a model of `n_layers`. The last layer stays the last one."""
    end = n_layers - 1 if last == of - 1 else min(round(last * n_layers / of), n_layers - 1)
    return range(min(round(first * n_layers / of), n_layers - 1), end + 1)
