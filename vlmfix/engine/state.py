"""State of one generation and of one forward pass: born at the prefill, gone with the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.engine.streams import Stream
from vlmfix.method.site import Rows, Site
from vlmfix.model.geometry import Geometry


@dataclass
class Generation:
    """What one prompt and its answer share: the geometry of the keys so far, and each intervention's memo."""

    geometry: Geometry
    """Up to the end of the prompt, or of its pieces so far where nothing tells its end; keys after that were
    generated."""
    memos: list[dict[str, Any]]
    force: frozenset[int]
    """Which of the wrapped interventions are in force."""
    streams: list[Stream] = field(default_factory=list)
    seen: Tensor | None = None
    """(B, T) token ids that the streams have got, prompt included."""
    ahead: bool = False
    """Whether the streams have got the newest token already, in a pass of the first one."""
    joinable: set[int] = field(default_factory=set)
    """Layers whose kernel gets keys and values as the cache gives them."""

    def branched(self, index: Tensor) -> Generation:
        """The state of several prompts that begin alike: the b-th goes on from what was sample `index[b]`."""
        g = self.geometry
        geometry = Geometry(*(mask[index.to(mask.device)] for mask in (g.image, g.prompt, g.valid)))
        return Generation(geometry, [_taken(memo, index) for memo in self.memos], self.force)

    def follow(self, ids: Tensor, n_beams: int, image_ids: Iterable[int]) -> None:
        """Pass the tokens of `ids` (B, T) that are new on to the streams. `n_beams` rows in a row share a sample."""
        if self.seen is not None and self.streams and ids.shape[1] > self.seen.shape[1]:
            n, parents = self.seen.shape[1], None
            if n_beams > 1:  # equal sequences of one sample have equal caches, so any match is right
                sample = torch.arange(len(ids), device=ids.device) // n_beams
                same = (ids[:, None, :n] == self.seen).all(-1) & (sample[:, None] == sample)
                parents = same.to(torch.int8).argmax(1)
            new = ids[:, n:]
            if new.shape[1] > 1 and any(bool((new == token).any()) for token in image_ids):
                raise ValueError("a further turn with a picture cannot go on from the cache of a turn with guidance")
            for stream in self.streams if not self.ahead else ():
                stream.follow(new, parents)
        self.seen, self.ahead = ids, False


def _taken(found: Any, index: Tensor) -> Any:
    """What a memo holds, with its tensors' samples taken by index."""
    if isinstance(found, Tensor):
        return found[index.to(found.device)]
    if isinstance(found, dict):
        return {key: _taken(value, index) for key, value in found.items()}
    return found


