"""The attention function: what edited rows are worth in every dtype, and when the original kernel runs at all."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlmfix.engine.attention import AttentionView, edited_attention
from vlmfix.engine.passes import Pass
from vlmfix.engine.state import Generation
from vlmfix.method.intervention import Intervention
from vlmfix.model.geometry import Geometry

EPSILON = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Two roundings to the dtype, as a share of the sum of weights x |values|."""


@dataclass(frozen=True)
class Sharpen(Intervention):
    heads_edited: int = 4
    rows = "all"

    def weights(self, a, site):
        chosen = torch.arange(a.shape[1]) < self.heads_edited
        return (a**2 / (a**2).sum(-1, keepdim=True)).where(chosen[:, None, None], a) if self.heads_edited else a.clone()


def attend(method, query, key, value, n_prompt=0, kernel="sdpa"):
    """(B, Q, H, d) output of a module with one edit; the last rows of the keys are the queries'."""
    n, b = key.shape[2], len(key)
    nothing = torch.zeros(b, n - query.shape[2] + n_prompt, dtype=torch.bool)
    generation = Generation(Geometry(nothing, ~nothing, ~nothing), [{}], frozenset({0}))
    this_pass = Pass(generation, n - query.shape[2], query.shape[2], n_prompt)
    module = nn.Module()
    module.config = SimpleNamespace(_attn_implementation=kernel)
    module.is_causal = True
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    view = AttentionView(module, 0, 1, [(0, method)], lambda: this_pass)
    module.config = SimpleNamespace(_attn_implementation=kernel, vlmfix_view=view)
    return edited_attention(module, query, key, value, None, scaling=query.shape[-1] ** -0.5)[0]


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("decoding", [True, False])
def test_edited_rows_are_as_good_as_their_dtype(dtype, decoding):
    """Against the same edit in float64: scores are exact, weights and results are rounded once."""
    b, h, groups, d, n = 2, 4, 2, 64, 5000 if decoding else 70
    rows = 1 if decoding else n
    query = 6 * torch.randn(b, h, rows, d).to(dtype)  # scores up to 25: rounded to 16 bits they would be far off
    key, value = (torch.randn(b, h // groups, n, d).to(dtype) for _ in range(2))
    out = attend(Sharpen(), query, key, value, 0 if decoding else n)
    q, k, v = (x.double().repeat_interleave(g, 1) for x, g in ((query, 1), (key, groups), (value, groups)))
    future = torch.arange(n) > torch.arange(rows)[:, None] + n - rows
    a = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    a = a**2 / (a**2).sum(-1, keepdim=True)
    error, room = ((out.transpose(1, 2) - a @ v).abs(), EPSILON[dtype] * (a @ v.abs()))

    assert out.dtype == dtype and bool((error <= room).all())


@pytest.mark.parametrize(("heads", "runs"), [(0, 1), (2, 1), (4, 0)])
def test_the_kernel_runs_where_a_row_stays_as_it_is(heads, runs, monkeypatch):
    """While answering on a CPU; where every row is edited, its output would not be used."""
    called = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (called.append(1), kernel(*args, **kwargs))[1],
    )
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30, 8)
    out = attend(Sharpen(heads), query, key, value)
    assert len(called) == runs
    plain = kernel(query, key, value).transpose(1, 2)
    same = (out == plain).all(-1)
    assert same[..., heads:].all() and not same[..., :heads].any()
    query = torch.randn(2, 4, 30, 8)
    called.clear()
    attend(Sharpen(4), query, key, value, n_prompt=30)
    assert len(called) == 1
