"""FLB's rule against its formula, by hand, and the properties that the formula implies."""

import math

import torch

from tests.contract.test_contract import answer, build
from tests.models import picture_prompt
from vlmfix.hooks import FLB
from vlmfix.method.site import Step


def steps(one, scores, has_image=(True,)):
    memo, seen = {}, torch.tensor(has_image)
    return [one.logits(each, Step(i, memo, has_image=seen, as_logits=True)) for i, each in enumerate(scores)]


def test_worked_steps():
    """With lambda so large that the weight is gamma from the second token on."""
    first, later = torch.tensor([[4.0, 3.0, -9.0]]), torch.tensor([[1.0, 2.0, -9.0]])
    out = steps(FLB(gamma=0.5, lam=1000.0), [first, later])
    assert out[0].tolist() == [[4.0, 3.0, -math.inf]], "at the first token nothing but the mask"
    assert out[1].tolist() == [[3.0, 3.5, -math.inf]]


def test_the_weight_grows_as_published():
    """At token 20 it is 0.3 (1 - e^-1) = 0.1896."""
    ones = torch.ones(1, 3)
    out = steps(FLB(), [ones] * 21)
    torch.testing.assert_close(out[20] - 1, torch.full((1, 3), 0.1896), rtol=0, atol=1e-4)


def test_samples_without_image_and_gamma_zero():
    scores = [torch.randn(2, 50), torch.randn(2, 50)]
    out = steps(FLB(beta=1e-6), scores, (True, False))
    assert torch.equal(out[1][1], scores[1][1]) and not torch.equal(out[1][0], scores[1][0])
    alone = steps(FLB(gamma=0.0, beta=1e-30), scores, (True, True))
    assert torch.equal(alone[1], scores[1])
    assert FLB().controls() == (FLB(gamma=0.0),) and FLB(gamma=0.0).controls() == ()


def test_a_further_turn_has_first_logits_of_its_own():
    """On the cache of the first turn it answers as from the start."""
    model, one = build("llava"), FLB(gamma=3.0, lam=1.0, beta=1e-4)
    prompt = picture_prompt(model)
    with one(model):
        first = answer(model, prompt, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, torch.tensor([[5, 8, 13]])], dim=1)
        settings = {"input_ids": turn, "max_new_tokens": 6}
        on = answer(model, {"past_key_values": first.past_key_values}, **settings)
        afresh = answer(model, {"pixel_values": prompt["pixel_values"]}, **settings)
    assert torch.equal(on, afresh)
