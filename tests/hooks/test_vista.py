"""VISTA's two halves against their formulas, by hand, and against passes of the plain model."""

import pytest
import torch

from tests.contract.test_contract import answer, build, logits
from tests.models import IMAGE, picture_prompt
from vlmfix.hooks import VISTA
from vlmfix.hooks.vista import steered
from vlmfix.method.site import Step
from vlmfix.model.anatomy import anatomy


def test_worked_rows():
    """x = (3, 4) towards (1, 0), and, pushed twice as far where it points away, towards (-1, 0)."""
    x = torch.tensor([[[3.0, 4.0]]])
    out = steered(x, torch.tensor([[[2.0, 0.0]]]), 0.1)
    torch.testing.assert_close(out, torch.tensor([[[3.2925, 3.7629]]]), rtol=0, atol=1e-4)
    away = steered(x, torch.tensor([[[-5.0, 0.0]]]), 0.1)
    torch.testing.assert_close(away, torch.tensor([[[2.4096, 4.3811]]]), rtol=0, atol=1e-4)
    many = torch.randn(2, 5, 8)
    torch.testing.assert_close(steered(many, torch.randn(2, 1, 8), 0.7).norm(dim=-1), many.norm(dim=-1))
    torch.testing.assert_close(steered(many, torch.randn(2, 1, 8), 0.0), many)


def test_the_mixture_by_hand():
    """0.5 of the last layer, 0.25 of each of two others."""
    step = Step(0, {}, {1: torch.tensor([[0.0, 4.0]]), 2: torch.tensor([[2.0, 0.0]])}, has_image=torch.tensor([True]),
                head=lambda h, norm: h, as_logits=True)  # fmt: skip
    out = VISTA(gamma=0.5).logits(torch.tensor([[1.0, 1.0]]), step)
    assert out.tolist() == [[1.0, 1.5]]


@torch.no_grad()
def test_directions_are_differences_of_layer_outputs():
    """Against hidden states of two plain passes, and the steered model against the formula written out."""
    model = build("llava")
    prompt = picture_prompt(model)
    keep = prompt["input_ids"][0] != IMAGE
    ids = prompt["input_ids"][:, keep]
    seeing = model(**prompt, output_hidden_states=True).hidden_states
    blind = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    v = seeing[2][:, -1] - blind[2][:, -1]  # of layer 1
    with VISTA(lam=0.5, gamma=0, layers=(1,))(model):
        ours = logits(model, prompt)
    mlp = model.get_decoder().layers[1].mlp
    handle = mlp.register_forward_hook(lambda _, x, out: steered(out, v[:, None], 0.5))
    by_hand = logits(model, prompt)
    handle.remove()
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(model, prompt), atol=1e-2)
    with VISTA(lam=0.5, gamma=0, layers=(0,))(model):
        paper = logits(model, prompt)
    with VISTA(lam=0.5, gamma=0, layers=(0,), variant="release")(model):
        assert not torch.equal(logits(model, prompt), paper), "1 on the first coordinate of the first layer"


def test_nothing_is_nothing_and_text_is_left_alone():
    model = build("llava")
    prompt = picture_prompt(model)
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    settings = {"max_new_tokens": 3, "output_scores": True, "return_dict_in_generate": True}
    plain, of_text = (answer(model, p, **settings).scores for p in (prompt, text))
    with VISTA(lam=0, gamma=0)(model):
        assert all(map(torch.equal, answer(model, prompt, **settings).scores, plain))
    with pytest.warns(UserWarning, match="the prompts held no image tokens"), VISTA(lam=1.0, gamma=0.5)(model):
        assert all(map(torch.equal, answer(model, text, **settings).scores, of_text))


def test_layers_and_controls():
    model = build("llava")
    one, _ = VISTA().resolve(model, anatomy(model))
    assert one.layers == (0, 1, 2, 3) and one.window == (2,)

    class Deep:
        layers = range(32)

    assert VISTA().resolve(model, Deep)[0].window == (25, 26, 27, 28, 29, 30)
    assert VISTA().controls() == (VISTA(select="random"), VISTA(lam=0.0), VISTA(gamma=0.0))
