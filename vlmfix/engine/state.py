"""What is remembered while a wrapped model runs: of one generation, of one call of `generate`, of one reading pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfix.engine.plan import Plan
from vlmfix.engine.streams import Stream
from vlmfix.method.prompt import Readable
from vlmfix.model.geometry import Geometry


@dataclass
class Generation:
    """What one prompt and its answer share: born at the prefill, gone with the cache."""

    geometry: Geometry
    """Up to the end of the prompt, or of its pieces so far where nothing tells its end; keys after that were
    generated."""
    memos: list[dict[str, Any]]
    """Each intervention's own."""
    force: frozenset[int]
    """Which of the wrapped interventions are in force."""
    streams: list[Stream] = field(default_factory=list)
    seen: Tensor | None = None
    """(B, T) token ids that the streams have got, prompt included."""
    ahead: bool = False
    """Whether the streams have got the newest token already, in a pass of the first one."""
    joinable: set[int] = field(default_factory=set)
    """Layers whose kernel gets keys and values as the cache gives them."""
    plan: Plan | None = None
    """Of its passes over one new token, if they go by plan."""
    laid: bool = False
    """Whether it is known if they do."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> (B, D) output in the last row of the newest pass, for `step.hidden`."""

    def branched(self, index: Tensor) -> Generation:
        """The state of several prompts that begin alike: the b-th goes on from what was sample `index[b]`."""
        masks = (self.geometry.image, self.geometry.prompt, self.geometry.valid)
        geometry = Geometry(*(mask[index.to(mask.device)] for mask in masks))
        return Generation(geometry, [_taken(memo, index) for memo in self.memos], self.force)

    def follow(self, ids: Tensor, n_beams: int, image_ids: Iterable[int]) -> None:
        """Pass the tokens of `ids` (B, T) that are new on to the streams. `n_beams` rows in a row share a sample."""
        if self.seen is not None and self.streams and ids.shape[1] > self.seen.shape[1]:
            n_seen = self.seen.shape[1]
            new = ids[:, n_seen:]
            if new.shape[1] > 1 and any(bool((new == token).any()) for token in image_ids):
                raise ValueError("a further turn with a picture cannot go on from the cache of a turn with guidance")
            parents = _parents(ids[:, :n_seen], self.seen, n_beams) if n_beams > 1 else None
            for stream in self.streams if not self.ahead else ():
                stream.follow(new, parents)
        self.seen, self.ahead = ids, False


def _parents(ids: Tensor, seen: Tensor, n_beams: int) -> Tensor:
    """(B,) which row of `seen` (B, T) each row of `ids` goes on from. Equal sequences of one sample have equal caches,
    so any match is right."""
    sample = torch.arange(len(ids), device=ids.device) // n_beams
    same = (ids[:, None] == seen).all(-1) & (sample[:, None] == sample)
    return same.to(torch.int8).argmax(1)


def _taken(value: Any, index: Tensor) -> Any:
    """What a memo holds, with its tensors' samples taken by index."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, dict):
        return {key: _taken(entry, index) for key, entry in value.items()}
    return value


@dataclass
class Scope:
    """One call of `generate`."""

    inputs: dict[str, Any]
    """The tensors that it was given."""
    prompt_end: int | None
    """The number of columns that are prompt, where that is known."""
    image_mask: Tensor | None
    n_beams: int
    generation: Generation | None = None
    """What it has begun."""
    position: int = 0
    """Tokens that have gone through the model."""
    cache: Any = None
    """What the newest pass was given to go on from."""

    @property
    def columns(self) -> int | None:
        """Columns of `input_ids` that it was given; more of the prompt may follow in a later call. `None` without
        ids."""
        ids = self.inputs.get("input_ids")
        return ids.shape[1] if isinstance(ids, Tensor) else None


@dataclass
class Capture:
    """Something that is read of layers during a pass of the untouched model."""

    reading: Readable
    positions: Tensor
    """(B,) row of each sample."""
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def note(self, layer: int, x: Tensor) -> None:
        """Keep one row per sample of (B, Q, ...)."""
        self.outputs[layer] = x[torch.arange(len(x), device=x.device), self.positions.to(x.device)]
