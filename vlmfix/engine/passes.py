"""Which pass is this? Where it begins, how much of it is prompt, which generation it belongs to, where its image is.

`generate` and loops written by hand send a prompt and its answer through the model in many ways: at once or in pieces,
with a cache or without, token by token or several at a time, a further turn on the cache of the last one. A method must
find the same rows in each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlmfix.engine.plan import Plan
from vlmfix.engine.state import Generation
from vlmfix.engine.streams import JointCache
from vlmfix.method.site import Rows, Site
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.geometry import Geometry


@dataclass(frozen=True)
class Seen:
    """What can be seen of a forward pass before it runs."""

    n_rows: int
    """Tokens that go in, per sample."""
    cached: int | None = None
    """Tokens in the cache that it was given; `None` without a cache."""
    prompt_end: int | None = None
    """Where the prompt ends, as the call of `generate` around it knows, or whoever calls the model says; `None` where
    nothing tells."""
    columns: int | None = None
    """Columns of token ids that this call of `generate` was given; `None` if it got embeddings."""
    under_way: Generation | None = None
    """What this call of `generate` has begun."""
    of_cache: Generation | None = None
    """The generation that filled the cache."""


@dataclass
class Pass:
    """One forward pass of the model: `n_rows` rows at key positions `start..`, the first `n_prompt` of them prompt."""

    generation: Generation
    start: int
    n_rows: int
    n_prompt: int
    ends: bool = True
    """Whether no more prompt follows."""
    begins: bool = False
    """Whether it is the first of its generation."""
    n_known: int = 0
    """Columns of prompt from `start` on that can be told image from text now: more than go in, where `generate` holds a
    whole prompt and sends it in pieces. Which rows are edited depends on the whole."""
    cache: Any = None
    """Keys and values so far; a `JointCache` in a pass that takes second streams along."""
    plan: Plan | None = None
    """What each layer does; `None`: the general way."""
    goes_on: bool = False
    """Whether it is but the next token of a call of `generate` that goes by plan: it leaves nothing new behind."""
    _geometries: dict[Any, Geometry] = field(default_factory=dict)
    _rows: dict[Any, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Samples (or beams) that go through the model, second streams' rows included."""
        return self.cache.batch if isinstance(self.cache, JointCache) else len(self.generation.geometry.image)

    def own(self, x: Tensor) -> Tensor:
        """The first stream's rows of what the pass computes: edits see no others."""
        return self.cache.own(x) if isinstance(self.cache, JointCache) else x

    def rejoin(self, own: Tensor, x: Tensor) -> Tensor:
        """What the pass computes, with the first stream's rows replaced."""
        return self.cache.rejoin(own, x) if isinstance(self.cache, JointCache) else own

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
            self._rows[policy] = self._admitted(policy)
        return self._rows[policy]

    def _admitted(self, policy: Rows) -> Tensor:
        geometry = self._all
        if self.n_prompt == 0:
            return torch.ones_like(geometry.image[:, :1]).expand(-1, self.n_rows)
        if self.generation.geometry.n > geometry.n:  # more of the prompt is to come
            geometry = self.generation.geometry
        nothing = torch.zeros_like(geometry.image)
        if policy == "last":
            last = nothing.scatter(1, geometry.last_prompt[:, None], self.ends)
            prompt = last & geometry.prompt
        elif policy == "after_last_image":
            prompt = geometry.instruction
        elif policy == "text":
            prompt = geometry.prompt & ~geometry.image
        elif policy == "all":
            prompt = geometry.prompt
        else:
            prompt = nothing
        return (prompt | geometry.generated)[:, self.start : self.start + self.n_rows]

    def row_index(self, policies: frozenset[Rows]) -> Tensor | None:
        """Indices of the rows that any of the policies admits in any sample; `None` stands for all rows."""
        if self.n_prompt == 0:
            return None
        if policies not in self._rows:
            admitted = [self.rows(policy).any(0) for policy in policies]
            self._rows[policies] = torch.stack(admitted).any(0).nonzero()[:, 0]
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
            prompt=self.generation.geometry,
        )

    def prompt_site(self, index: int, layer: int, n_layers: int, device: torch.device) -> Site:
        """The site of a look at the prompt's rows, over the keys up to the end of the prompt."""
        geometry = self._all.fitted(self.start + self.n_prompt).to(device)
        rows = self.rows("all")[:, : self.n_prompt].to(device)
        return Site(layer, n_layers, geometry, rows, self.start, 0, self.generation.memos[index])


