"""IAT's edit against its formula, by hand, and in a model."""

import torch

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.hooks import IAT
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry


def test_worked_row():
    """Two keys of prompt, two of the answer: 2 becomes 2 + 0.8 * 2, and -1 becomes -0.2."""
    s = torch.tensor([3.0, -3.0, 2.0, -1.0]).view(1, 1, 1, 4)
    image = torch.tensor([[False, True]])
    prompt = Geometry(image, image | True, image | True)
    out = IAT().scores(s, Site(2, 4, prompt.fitted(4), torch.tensor([[True]]), 3, 0, {}, prompt=prompt))
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, -3.0, 3.6, -0.2]))


def test_one_word_answers_never_change_and_longer_ones_do():
    model = llava()
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        with IAT(alpha=3.0, layers=(0, 1, 2, 3))(model):
            assert torch.equal(model(**prompt).logits, plain)
        before = model.generate(
            **prompt, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        with IAT(alpha=3.0, layers=(0, 1, 2, 3))(model):
            after = model.generate(
                **prompt, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            assert vlmfix.effects(model)[0]["samples"] == [{"acted": True}]
    assert torch.equal(before.scores[0], after.scores[0]) and not torch.equal(before.scores[1], after.scores[1])


def test_layers_and_control():
    assert IAT().at_layers(32) == range(5, 18) and IAT(layers=(3,)).at_layers(32) == (3,)
    (control,) = IAT(alpha=1.0).controls()
    assert control == IAT(alpha=-0.5) and control.controls() == ()
