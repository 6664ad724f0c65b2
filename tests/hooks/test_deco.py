"""DeCo's rule against its formula, by hand, and what it reads in a model."""

import math

import torch

from tests.contract.test_contract import answer, build
from tests.models import picture_prompt
from vlmfix.hooks import DeCo
from vlmfix.hooks.deco import candidates
from vlmfix.method.site import Step


def test_candidates_by_hand():
    """Of .5 .3 .15 .05: the first three reach 0.9, the crossing one included; two at most with top_k 2."""
    scores = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    assert candidates(scores, 20, 0.9).tolist() == [[False, True, True, True]]
    assert candidates(scores, 2, 0.9).tolist() == [[False, True, False, True]]
    assert candidates(scores, 20, 0.5).tolist() == [[False, True, False, False]]


def test_worked_row():
    """Candidates are the first two tokens; the second layer gives one of them 0.8, the first none more than 0.3."""
    last = torch.tensor([[0.5, 0.45, 0.05]]).log()
    vague, sure = torch.tensor([[0.3, 0.1, 0.6]]).log(), torch.tensor([[0.1, 0.8, 0.1]]).log()
    step = Step(0, {}, {1: vague, 2: sure}, as_logits=True, has_image=torch.tensor([True]), head=lambda h, norm: h)
    out = DeCo(alpha=0.5).logits(last, step)
    want = [math.log(0.5) + 0.4 * math.log(0.1), math.log(0.45) + 0.4 * math.log(0.8), -math.inf]
    torch.testing.assert_close(out, torch.tensor([want]))


def test_it_reads_what_the_model_gives_as_hidden_states():
    """Inputs of layers through last norm and head, as transformers returns the states."""
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    more = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    with DeCo(layers=(3,), top_k=64, top_p=1.0)(model):
        out = answer(model, prompt, output_hidden_states=True, **more)
    for scores, raw, states in zip(out.scores, out.logits, out.hidden_states, strict=True):
        inner = model.lm_head(model.get_decoder().norm(states[3][:, -1]))
        seen = scores.isfinite()
        m = inner.softmax(-1)[seen].view(2, -1).amax(-1, keepdim=True)
        want = (raw + 0.6 * m * inner).masked_fill(~seen, -math.inf).log_softmax(-1)
        torch.testing.assert_close(scores[seen], want[seen], rtol=1e-4, atol=1e-4)


def test_layers_and_controls():
    assert DeCo().hidden_layers(32) == list(range(19, 28))
    assert DeCo().controls() == (DeCo(alpha=0.0),) and DeCo(alpha=0.0).controls() == ()
    scores = torch.randn(1, 9)
    step = Step(0, {}, {0: scores}, as_logits=True, has_image=torch.tensor([True]), head=lambda h, norm: h)
    assert torch.equal(DeCo(alpha=0.0, top_p=1.0).logits(scores, step), scores), "identity at zero strength"
