"""VAF's edit against its formula, by hand, and the properties that the formula implies."""

import torch

from tests.models import llava, picture_prompt
from vlmfix.hooks import VAF
from vlmfix.method.site import Site
from vlmfix.model.anatomy import anatomy
from vlmfix.model.geometry import Geometry


def edited(one, s, image, rows):
    ones = torch.ones_like(image)
    site = Site(2, 4, Geometry(image, ones, ones), rows, 0, 0, {}, n_prompt=s.shape[2])
    return site.admit(one.scores(s, site), s)


def test_worked_row():
    """Keys: system, image, image, question. Signs stay: -1 becomes -1.15, and a system score of -2 becomes -1.9."""
    s = torch.tensor([-2.0, -1.0, 2.0, 3.0]).view(1, 1, 1, 4)
    out = edited(VAF(), s, torch.tensor([[False, True, True, False]]), torch.tensor([[True]]))
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.9, -1.15, 2.3, 3.0]))


def test_rows_and_samples_that_are_not_meant_stay():
    s = torch.randn(2, 3, 4, 9)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[0, 2:6] = True
    rows = torch.tensor([[False, False, True, True], [True, True, True, True]])
    out = edited(VAF(), s, image, rows)
    assert torch.equal(out[0, :, :2], s[0, :, :2]) and not torch.equal(out[0, :, 2:], s[0, :, 2:])
    assert torch.equal(out[1], s[1]), "no image, so nothing to amplify"
    assert torch.equal(out[0, :, :, 6:], s[0, :, :, 6:]), "the question's keys"


def test_layers_at_the_same_depth():
    model = llava(n_layers=8)
    one, facts = VAF().resolve(model, anatomy(model))
    assert one.layers == (2, 3, 4) and facts == {"layers_origin": "depth"}
    assert VAF(layers=(5,)).resolve(model, anatomy(model))[0].layers == (5,)


def test_factors_of_one_are_the_untouched_model():
    model = llava()
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        with VAF(enh=1, sup=1, layers=(1,))(model):
            assert torch.equal(model(**prompt).logits, plain)
        with VAF(layers=(1, 2))(model):
            assert not torch.equal(model(**prompt).logits, plain)


def test_control_turns_both_factors_round():
    (control,) = VAF(enh=1.25, sup=0.5).controls()
    assert control == VAF(enh=0.8, sup=2.0)
