"""Gradients go through a wrapped model, attention weights that are shown are those in force, and float64 works."""

import pytest
import torch

from tests.contract.examples import INTERVENTIONS, STEPWISE
from tests.contract.test_contract import CASES, GUIDES, answer, build
from tests.models import picture_prompt

PLAIN = sorted(set(INTERVENTIONS) - GUIDES)


@pytest.mark.parametrize(("method", "architecture", "attn"), [case for case in CASES if case[0] not in GUIDES])
def test_gradients_are_those_of_the_edited_pass(method, architecture, attn):
    """The same with every kernel, and in every weight; without gradients the numbers are the same."""
    model = build(architecture, attn)
    prompt = picture_prompt(model)
    with INTERVENTIONS[method](model):
        with torch.no_grad():
            want = model(**prompt).logits
        got = model(**prompt).logits
        got[0, -1].logsumexp(-1).backward()
    assert torch.equal(got, want)
    gradient = model.get_decoder().layers[0].self_attn.v_proj.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("method", ["pai", "zerotuning", "headgain"])
def test_gradients_point_where_the_edited_score_grows(method):
    """A step along one weight, in float64: the difference quotient."""
    model = build("llava").double()
    prompt = picture_prompt(model)
    prompt["pixel_values"] = prompt["pixel_values"].double()
    weight = model.get_decoder().layers[1].self_attn.v_proj.weight

    def score():
        return model(**prompt).logits[0, -1].logsumexp(-1)

    with INTERVENTIONS[method](model):
        score().backward()
        step, (i, j) = 1e-2, divmod(int(weight.grad.abs().argmax()), weight.shape[1])
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * step
                ends.append(score())
                weight[i, j] -= sign * step
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), weight.grad[i, j], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "method", [m for m in PLAIN if INTERVENTIONS[m].acts_at("scores") or INTERVENTIONS[m].acts_at("weights")]
)
@torch.no_grad()
def test_attention_weights_that_are_shown_are_those_in_force(method):
    """The weights that a model gives make the head outputs that it goes on with."""
    model = build("llava", "eager")
    prompt = picture_prompt(model)
    plain = model(**prompt, output_attentions=True).attentions
    values, joined = [], []
    for layer in model.get_decoder().layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, args, out: values.append(out))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: joined.append(args[0]))
    with INTERVENTIONS[method](model):
        shown = model(**prompt, output_attentions=True).attentions
    leaves_alone = method == "lookback" or method in STEPWISE or INTERVENTIONS[method].rows == "generated"
    assert leaves_alone or any(not torch.equal(a, b) for a, b in zip(plain, shown, strict=True))
    for a, v, heads in zip(shown, values, joined, strict=True):
        per_head = v.view(*v.shape[:2], 2, 8).transpose(1, 2).repeat_interleave(3, dim=1)
        torch.testing.assert_close((a @ per_head).transpose(1, 2).flatten(2), heads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_double_precision(method):
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    with INTERVENTIONS[method](model):
        want = answer(model, prompt, max_new_tokens=1, output_scores=True, return_dict_in_generate=True).scores[0]
    model, prompt["pixel_values"] = model.double(), prompt["pixel_values"].double()
    with INTERVENTIONS[method](model):
        got = answer(model, prompt, max_new_tokens=1, output_scores=True, return_dict_in_generate=True).scores[0]
        answer(model, prompt, max_new_tokens=3)
    torch.testing.assert_close(got.float(), want, rtol=1e-3, atol=1e-3)
