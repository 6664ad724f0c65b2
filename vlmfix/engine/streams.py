"""Second streams: other inputs that get the same answer, token by token, each with a cache of its own.

What a new token costs is mostly reading the weights, so the streams of a batch go through the model in one pass where
that is known to be safe: their rows lie one after the other, and only attention is done stream by stream, since each
has keys of its own, as many as its prompt has. No stream is padded for another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

PER_TOKEN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
}  # fmt: skip
"""What a pass over a new token is told, in every model whose streams can be joined."""
TOLD_BY_POSITIONS = {"mm_token_type_ids"}
"""What may be left out of it where positions are given."""


class Stream:
    """A second input that runs beside the first, with a cache of its own: it gets the tokens that are chosen for the
    answer, and gives logits for the next one. No intervention touches it.

    `run` calls the untouched model; `inputs` is what it gets at the prefill, with `attention_mask` (B, T). `rows` is
    the batch of the first stream: a multiple of B where beams share a sample.
    """

    def __init__(self, run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], rows: int):
        self._run, self._inputs, self._rows = run, inputs, rows
        self._logits: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        """All but the model, which copies share."""
        new = copy.copy(self)
        memo[id(self)] = new
        for name, value in vars(self).items():
            if name != "_run":
                new.__dict__[name] = copy.deepcopy(value, memo)
        return new

    @property
    def logits(self) -> Tensor:
        """(rows, V) float32, of the next token."""
        if self._logits is None:
            self._logits = self._prefill()
        return self._logits

    def _prefill(self) -> Tensor:
        """Read the prompt, once per sample; the beams of a sample then go on from copies."""
        self._mask, self._positions = self._inputs["attention_mask"], self._inputs.get("position_ids")
        logits = self._advance(self._inputs)
        self._padded = not bool(self._mask.all())
        n_samples, n_beams = len(self._mask), self._rows // len(self._mask)
        if n_beams == 1:
            return logits
        sample = torch.arange(n_samples, device=self._mask.device)
        self.cache.reorder_cache(sample.repeat_interleave(n_beams))
        self._mask = self._mask.repeat_interleave(n_beams, dim=0)
        if self._positions is not None:
            self._positions = self._positions.repeat_interleave(n_beams, dim=-2)
        return logits.repeat_interleave(n_beams, dim=0)

    def follow(self, tokens: Tensor, parents: Tensor | None) -> None:
        """Take the tokens (rows, n) that were chosen since; row b goes on from what was row `parents[b]`, of the same
        sample."""
        assert self.logits is not None  # the prompt comes first
        if parents is not None:
            self.cache.reorder_cache(parents)
        self._logits = self._advance(self._further(tokens))

    def may_join(self, positions: Tensor) -> bool:
        """Whether its next token may go through the model beside the first stream's, which has these positions."""
        own = self._positions
        return self._logits is not None and own is not None and own.shape[:-2] == positions.shape[:-2]

    def join(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take tokens (rows, 1) in a pass of the first stream: their positions, and the keys that they may see, (rows,
        1, 1, K) bool; `None`: all. The logits come after the pass, to `joined`."""
        positions = self._further(tokens)["position_ids"]
        return positions, self._mask[:, None, None].bool() if self._padded else None

    def joined(self, logits: Tensor) -> None:
        """Take the logits (rows, V) of the next token from such a pass."""
        self._logits = logits.float()

    def _further(self, tokens: Tensor) -> dict[str, Any]:
        self._mask = torch.cat([self._mask, torch.ones_like(tokens).to(self._mask)], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": self._mask, "past_key_values": self.cache}
        if self._positions is not None:
            # (B, T), or (3 or 4, B, T) in M-RoPE models. Those would work positions out from their own record of the
            # first stream, so that they are always told.
            ahead = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            self._positions = inputs["position_ids"] = self._positions[..., -1:] + ahead
        return inputs

    def _advance(self, inputs: dict[str, Any]) -> Tensor:
        output = self._run({**inputs, "use_cache": True})
        self.cache = inputs["past_key_values"]
        return output.logits[:, -1].float()


class JointCache(DynamicCache):
    """The caches of several streams, for one pass over a new token of each. It looks like the first stream's; of each
    layer's new keys and values, those of the others go to their own caches, and wait there for the layer's attention.

    In such a pass the rows of all streams lie one after the other, the first stream's first.
    """

    def __init__(self, first: DynamicCache, streams: Sequence[Stream], masks: Sequence[Tensor | None], rows: int):
        super().__init__()
        self.first, self.streams, self.rows = first, streams, rows
        self._masks = masks
        self.layers = first.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Of the first stream."""
        n_streams = 1 + len(self.streams)
        key, *other_keys = key_states.chunk(n_streams)
        value, *other_values = value_states.chunk(n_streams)
        self._others = []
        for stream, k, v in zip(self.streams, other_keys, other_values, strict=True):
            self._others.append(stream.cache.update(k, v, layer_idx, *args, **kwargs))
        return self.first.update(key, value, layer_idx, *args, **kwargs)

    @property
    def batch(self) -> int:
        """Rows of all streams."""
        return self.rows * (1 + len(self.streams))

    def own(self, x: Tensor) -> Tensor:
        """The first stream's rows of what a pass computes."""
        return x[: self.rows]

    def rejoin(self, own: Tensor, x: Tensor) -> Tensor:
        """The rows of all streams, those of the first replaced by `own`."""
        return torch.cat([own, x[self.rows :]])

    def attend(self, kernel: Callable[..., tuple[Tensor, Any]], query: Tensor, **kwargs: Any) -> list[Tensor]:
        """The attention of each other stream in the layer at hand: its queries, to its own keys, by the kernel."""
        queries = query[self.rows :].split(self.rows)
        outputs = []
        for q, (k, v), mask in zip(queries, self._others, self._masks, strict=True):
            outputs.append(kernel(q, k, v, mask, **kwargs)[0])
        return outputs

    def part(self, output: Any) -> None:
        """Hand each stream its part of the output of the pass; the first stream's stays in it."""
        own, *others = output.logits.chunk(1 + len(self.streams))
        for stream, logits in zip(self.streams, others, strict=True):
            stream.joined(logits[:, -1])
        output.logits, output.past_key_values = own, self.first


def join(given: dict[str, Any], streams: Sequence[Stream]) -> dict[str, Any] | None:
    """Arguments of one pass over a new token of all streams, from those of the first stream's; `None` if these say more
    than is known to be safe, and each stream must run by itself."""
    given = {k: v for k, v in given.items() if v is not None and v is not False}
    ids, mask, positions = (given.get(k) for k in ("input_ids", "attention_mask", "position_ids"))
    cache = given.get("past_key_values")
    if not set(given) <= PER_TOKEN | TOLD_BY_POSITIONS or not streams:
        return None
    if type(cache) is not DynamicCache or ids is None or positions is None:
        return None
    flat_mask = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    if not flat_mask or not all(stream.may_join(positions) for stream in streams):
        return None
    all_positions, masks = [positions], []
    for stream in streams:
        own_positions, own_mask = stream.join(ids)
        all_positions.append(own_positions)
        masks.append(own_mask)
    if mask is not None:  # the others bring their own
        given["attention_mask"] = torch.cat([mask, torch.ones_like(mask).repeat(len(streams), 1)])
    return {
        **{k: v for k, v in given.items() if k not in TOLD_BY_POSITIONS},
        "input_ids": ids.repeat(1 + len(streams), 1),
        "position_ids": torch.cat(all_positions, dim=-2),
        "past_key_values": JointCache(cache, streams, masks, len(ids)),
    }
