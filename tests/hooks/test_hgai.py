"""HGAI's edit against its formula, by hand, and the properties that the formula implies."""

import torch

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.hooks import HGAI
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry


def edited(alpha, s, image, rows):
    ones = torch.ones_like(image)
    site = Site(2, 4, Geometry(image, ones, ones), rows, 0, 0, {}, n_prompt=s.shape[2])
    return site.admit(HGAI(alpha=alpha).scores(s, site), s)


def test_worked_example():
    """Two heads with 2 and -1 at one image key: both get 0.5 * 1.5. The other keys keep what they have."""
    s = torch.tensor([[4.0, 2.0], [4.0, -1.0]]).view(1, 2, 1, 2)
    image = torch.tensor([[False, True]])
    out = edited(0.5, s, image, torch.tensor([[True]]))
    assert out.flatten().tolist() == [4.0, 2.75, 4.0, -0.25]


def test_properties():
    s = torch.randn(2, 3, 4, 9)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[0, 2:6], image[1, 4:] = True, True
    rows = torch.tensor([[False, False, True, True], [False, True, False, True]])
    out = edited(0.7, s, image, rows)
    touched = (image[:, None] & rows[..., None])[:, None].expand_as(s)
    assert torch.equal(out[~touched], s[~touched]) and (out[touched] > s[touched]).all()
    push = out - s
    torch.testing.assert_close(push, push[:, :1].expand_as(push), msg="one map for all heads")
    alone = edited(0.7, s[:1], image[:1], rows[:1])
    assert torch.equal(alone, out[:1]), "samples of a batch do not see each other"
    assert torch.equal(edited(0.0, s, image, rows), s)
    assert torch.equal(edited(0.7, s, image & False, rows), s)


def test_layers_of_the_paper_and_at_the_same_depth():
    assert HGAI().at_layers(32) == range(5, 19) and HGAI(variant="adaiat").at_layers(32) == range(5, 18)
    assert HGAI().at_layers(40) == range(6, 23) and HGAI(layers=(3,)).at_layers(32) == (3,)


def test_no_push_is_the_untouched_model():
    model = llava()
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        with HGAI(alpha=0)(model):
            assert torch.equal(model(**prompt).logits, plain)
        with HGAI()(model):
            assert not torch.equal(model(**prompt).logits, plain)
            assert vlmfix.effects(model)[0]["samples"] == [{"acted": True}]


def test_control_turns_the_push_round():
    (control,) = HGAI(alpha=0.3).controls()
    assert control == HGAI(alpha=-0.3)
