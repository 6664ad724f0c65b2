"""ACG's edit against its formula, by hand, and the properties that the formula implies."""

import pytest
import torch

from tests.models import llava, picture_prompt
from vlmfix.hooks import ACG
from vlmfix.hooks.acg import outputs
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry


def edited(one, a, values, image):
    site = Site(1, 4, Geometry(image, image | True, image | True), torch.tensor([[True]]), 0, 0, {}, 1, values=values)
    return one.weights(a, site)


def test_worked_row():
    """Text value (1, 0) with weight .4, image value (1, 1) with .6: O = (1, .6), U = (1, 0), dO = (0, .6), which has no
    part along U. With gamma 2 the output is (1, 1.8)."""
    a = torch.tensor([0.4, 0.6]).view(1, 1, 1, 2)
    values = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    image = torch.tensor([[False, True]])
    out = outputs(edited(ACG(gamma=2.0), a, values, image), values)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.8]))
    # With an image value of (3, 1), dO = (1.2, .6): only its second part stays.
    values[0, 0, 1] = torch.tensor([3.0, 1.0])
    out = outputs(edited(ACG(gamma=2.0), a, values, image), values)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.2, 0.6 + 1.2]))


@pytest.mark.parametrize("project", ["head", "concat"])
def test_what_is_added_is_orthogonal_to_the_output_without_image(project):
    torch.manual_seed(1)
    a, values = torch.randn(2, 6, 3, 9).softmax(-1), torch.randn(2, 2, 9, 8)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[0, 2:6] = True
    out = edited(ACG(gamma=1.5, project=project), a, values, image)
    text = a[:1] * ~image[:1, None, None]
    u = outputs(text / text.sum(-1, keepdim=True), values[:1])
    added = (outputs(out, values) - outputs(a, values))[:1]
    over = (-1, 1) if project == "concat" else -1
    assert (added * u).sum(over).abs().max() < 1e-4 and added.abs().max() > 0.1
    assert torch.equal(out[1], a[1]), "no image"


def test_layers_and_identity():
    model = llava()
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        with ACG(gamma=0.0)(model):
            assert torch.equal(model(**prompt).logits, plain)
        with ACG(layers=(2,))(model):
            out = model(**prompt).logits
    assert torch.equal(out[:, :-1], plain[:, :-1]) and not torch.allclose(out[:, -1], plain[:, -1], atol=1e-2)
    assert ACG(variant="fast").at_layers(32) == range(8) and ACG(variant="fast").gamma == 2.5
