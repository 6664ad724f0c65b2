"""SPARC's selection and gains against the formula, by hand, and in a model."""

from types import SimpleNamespace

import pytest
import torch

from tests.contract.test_contract import answer, build
from tests.models import picture_prompt
from vlmfix.hooks import SPARC
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

IMAGE = torch.tensor([[False, True, True]])
PROMPT = Geometry(IMAGE, IMAGE | True, IMAGE | True)


def steps(one, rows):
    """Weights (H, K) of passes one after the other through layers 0 and 1, of which the second watches: what the first
    layer makes of them, and the memo."""
    memo, outs = {}, []
    for n, row in enumerate(rows):
        a = torch.tensor(row)[None, :, None]
        admitted, n_prompt = torch.tensor([[True]]), 3 if n == 0 else 0
        for layer in (0, 1):
            site = Site(layer, 2, PROMPT.fitted(a.shape[-1]), admitted, 2 + n, 0, memo, n_prompt, prompt=PROMPT)
            out = one.weights(a, site)
            if layer == 0:
                outs.append(out[0, :, 0])
    return outs, memo


def test_worked_steps():
    """e = .01 and a = .03: ratio 2 reaches 1.5, so the token is selected, and e becomes .9 * .03 + .1 * .01 = .028."""
    rows = [
        [[0.98, 0.01, 0.01]],
        [[0.5, 0.03, 0.01, 0.46]],
        [[0.3, 0.2, 0.2, 0.2, 0.1]],
        [[0.3, 0.2, 0.2, 0.1, 0.1, 0.1]],
    ]
    outs, memo = steps(SPARC(alpha=2.0, layer=1), rows[:2])
    assert torch.equal(outs[1], torch.tensor(rows[1])), "nothing is selected before the first new token"
    assert memo["selected"].tolist() == [[False, True, False]]
    torch.testing.assert_close(memo["e"], torch.tensor([[0.0, 0.028, 0.01]]))
    outs, memo = steps(SPARC(alpha=2.0, layer=1), rows)
    torch.testing.assert_close(outs[2], torch.tensor([[0.3, 0.4, 0.2, 0.2, 0.1]]))
    torch.testing.assert_close(outs[3], torch.tensor([[0.3, 0.8, 0.4, 0.1, 0.1, 0.1]])), "twice selected: alpha squared"
    outs, _ = steps(SPARC(alpha=2.0, layer=1, cap=3.0), rows)
    torch.testing.assert_close(outs[3], torch.tensor([[0.3, 0.6, 0.4, 0.1, 0.1, 0.1]]))


def test_heads_are_averaged_before_the_ratio():
    _, memo = steps(SPARC(layer=1), [[[0.9, 0.1, 0.0], [1.0, 0.0, 0.0]], [[0.8, 0.2, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]]])
    torch.testing.assert_close(memo["e"], torch.tensor([[0.0, 0.9 * 0.15 + 0.1 * 0.05, 0.0]]))
    assert memo["selected"].tolist() == [[False, True, False]]


def test_values_that_are_scaled_are_weights_that_are_scaled():
    """From the third token on it differs from the untouched model, not before; out of reach it is the untouched model."""
    model = build("llava")
    prompt = picture_prompt(model)
    settings = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    plain = answer(model, prompt, **settings).scores
    with SPARC(alpha=4.0, tau=-0.5)(model):
        out = answer(model, prompt, **settings).scores
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1]) and not torch.allclose(out[2], plain[2])
    for nothing in (SPARC(alpha=1.0), SPARC(alpha=4.0, tau=1e9)):
        with nothing(model):
            assert all(map(torch.equal, answer(model, prompt, **settings).scores, plain))


def test_the_watching_layer_and_refusals():
    deep = SimpleNamespace(layers=range(32), attention_layers=tuple(range(32)))
    hybrid = SimpleNamespace(layers=range(8), attention_layers=(3, 7))
    assert SPARC().resolve(None, deep)[0].layer == 20 and SPARC().resolve(None, hybrid)[0].layer in (3, 7)
    with pytest.raises(ValueError, match=r"layer: expected one with attention, 3..7, got 4"):
        SPARC(layer=4).resolve(None, hybrid)
    model = build("llava")
    prompt = picture_prompt(model)
    with SPARC()(model):
        with pytest.raises(ValueError, match="sparc goes by the pass over the token before, and without a cache"):
            answer(model, prompt, use_cache=False)
        with pytest.raises(ValueError, match="beam search is not supported"):
            answer(model, prompt, num_beams=2)
    assert SPARC().controls() == (SPARC(alpha=1 / 1.1),)
