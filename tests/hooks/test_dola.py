"""DoLa's rule against its formula, by hand, and what it reads in a model."""

import math

import pytest
import torch

from tests.contract.test_contract import answer, build
from tests.models import picture_prompt
from vlmfix.hooks import DoLa
from vlmfix.hooks.dola import divergence
from vlmfix.method.site import Step


def step_of(states, head=lambda hidden, norm: hidden, **more):
    return Step(0, {}, states, has_image=torch.tensor([True]), head=head, **more)


def test_divergence_by_hand():
    """Of (1/2, 1/2) and (1/4, 3/4): m = (3/8, 5/8); 1/2 [.0318 + .0353]."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    kl = lambda m, x: sum(a * math.log(a / b) for a, b in zip(m, x, strict=True))  # noqa: E731
    want = (kl((0.375, 0.625), (0.5, 0.5)) + kl((0.375, 0.625), (0.25, 0.75))) / 2
    assert divergence(p, q).item() == pytest.approx(want) and divergence(p, p).item() == pytest.approx(0, abs=1e-7)


def test_worked_row():
    """The far layer is contrasted; the third token is ruled out by beta."""
    last = torch.tensor([[0.6, 0.39, 0.01]]).log()
    near, far = last + 0.1 * torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.1, 0.8]]).log()
    out = DoLa().logits(last, step_of({-1: near, 1: far}, as_logits=True))
    torch.testing.assert_close(out, torch.tensor([[math.log(6), math.log(3.9), -math.inf]]))
    first = DoLa(select="first").logits(last, step_of({-1: near, 1: far}, as_logits=True))
    torch.testing.assert_close(
        first, (last - near.log_softmax(-1)).masked_fill(torch.tensor([False, False, True]), -math.inf)
    )
    as_beams_want = DoLa().logits(last, step_of({-1: near, 1: far}))
    torch.testing.assert_close(as_beams_want.exp().sum(-1), torch.ones(1))


def test_layers_of_the_released_buckets():
    """Numbers of states there; ours are outputs, one less. Of 32 layers 0, 2 .. 14 and 16 .. 30."""
    assert [layer + 1 for layer in DoLa().hidden_layers(32)] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [layer + 1 for layer in DoLa(bucket="high").hidden_layers(32)] == [16, 18, 20, 22, 24, 26, 28, 30]
    assert [layer + 1 for layer in DoLa().hidden_layers(60)] == list(range(0, 20, 2))
    assert [layer + 1 for layer in DoLa(bucket="high").hidden_layers(60)] == list(range(40, 60, 2))


def test_it_reads_what_the_model_gives_as_hidden_states():
    """Against the states that transformers returns, through the model's head, without the last norm and with it."""
    model = build("llava")
    prompt = picture_prompt(model)
    more = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    for norm in (False, True):
        one = DoLa(norm=norm, beta=1e-30)
        with one(model):
            out = answer(model, prompt, output_hidden_states=True, **more)
        for scores, raw, states in zip(out.scores, out.logits, out.hidden_states, strict=True):
            inner = [states[j][:, -1] for j in (0,)]
            if norm:
                inner = [model.get_decoder().norm(h) for h in inner]
            (q,) = (model.lm_head(h).log_softmax(-1) for h in inner)
            seen = scores.isfinite()  # the others are suppressed
            want = (raw - q).masked_fill(~seen, -math.inf).log_softmax(-1)
            torch.testing.assert_close(scores[seen], want[seen], rtol=1e-4, atol=1e-4)
