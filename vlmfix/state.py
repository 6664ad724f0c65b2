"""State of one generation and of one forward pass: born at the prefill, gone with the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlmfix.geometry import Geometry
from vlmfix.intervention import Intervention, Rows, Site


@dataclass
class Generation:
    """What one prompt and its answer share: the geometry of the keys so far, and each intervention's memo."""

    geometry: Geometry
    """Up to the end of the last piece of prompt; keys after that were generated."""
    memos: list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """The whole prompt, as `Intervention.begin` gets it. B samples, T tokens."""

    geometry: Geometry
    """Masks over the T tokens."""
    embeddings: Callable[[], Tensor]
    """Gives the (B, T, D) text embeddings; under image tokens they mean nothing."""
    text_pass: Callable[[Tensor, Tensor], Any]
    """Runs the plain text decoder on embeddings (B, T', D) and a mask (B, T')."""
    image_pass: Callable[[], Any]
    """Runs the plain model on the whole prompt, image included."""
    capture: Callable[[Callable[[], Any], Tensor, Iterable[int]], dict[int, Tensor]]
    """Collects the head outputs of a pass at given positions (B,), per layer."""

    def image_free_heads(self, layers: Iterable[int]) -> dict[int, Tensor]:
        """Head outputs (B, H, d) at the last position, per layer, of a pass in which all image tokens are deleted.

        The other tokens close up; the pass goes through the plain text decoder, with no intervention in force.
        """
        keep = self.geometry.prompt & ~self.geometry.image
        length = int(keep.sum(1).max())
        order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -length:]  # kept tokens to the right, in their order
        x = self.embeddings()
        x, mask = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])), keep.gather(1, order)
        last = torch.full_like(order[:, 0], length - 1)
        return self.capture(lambda: self.text_pass(x, mask), last, layers)

    def heads(self, layers: Iterable[int]) -> dict[int, Tensor]:
        """Head outputs (B, H, d) at the last prompt position, per layer, of a plain pass over the whole prompt."""
        return self.capture(self.image_pass, self.geometry.last_prompt, layers)


@dataclass
class Call:
    """One forward pass of the model: `n_rows` rows at key positions `start..`, the first `n_prompt` of them prompt."""

    generation: Generation
    start: int
    n_rows: int
    n_prompt: int
    _geometries: dict[Any, Geometry] = field(default_factory=dict)
    _rows: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def _all(self) -> Geometry:
        return self.generation.geometry.fitted(self.start + self.n_rows)

    def geometry(self, n_keys: int, device: torch.device) -> Geometry:
        """Masks over the keys that a layer sees: all so far, the room of a static cache, or the last ones of a
        window."""
        if (n_keys, device) not in self._geometries:
            windowed = n_keys < self.start + self.n_rows
            found = self._all.last_keys(n_keys) if windowed else self._all.fitted(n_keys)
            self._geometries[n_keys, device] = found.to(device)
        return self._geometries[n_keys, device]

    def rows(self, policy: Rows) -> Tensor:
        """(B, Q) bool: rows of this pass that a policy admits."""
        if policy not in self._rows:
            g = self._all
            if self.n_prompt == 0:
                mask = torch.ones_like(g.image[:, :1]).expand(-1, self.n_rows)
            else:
                if policy == "last":
                    prompt = torch.zeros_like(g.image).scatter(1, g.last_prompt[:, None], True) & g.prompt
                else:
                    prompt = {"after_last_image": g.instruction, "text": g.prompt & ~g.image, "all": g.prompt}[policy]
                mask = (prompt | g.generated)[:, self.start :]
            self._rows[policy] = mask
        return self._rows[policy]

    def row_index(self, policies: frozenset[Rows]) -> Tensor | None:
        """Indices of the rows that any of the policies admits in any sample; `None` stands for all rows."""
        if self.n_prompt == 0:
            return None
        if policies not in self._rows:
            union = torch.stack([self.rows(p).any(0) for p in policies]).any(0)
            self._rows[policies] = union.nonzero()[:, 0]
        return self._rows[policies]

    def site(
        self, index: int, one: Intervention, layer: int, n_layers: int, n_keys: int, picked: Any, device: torch.device
    ) -> Site:
        """The site of one edit; `picked` selects the rows at hand out of this pass's rows."""
        rows = self.rows(one.rows)
        return Site(
            layer=layer,
            n_layers=n_layers,
            geometry=self.geometry(n_keys, device),
            rows=rows[:, picked.to(rows.device) if isinstance(picked, Tensor) else picked].to(device),
            start=self.start,
            first_key=max(self.start + self.n_rows - n_keys, 0),
            memo=self.generation.memos[index],
        )

    def prompt_site(self, index: int, layer: int, n_layers: int, device: torch.device) -> Site:
        """The site of a look at the prompt's rows, over the keys up to the end of the prompt."""
        geometry = self._all.fitted(self.start + self.n_prompt).to(device)
        rows = self.rows("all")[:, : self.n_prompt].to(device)
        return Site(layer, n_layers, geometry, rows, self.start, 0, self.generation.memos[index])
