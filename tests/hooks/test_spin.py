"""SPIN's edit against its formula, by hand, and in a model."""

import pytest
import torch

from tests.contract.test_contract import answer, build
from tests.models import llava, picture_prompt
from vlmfix.hooks import SPIN
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry


def edited(one, s, image=(False, True, True)):
    image = torch.tensor([image])
    site = Site(1, 4, Geometry(image, image | True, image | True), torch.tensor([[True]]), 0, 0, {}, n_prompt=1)
    assert one.rank_by == "mass" or one.scores(s, site) is s
    return one.weights(s.softmax(-1), site) / s.softmax(-1)


def test_worked_rows():
    """Image scores of four heads sum to 3, -1, 2 and 0: with r = 1/2 the second and the last are quietened."""
    s = torch.tensor([[9.0, 1.0, 2.0], [-9.0, -2.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).view(1, 4, 1, 3)
    assert edited(SPIN(r=0.5, eps=0.25), s)[0, :, 0, 0].tolist() == [1.0, 0.25, 1.0, 0.25]
    assert edited(SPIN(r=0.5, eps=0.25, select="most"), s)[0, :, 0, 0].tolist() == [0.25, 1.0, 0.25, 1.0]
    assert edited(SPIN(r=0.5, eps=0.0), s, (False, False, False)).eq(1).all(), "no image"
    # By weights the first head, which looks at the text, is the last of all, and then the last one.
    assert edited(SPIN(r=0.5, eps=0.25, rank_by="mass"), s)[0, :, 0, 0].tolist() == [0.25, 1.0, 1.0, 0.25]


def test_how_many_heads_stay():
    """Rounded down, as released: 30 of 32 with 0.95."""
    s = torch.randn(1, 32, 1, 3)
    assert edited(SPIN(), s)[0, :, 0, 0].eq(1).sum() == 30 and edited(SPIN(r=0.8), s)[0, :, 0, 0].eq(1).sum() == 25


def test_keys_that_a_row_may_not_see_count_nothing():
    s = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    s[..., 2] = torch.finfo(s.dtype).min
    one, image = SPIN(r=0.5, eps=0.5), torch.tensor([[False, True, True]])
    site = Site(1, 4, Geometry(image, image | True, image | True), torch.tensor([[True]]), 0, 0, {}, n_prompt=1)
    one.scores(s, site)
    assert site.memo["e"][1].flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("nothing", [SPIN(eps=1.0), SPIN(r=1.0)])
def test_identity(nothing):
    model = llava()
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        with nothing(model):
            assert torch.equal(model(**prompt).logits, plain)
        with SPIN(r=0.5, eps=0.0)(model):
            out = model(**prompt).logits
    assert torch.equal(out[:, :-1], plain[:, :-1]) and not torch.equal(out[:, -1], plain[:, -1])


def test_weights_are_head_outputs():
    """Quietened weights are quietened inputs of the output projection: one layer, checked against the plain model."""
    model = build("llava")
    prompt, joined = picture_prompt(model), []
    handle = model.get_decoder().layers[3].self_attn.o_proj.register_forward_pre_hook(lambda _, x: joined.append(x[0]))
    answer(model, prompt, max_new_tokens=1)
    with SPIN(r=0.5, eps=0.5, layers=(3,))(model):
        answer(model, prompt, max_new_tokens=1)
    handle.remove()
    ratio = (joined[1] / joined[0])[0, -1].view(6, 8).mean(1)
    assert sorted(ratio.tolist()) == pytest.approx([0.5] * 3 + [1.0] * 3, rel=1e-3)
