"""Where an edit happens: the site of a layer's edit, and the step of a token's choice."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from vlmfix.model.geometry import Geometry

Rows = Literal["last", "after_last_image", "text", "all", "generated"]
"""Which prompt rows an attention stage edits; rows of generated tokens always belong."""


@dataclass
class Site:
    """Where in the model and in the sequence an edit happens. B samples (or beams), R rows, K keys of this call."""

    layer: int
    """Decoder layer, 0-based."""
    n_layers: int
    """Decoder layers of the model."""
    geometry: Geometry
    """What the K keys are: masks of shape (B, K)."""
    rows: Tensor
    """(B, R) bool: rows that this intervention may edit here; the engine drops edits of others. In `layer_input`, rows
    of the prompt that are no padding."""
    start: int
    """Position of the first row of this forward pass."""
    first_key: int
    """Position of the first of the K keys: 0, but in layers that keep only a window of keys."""
    memo: dict[str, Any]
    """This intervention's own state of this generation: born at the prefill, gone afterwards."""
    n_prompt: int = 0
    """Rows of this forward pass that are prompt; 0 while tokens are generated from a cache."""
    picked: Any = None
    """Which rows of this pass these are; `None` or a slice for all of them. See `positions`."""
    prompt: Geometry | None = None
    """Masks over the prompt as far as it is known: more than `geometry` where a prompt comes in pieces."""
    shift: Tensor | None = None
    """() position of the first of the K keys, where a method acts by plan in a layer that keeps a window of keys."""

    values: Tensor | None = None
    """(B, Hk, K, d) what weights are summed with, in the `weights` stage of methods that do not act by plan."""

    def admit(self, new: Tensor, old: Tensor) -> Tensor:
        """An edit (B, H, R, K) in the rows that may be edited, and what was there in the others. The engine does this
        after every stage; rows of new tokens are all admitted."""
        if new is old or not self.n_prompt:
            return new
        return new.where(self.rows[:, None, :, None], old)

    def kept(self, name: Hashable, x: Tensor, make: Callable[[Geometry], Tensor], dim: int = -1) -> Tensor:
        """A figure for each of the K keys in the last dimension of `x`: made from the masks over the prompt, with its
        tokens along `dim`, 0 on tokens generated later, and kept for the rest of the answer under `name`.

        What a stage needs of the masks while answering is taken from here, so that a new token costs no more than a
        view of it.
        """
        keeps = self.memo.setdefault("kept", {})
        n_keys = x.shape[-1]
        kept = keeps.get(name)
        if kept is None or self.n_prompt or kept.shape[dim] < self.first_key + n_keys:
            kept = keeps[name] = _with_room(make(self.prompt or self.geometry), self.first_key + n_keys, dim)
        if kept.device != x.device:
            kept = kept.to(x.device)
        if self.shift is not None:
            return _from(kept, self.shift, n_keys, dim)
        return kept.narrow(dim, self.first_key, n_keys)

    @property
    def has_image(self) -> Tensor:
        """(B,) bool: samples whose prompt shows an image, be it in a piece that is still to come."""
        return (self.prompt or self.geometry).image.any(1)

    @property
    def positions(self) -> Tensor:
        """(R,) position of each row, on the scale of `start`."""
        index = self.picked if hasattr(self.picked, "device") else self.rows[0].long().fill_(1).cumsum(0) - 1
        return self.start + index


ROOM = 256
"""Keys for which there is room at a time in what is kept of a prompt."""


def _with_room(x: Tensor, n: int, dim: int) -> Tensor:
    """Filled up with zeros along `dim`: room for `n` keys and some that are still to come."""
    import torch

    shape = list(x.shape)
    room = max(n, shape[dim] + 1)
    shape[dim] = room + -room % ROOM - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def _from(x: Tensor, first: Tensor, n: int, dim: int) -> Tensor:
    """`n` entries along `dim` from position `first` () on; what lies beyond the last is as the last."""
    import torch

    positions = first + torch.arange(n, device=x.device)
    return x.index_select(dim, positions.clamp(max=x.shape[dim] - 1))


@dataclass
class Step:
    """The choice of one token inside `generate`: where the `logits` stage happens."""

    index: int
    """0 for the first token of the answer."""
    memo: dict[str, Any]
    """As in `Site`. A `Stream` that `begin` put here has already got all tokens chosen so far."""
    states: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> (B, D), for `hidden`."""
    has_image: Any = None
    """(B,) bool: samples whose prompt shows an image."""
    head: Callable[[Tensor, bool], Tensor] | None = None
    """For `lens`: hidden states (B, D), normed or not by the model's last norm, to logits (B, V)."""
    as_logits: bool = False
    """Whether penalties follow, to which the level and the sign of logits matter: then a method whose release puts them
    after itself (`Traits.before_penalties`) returns logits, and no log-probabilities."""

    def hidden(self, layer: int) -> Tensor:
        """(B, D) output of a decoder layer, before the norm at the end of the model, in the row that predicts this
        token; of layer -1, the embedding that the first layer gets. `ValueError` for a layer that the method did not
        name in `hidden_layers`."""
        if layer not in self.states:
            raise ValueError(f"step.hidden({layer}): expected one of hidden_layers, {sorted(self.states)}")
        return self.states[layer]

    def lens(self, layer: int, norm: bool = True) -> Tensor:
        """(B, V) float32 logits that the model would give if it ended after a layer: its head over `hidden(layer)`,
        with the norm at the end of the model or without. `ValueError` as for `hidden`, and for methods whose
        `Traits.lens` is not set."""
        if self.head is None:
            raise ValueError(f"step.lens({layer}): the method must say lens=True in its Traits")
        return self.head(self.hidden(layer), norm)
