"""Attention that keys have received from the rows before, per head: sums that may go on from row to row."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Received(NamedTuple):
    """Attention that keys have received, per head. The axis R holds the rows up to which it is counted, or is 1."""

    total: Tensor
    """(B, H, R, K) sums over rows."""
    seen: Tensor
    """(B, R, K) rows that see the key."""
    n: Tensor
    """(B, R) rows."""

    def plus(self, more: Received) -> Received:
        """With further rows, which may see further keys."""
        from torch.nn.functional import pad

        n_new_keys = more.total.shape[-1] - self.total.shape[-1]
        total = pad(self.total, (0, n_new_keys)) + more.total
        seen = pad(self.seen, (0, n_new_keys)) + more.seen
        return Received(total, seen, self.n + more.n)

    def last(self) -> Received:
        """Up to the last row."""
        return Received(self.total[:, :, -1:], self.seen[:, -1:], self.n[:, -1:])


def received(a: Tensor, rows: Tensor, first_key: int, each: bool = False) -> Received:
    """What keys receive from those `rows` (B, R) of the weights a (B, H, R, K), in all or up to `each` row. Keys count
    from position 0, also where a layer keeps only a window of them from `first_key` on."""
    from torch.nn.functional import pad

    def add(x: Tensor, dim: int) -> Tensor:
        return x.cumsum(dim) if each else x.sum(dim, keepdim=True)

    a = pad(a * rows[:, None, :, None], (first_key, 0))
    return Received(add(a, 2), add((a > 0).any(1), 1), add(rows, 1))


def random_keys(sinks: Tensor, pool: Tensor, order: Tensor, layer: int) -> Tensor:
    """As many keys of the pool (B, 1, 1, K) as each head has sinks (B, H, R, K), drawn by their order in the sample."""
    import torch

    n = int(order.max()) + 1
    draw = torch.rand(n, sinks.shape[1], generator=torch.Generator().manual_seed(layer)).to(order.device)
    score = draw[order].transpose(1, 2)[:, :, None].masked_fill(~pool, 2.0)  # (B, H, 1, K)
    rank = score.argsort(-1).argsort(-1)
    return (rank < sinks.sum(-1, keepdim=True)) & pool
