"""AD-HH's edit against its formula, by hand, and its published lists."""

from types import SimpleNamespace

import pytest
import torch

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.hooks import ADHH
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

EVERY = "/".join(f"L{layer}H{head}" for layer in range(4) for head in range(6))


def edited(one, a, image=(False, True, False)):
    """Keys of the prompt: system, image, instruction; one more is generated."""
    image = torch.tensor([image])
    prompt = Geometry(image, image | True, image | True)
    return one.weights(a, Site(1, 4, prompt.fitted(4), torch.tensor([[True]]), 3, 0, {}, prompt=prompt))


def test_worked_row():
    """Text has .3 + .2: reached, so it goes and nothing comes in its place; the head that is not listed stays."""
    a = torch.tensor([0.2, 0.3, 0.3, 0.2]).expand(1, 2, 1, 4)
    out = edited(ADHH(head_list="L1H0"), a)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([[0.2, 0.3, 0.0, 0.0], [0.2, 0.3, 0.3, 0.2]]))
    assert torch.equal(edited(ADHH(head_list="L1H0", tau=0.51), a), a), "not reached"
    renormed = edited(ADHH(head_list="L1H0", renorm=True), a)
    torch.testing.assert_close(renormed[0, 0, 0], torch.tensor([0.4, 0.6, 0.0, 0.0]))
    assert torch.equal(edited(ADHH(head_list="L1H0"), a, (False, False, False)), a), "no image"


def test_in_a_model_with_a_threshold_that_nobody_reaches():
    model = llava()
    prompt = picture_prompt(model)
    with torch.no_grad():
        plain = model(**prompt).logits
        with ADHH(head_list=EVERY, tau=1.1)(model):
            assert torch.equal(model(**prompt).logits, plain)
        with ADHH(head_list=EVERY, tau=0.0)(model):
            assert not torch.equal(model(**prompt).logits[:, -1], plain[:, -1])
            assert torch.equal(model(**prompt).logits[:, :-1], plain[:, :-1])


def test_published_lists_are_for_their_checkpoints_only():
    parts = SimpleNamespace(layers=range(32), n_heads=32)
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="llava-hf/llava-1.5-7b-hf"))
    one, facts = ADHH().resolve(model, parts)
    assert one.head_list.startswith("L16H29/L26H9/") and one.head_list.count("/") == 19
    assert facts["heads_origin"] == "published for llava-1.5-7b"
    for name, shape in (
        ("llava-hf/llava-1.5-7b-hf", (32, 16)),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", (32, 32)),
        ("", (32, 32)),
    ):
        model.config._name_or_path = name
        with pytest.raises(ValueError, match=r"adhh: the authors published heads for .*give heads of its own"):
            ADHH().resolve(model, SimpleNamespace(layers=range(shape[0]), n_heads=shape[1]))


def test_controls():
    one = ADHH(head_list="L1H0/L2H3")
    (control,) = one.controls()
    vlmfix.wrap(llava(), control)
    resolved, facts = control.resolve(llava(), SimpleNamespace(layers=range(4), n_heads=6))
    assert resolved.head_list.count("/") == 1 and facts["select"] == "random"