def which_pass(seen: Seen, begun: Callable[[], Generation]) -> Pass:
    """Tell a pass from what is seen of it; `begun` makes a generation, where a new one begins.

    Raises `ValueError` for a cache that was filled while the interventions were not in force.
    """
    start = seen.cached or 0
    generation = _continued(seen)
    stop = start + seen.n_rows
    prompt_end = _prompt_end(seen)
    n_prompt = min(max(prompt_end - start, 0), seen.n_rows)
    ends = prompt_end <= stop
    # Of a prompt in pieces, `generate` holds the whole; but a pass over a prefix that questions will go on from
    # announces a prompt of which nobody has the rest yet.
    holds_all = seen.columns is None or seen.columns >= prompt_end
    return Pass(
        begun() if generation is None else generation,
        start,
        seen.n_rows,
        n_prompt,
        ends=ends,
        begins=generation is None,
        n_known=prompt_end - start if not ends and holds_all else n_prompt,
    )


def _continued(seen: Seen) -> Generation | None:
    """The generation that a pass goes on with; `None` where it begins a new one."""
    if seen.cached is None:
        # Without a cache, `generate` sends everything through the model again for each token: the same generation.
        # Outside of it nothing ties two such passes together.
        return seen.under_way
    if seen.cached == 0:
        return None
    generation = seen.under_way or seen.of_cache
    if generation is None:
        raise ValueError(
            f"the cache holds {seen.cached} tokens that were computed without these interventions, so their geometry "
            f"is not known; start from an empty cache (in prefix tuning there is none), or unwrap the model"
        )
    return generation


def _prompt_end(seen: Seen) -> int:
    """The position at which the prompt ends, as far as it is known."""
    if seen.prompt_end is not None:
        return seen.prompt_end
    # A loop by hand does not say. Its first pass is prompt, and so are several rows at once; a single row on a cache
    # was generated.
    start = seen.cached or 0
    is_prompt = start == 0 or seen.n_rows > 1
    return start + seen.n_rows if is_prompt else start


def answer_begins(labels: Tensor) -> int:
    """The column at which the answers of a batch begin, by their labels (B, T), -100 on the prompt. `ValueError` where
    that is not the same column in all rows, or none."""
    columns = (labels != -100).int().argmax(1).tolist()
    if len(set(columns)) > 1:
        raise ValueError(
            f"labels: the answers of the batch begin in different columns, {columns}; pad the prompts on the left and "
            f"the answers on the right, so that all begin in one column, or score them one by one"
        )
    return columns[0]


# ---- where the image is ---------------------------------------------------------------------------------------------


def image_tokens(parts: Anatomy, inputs: dict[str, Any], ids: Tensor | None) -> Tensor | None:
    """(B, T) bool: image tokens, as the caller tells the model or by their ids; `None` if nothing says it."""
    mask = inputs.get(parts.image_mask_argument or "")
    if mask is not None:
        return mask.bool()
    if ids is None or not parts.image_token_ids:
        return None
    return torch.isin(ids, torch.tensor(parts.image_token_ids, device=ids.device))


def image_columns(
    parts: Anatomy, inputs: dict[str, Any], rows: Tensor, start: int, n: int, image_mask: Tensor | None
) -> Tensor:
    """(B, n) bool: image tokens among the columns `start .. start + n` of a prompt whose pass gets `rows` (B, Q, ...).

    A mask that the caller gave for the whole prompt goes before what the ids say. Raises `ValueError` if nothing tells
    image tokens, and for a mask that does not fit.
    """
    batch = rows.shape[0]
    if image_mask is not None:
        mask = image_mask.to(rows.device, torch.bool)
        if mask.dim() != 2 or batch % mask.shape[0] or mask.shape[1] < start + n:
            raise ValueError(f"image_mask: expected bool of shape {(batch, start + n)}, got {tuple(mask.shape)}")
        n_beams = batch // mask.shape[0]
        return mask.repeat_interleave(n_beams, dim=0)[:, start : start + n]
    ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else None
    image = image_tokens(parts, inputs, ids)
    if image is None:
        raise ValueError(
            "cannot tell which tokens are image tokens, since the prompt has no placeholder ids; "
            "give image_mask, bool of shape (batch, tokens)"
        )
    return image[:, :n]


def valid_columns(mask: Any, image: Tensor, start: int) -> Tensor:
    """(B, n) bool: which prompt columns `start..` are no padding, from any form of attention mask."""
    if isinstance(mask, dict):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return torch.ones_like(image)
    if mask.dim() == 4:  # the last row sees every key that is no padding
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    n = image.shape[1]
    piece = mask[:, start : start + n] if mask.shape[1] >= start + n else mask[:, -n:]
    return piece.to(image.device).bool().expand_as(image)
