"""TVAI's edit against its formula, by hand, and in a model."""

import torch

from tests.models import llava, picture_prompt
from vlmfix.hooks import PAI, TVAI
from vlmfix.method.site import Site
from vlmfix.model.anatomy import anatomy
from vlmfix.model.geometry import Geometry


def edited(one, layer, image=(False, True, False)):
    """Keys: system, image, question; one more is generated."""
    image = torch.tensor([image])
    prompt = Geometry(image, image | True, image | True)
    s = torch.tensor([2.0, -1.0, -2.0, 3.0]).view(1, 1, 1, 4)
    return one.scores(s, Site(layer, 8, prompt.fitted(4), torch.tensor([[True]]), 3, 0, {}, prompt=prompt)).flatten()


def test_worked_rows():
    """Text alone in layer 1, both in layer 2, the image alone in layer 3; what was generated stays."""
    one = TVAI(alpha=0.5, beta=0.25, text_layers=(1, 2), image_layers=(2, 3))
    assert one.at_layers(8) == [1, 2, 3]
    assert edited(one, 1).tolist() == [3.0, -1.0, -1.0, 3.0]
    assert edited(one, 2).tolist() == [3.0, -0.75, -1.0, 3.0]
    assert edited(one, 3).tolist() == [2.0, -0.75, -2.0, 3.0]
    assert edited(one, 2, (False, False, False)).tolist() == [2.0, -1.0, -2.0, 3.0], "no image"


def test_layers_at_the_same_depth():
    model = llava(n_layers=8)
    one, _ = TVAI().resolve(model, anatomy(model))
    assert (one.text_layers, one.image_layers) == ((1, 2, 3, 4, 5), (2, 3, 4, 5, 6, 7))


@torch.no_grad()
def test_the_image_alone_is_pai_and_nothing_is_nothing():
    model = llava()
    prompt = picture_prompt(model)
    plain = model(**prompt).logits
    with PAI(alpha=0.5, skip_first=1)(model):
        pai = model(**prompt).logits
    with TVAI(alpha=0, image_layers=(1, 2, 3))(model):
        assert torch.equal(model(**prompt).logits, pai)
    with TVAI(alpha=0, beta=0)(model):
        assert torch.equal(model(**prompt).logits, plain)
    assert TVAI().controls() == (TVAI(alpha=0.0), TVAI(beta=0.0)) and TVAI(alpha=0.0).controls() == ()
    assert TVAI(gamma=1.1).acts_at("begin") and not TVAI().acts_at("logits")