@dataclass(frozen=True)
class Prompt:
    """The whole prompt, as `Intervention.begin` gets it. B samples, T tokens."""

    geometry: Geometry
    """Masks over the T tokens."""
    embeddings: Callable[[], Tensor]
    """Gives the (B, T, D) text embeddings; under image tokens they mean nothing."""
    text_pass: Callable[[Tensor, Tensor, dict[str, Tensor]], Any]
    """Runs the plain model on embeddings (B, T', D) of text, a mask (B, T') and what `_kinds` says of the tokens."""
    image_pass: Callable[[], Any]
    """Runs the plain model on the whole prompt, image included."""
    capture: Callable[[Callable[[], Any], Tensor, Iterable[int]], dict[int, Tensor]]
    """Collects the head outputs of a pass at given positions (B,), per layer."""
    model: nn.Module
    inputs: dict[str, Any]
    """What the model was given: `input_ids`, `pixel_values` ...; one row per sample, beams not yet told apart."""
    prefill: dict[str, Any]
    """What the forward pass got of it: one row per beam, pictures perhaps encoded already."""
    stream: Callable[[dict[str, Any]], Stream]
    """A second stream that starts from these inputs."""

    def _image_free(self) -> tuple[Tensor, Tensor]:
        """(B, T') positions of the tokens that are no image tokens, moved together to the right, and their mask."""
        keep = self.geometry.prompt & ~self.geometry.image
        length = int(keep.sum(1).max())
        order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -length:]
        return order, keep.gather(1, order)

    def _kinds(self, order: Tensor) -> dict[str, Tensor]:
        """`token_type_ids` of the tokens that are left, where a model goes by them: prefixes that see both ways."""
        kinds = self.prefill.get("token_type_ids")
        return {} if kinds is None else {"token_type_ids": kinds.gather(1, order)}

    def image_free_stream(self) -> Stream:
        """A second stream in which all image tokens are deleted; the other tokens close up."""
        order, mask = self._image_free()
        inputs: dict[str, Any] = {"attention_mask": mask.long(), **self._kinds(order)}
        positions = self.prefill.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).expand(*positions.shape[:-1], -1)
        ids = self.prefill.get("input_ids")
        if ids is not None:
            return self.stream({"input_ids": ids.gather(1, order), **inputs})
        x = self.embeddings()
        return self.stream({"inputs_embeds": x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])), **inputs})

    def stream_with(self, **changes: Any) -> Stream:
        """A second stream that differs from the first in these inputs only (`pixel_values=...`)."""
        rows: Tensor = self.inputs["input_ids" if "input_ids" in self.inputs else "inputs_embeds"]
        mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        inputs, positions = {"attention_mask": mask, **self.inputs, **changes}, self.prefill.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = positions[..., :: positions.shape[-2] // len(rows), :]
        return self.stream(inputs)

    def image_free_heads(self, layers: Iterable[int]) -> dict[int, Tensor]:
        """Head outputs (B, H, d) at the last position, per layer, of a pass in which all image tokens are deleted.

        The other tokens close up; the pass goes through the plain text decoder, with no intervention in force.
        """
        order, mask = self._image_free()
        x = self.embeddings()
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        last = torch.full_like(order[:, 0], order.shape[1] - 1)
        return self.capture(lambda: self.text_pass(x, mask, self._kinds(order)), last, layers)

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
    ends: bool = True
    """Whether no more prompt follows."""
    cache: Any = None
    """Keys and values so far; a `JointCache` in a pass that takes second streams along, whose rows come after those of
    the first."""
    _geometries: dict[Any, Geometry] = field(default_factory=dict)
    _rows: dict[Any, Any] = field(default_factory=dict)

    @property
    def n_samples(self) -> int:
        """Rows of the batch that belong to the first stream: the first ones."""
        return len(self.generation.geometry.image)

    @cached_property
    def _all(self) -> Geometry:
        return self.generation.geometry.fitted(self.start + self.n_rows)

    def geometry(self, n_keys: int, device: torch.device) -> Geometry:
        """Masks over the keys that a layer sees: all so far, the room of a static cache, or the last ones of a
        window."""
        if (n_keys, device) not in self._geometries:
            windowed, every = n_keys < self.start + self.n_rows, self._all.to(device)
            self._geometries[n_keys, device] = every.last_keys(n_keys) if windowed else every.fitted(n_keys)
        return self._geometries[n_keys, device]

    def rows(self, policy: Rows) -> Tensor:
        """(B, Q) bool: rows of this pass that a policy admits."""
        if policy not in self._rows:
            g = self._all
            if self.n_prompt == 0:
                mask = torch.ones_like(g.image[:, :1]).expand(-1, self.n_rows)
            else:
                if self.generation.geometry.n > g.n:  # more of the prompt is to come
                    g = self.generation.geometry
                if policy == "last":
                    prompt = torch.zeros_like(g.image).scatter(1, g.last_prompt[:, None], self.ends) & g.prompt
                else:
                    kinds = {"after_last_image": g.instruction, "text": g.prompt & ~g.image, "all": g.prompt}
                    prompt = kinds[policy] if policy != "generated" else torch.zeros_like(g.image)
                mask = (prompt | g.generated)[:, self.start : self.start + self.n_rows]
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
        self,
        index: int,
        policy: Rows,
        layer: int,
        n_layers: int,
        n_keys: int,
        picked: Any,
        device: torch.device,
    ) -> Site:
        """The site of one edit; `picked` selects the rows at hand out of this pass's rows, `policy` those to edit."""
        rows = self.rows(policy)
        return Site(
            layer=layer,
            n_layers=n_layers,
            geometry=self.geometry(n_keys, device),
            rows=rows[:, picked.to(rows.device) if isinstance(picked, Tensor) else picked].to(device),
            start=self.start,
            first_key=max(self.start + self.n_rows - n_keys, 0),
            memo=self.generation.memos[index],
            n_prompt=self.n_prompt,
            picked=picked,
        )

    def prompt_site(self, index: int, layer: int, n_layers: int, device: torch.device) -> Site:
        """The site of a look at the prompt's rows, over the keys up to the end of the prompt."""
        geometry = self._all.fitted(self.start + self.n_prompt).to(device)
        rows = self.rows("all")[:, : self.n_prompt].to(device)
        return Site(layer, n_layers, geometry, rows, self.start, 0, self.generation.memos[index])
