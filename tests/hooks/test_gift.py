"""GIFT's map and edit against the formulas, by hand, and in a model."""

from types import SimpleNamespace

import pytest
import torch

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.hooks import GIFT
from vlmfix.hooks.gift import gaze_map, mirrored
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

IMAGE = torch.tensor([[False, True, True, True, False, False]])
PROMPT = Geometry(IMAGE, IMAGE | True, IMAGE | True)


def site(layer, memo, rows, picked=None, n_prompt=6):
    admitted = torch.zeros(1, rows, dtype=torch.bool)
    admitted[:, -1] = True
    return Site(layer, 4, PROMPT, admitted, 0, 0, memo, n_prompt, picked=picked, prompt=PROMPT)


def test_map_by_hand():
    """Two of four heads have the largest sums, 6 and 9; their mean over image keys is 1, 2.5, 4, which becomes 0, .5, 1."""
    shifts = torch.zeros(1, 4, 6)
    shifts[0, :, 1:4] = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.1], [1.0, 3.0, 5.0], [1.0, 0.0, 0.0]])
    assert gaze_map(shifts, IMAGE).tolist() == [[0.0, 0.0, 0.5, 1.0, 0.0, 0.0]]
    assert mirrored(gaze_map(shifts, IMAGE), IMAGE).tolist() == [[0.0, 1.0, 0.5, 0.0, 0.0, 0.0]]
    assert gaze_map(torch.zeros(1, 4, 6), IMAGE).eq(0).all()


def test_far_values_are_cut_off():
    image = torch.ones(1, 100, dtype=torch.bool)
    shifts = torch.zeros(1, 2, 100)
    shifts[0, :, 0], shifts[0, :, 1] = 100.0, 10.0
    sigma = shifts[0, 0].std(correction=0)
    m = gaze_map(shifts, image)
    torch.testing.assert_close(m[0, 1], 10 / (shifts[0, 0].mean() + 3 * sigma))


def test_shifts_of_the_question_by_hand_in_one_piece_and_in_two():
    """Rows 4 and 5 are the question: against rows 3 and 4 only what rises counts."""
    a = torch.zeros(1, 1, 6, 6)
    a[0, 0, 3, 1:4] = torch.tensor([0.1, 0.2, 0.3])
    a[0, 0, 4, 1:4] = torch.tensor([0.3, 0.1, 0.3])
    a[0, 0, 5, 1:4] = torch.tensor([0.0, 0.5, 0.4])
    want = torch.tensor([[[0.0, 0.2, 0.4, 0.1, 0.0, 0.0]]])
    one = GIFT(look=1, layers=(2,))
    whole, pieces = {}, {}
    one.survey(a, site(1, whole, 6, torch.arange(6)))
    for part in torch.arange(6).split(5):
        one.survey(a[:, :, part], site(1, pieces, len(part), part))
    torch.testing.assert_close(whole["shifts"], want)
    torch.testing.assert_close(pieces["shifts"], want)


def test_worked_row():
    """Two heads; the first looks at the image most (.6), the second at the question (.5). With exp(alpha m) of 1, 2, 1
    the image part .2 + .2 + .2 becomes .8, r = 4/3, and both rows sum to 1 again."""
    a = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1, 0.0], [0.4, 0.1, 0.0, 0.0, 0.2, 0.3]]).view(1, 2, 1, 6)
    memo = {"gain": torch.tensor([[1.0, 1.0, 2.0, 1.0, 1.0, 1.0]])}
    out = GIFT(look=1, layers=(2,)).weights(a, site(2, memo, 1))[0, :, 0]
    torch.testing.assert_close(out[0], torch.tensor([0.3, 0.2, 0.4, 0.2, 0.1, 0.0]) / 1.2)
    torch.testing.assert_close(out[1], torch.tensor([0.4, 0.1, 0.0, 0.0, 0.8 / 3, 0.4]) / (0.5 + 2 / 3))


def test_layers():
    def resolved(one, n, attending=None):
        parts = SimpleNamespace(layers=range(n), attention_layers=tuple(attending or range(n)))
        one = one.resolve(None, parts)[0]
        return one.look, one.layers

    assert resolved(GIFT(), 32) == (11, tuple(range(12, 23)))
    assert resolved(GIFT(), 4) == (1, (2, 3)) and resolved(GIFT(), 4, (3,)) == (3, (3,))
    assert resolved(GIFT(), 8, (3, 7)) == (3, (3,)), "no layer with attention among those that follow"
    with pytest.raises(ValueError, match="look: expected a layer with attention, such as 7, got 4"):
        resolved(GIFT(look=4), 8, (3, 7))
    with pytest.raises(ValueError, match=r"layers: expected some from the one that is looked at on, 14, got"):
        resolved(GIFT(look=14, layers=(5, 6)), 28)


@torch.no_grad()
def test_in_a_model():
    """Rows before the last stay, strength 0 is nothing, and controls differ from the map."""
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain = model(**prompt).logits
    with GIFT(alpha=0)(model):
        assert torch.equal(model(**prompt).logits, plain)
    seen = {}
    for one in (GIFT(), *GIFT().controls()):
        with one(model):
            seen[one.select] = model(**prompt).logits
            assert [s["acted"] for s in vlmfix.effects(model)[0]["samples"]] == [True, True]
    assert list(seen) == ["gaze", "mirrored", "uniform"]
    for select, out in seen.items():
        assert torch.equal(out[:, :-1], plain[:, :-1]) and not torch.allclose(out[:, -1], plain[:, -1], atol=1e-3)
        assert select == "gaze" or not torch.allclose(out[:, -1], seen["gaze"][:, -1], atol=1e-3)
