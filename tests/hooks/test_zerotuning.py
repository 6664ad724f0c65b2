"""ZeroTuning against its formula, by hand and in a model, and the properties of its rule."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import vlmfix
from tests.models import answer, edited_as_a_whole, llava, picture_prompt
from vlmfix.hooks import ZeroTuning
from vlmfix.method.heads import HeadList
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

ALL = {"layers": (2,)}


def scores(batch=2, h=3, n=9, seed=0):
    s = torch.randn(batch, h, n, n, generator=torch.Generator().manual_seed(seed))
    return s.masked_fill(torch.arange(n) > torch.arange(n)[:, None], torch.finfo(s.dtype).min)


def edited(one, s, valid=None, image=None, memo=None):
    n = s.shape[-1]
    valid = torch.ones(len(s), n, dtype=torch.bool) if valid is None else valid
    image = torch.zeros_like(valid) if image is None else image
    rows = valid[:, n - s.shape[2] :]
    memo = {} if memo is None else memo
    site = Site(2, 4, Geometry(image, valid, valid), rows, 0, 0, memo, n_prompt=s.shape[2])
    return site.admit(one.scores(s, site), s)


def test_worked_row():
    s = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 1, 1, 3)
    out = edited(ZeroTuning(gamma=0.5, **ALL), s).softmax(-1).flatten()
    torch.testing.assert_close(out, torch.tensor([0.428571, 0.428571, 0.142857]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.5, 4.0])
def test_the_formula_and_what_follows_from_it(gamma):
    s = scores()
    a, one = s.softmax(-1), ZeroTuning(gamma=gamma, **ALL)
    out = edited(one, s).softmax(-1)
    d = 1 + (gamma - 1) * a[..., :1]
    want = torch.cat([gamma * a[..., :1], a[..., 1:]], dim=-1) / d  # the weights after the softmax, as the code has it
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]))
    torch.testing.assert_close(out[..., 0, :], a[..., 0, :], rtol=0, atol=0)
    torch.testing.assert_close(out[..., -1, 2:] / out[..., -1, 1:-1], a[..., -1, 2:] / a[..., -1, 1:-1])
    back = edited(replace(one, gamma=1 / gamma), edited(one, s))
    torch.testing.assert_close(back.softmax(-1), a, rtol=0, atol=1e-6)
    twice = edited(replace(one, gamma=1.7), edited(one, s))
    torch.testing.assert_close(twice, edited(replace(one, gamma=1.7 * gamma), s), rtol=0, atol=1e-6)


def test_the_first_key_grows_with_gamma():
    s = scores()
    first = [edited(ZeroTuning(gamma=g, **ALL), s).softmax(-1)[..., 1:, 0] for g in (0.1, 0.5, 0.9, 1.1, 3.0)]
    assert all((low < high).all() for low, high in pairwise(first))


def test_only_listed_heads_and_admitted_rows():
    s, one = scores(), ZeroTuning(gamma=3.0, head_list="L2H0/L2H2/L1H1", **ALL)
    out = edited(one, s)
    assert torch.equal(out[:, 1], s[:, 1]) and not torch.equal(out[:, 0], s[:, 0])
    assert torch.equal(out[:, :, :, 1:], s[:, :, :, 1:])


def test_padding_shifts_the_first_key():
    s = torch.randn(2, 3, 9, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    out = edited(ZeroTuning(gamma=math.e, **ALL), s, valid)
    changed = (out != s).any(1)
    assert changed[0, :, 0].all() and not changed[0, :, 1:].any()
    assert changed[1, 4:, 4].all() and changed[1].sum() == 5, "padding rows stay"


def test_spans():
    s = scores(batch=1)[:, :, -1:]
    image = (torch.arange(9) // 3 == 1)[None]

    def keys(span):
        memo = {}
        out = edited(ZeroTuning(gamma=2.0, span=span, **ALL), s, image=image, memo=memo)
        return (out != s)[0, 0, 0].nonzero()[:, 0].tolist()

    assert keys("first") == [0] and keys("image") == [3, 4, 5] and keys("system") == [0, 1, 2]
    assert keys((1, 4)) == [1, 2, 3]
    one = ZeroTuning(gamma=2.0, span="image", **ALL)
    out = edited(one, s, image=image).softmax(-1)
    a = s.softmax(-1)
    torch.testing.assert_close(out, a * (1 + image) / (1 + (a * image).sum(-1, keepdim=True)))


def test_a_window_without_the_first_key():
    whole = Geometry(*(torch.ones(1, 12, dtype=torch.bool) for _ in range(3)))
    window = Geometry(whole.image & False, whole.prompt, whole.valid).last_keys(5)
    assert window.order.tolist() == [[7, 8, 9, 10, 11]] and window.system.all()
    s = scores(batch=1, n=5)
    site = Site(2, 4, window, torch.ones(1, 5, dtype=torch.bool), 11, 7, {}, prompt=whole)
    out = ZeroTuning(gamma=3.0, **ALL).scores(s, site)
    assert torch.equal(out, s)


def test_windows_keep_what_their_keys_are():
    """The system text and the instruction of a layer with a window: the image may lie before it."""
    image = (torch.arange(10) // 2 == 1)[None]
    ones = torch.ones_like(image)
    whole = Geometry(image, ones, ones)
    for n in (10, 8, 5):
        part = whole.last_keys(n)
        assert torch.equal(part.instruction, whole.instruction[:, -n:]) and part.instruction.sum() == min(n, 6)
        assert torch.equal(part.system, whole.system[:, -n:])


def test_equals_an_edit_of_the_whole_matrix(monkeypatch):
    """Prompt and answer in eager attention, weights multiplied and divided over all queries and keys."""

    def edit(a, layer, n):
        if layer in (1, 3):
            a[:, (0, 4), :, 0] *= 6.0
            a = a / a.sum(-1, keepdim=True)
        return a

    one = ZeroTuning(gamma=6.0, head_list=(0, 4), layers=(1, 3))
    got, want, plain = edited_as_a_whole(monkeypatch, one, edit)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, want, atol=1e-2)


@torch.no_grad()
def test_a_factor_of_one_is_the_untouched_model():
    model, prompt = llava(), picture_prompt(llava())
    plain = model(**prompt).logits
    with ZeroTuning(gamma=1.0)(model):
        assert torch.equal(model(**prompt).logits, plain)


def test_heads(tmp_path):
    model = llava()
    vlmfix.wrap(model, ZeroTuning(head_list=(1, 5), layers=(0, 2)))
    (said,) = vlmfix.effects(model)
    assert said["head_list"] == "L0H1/L0H5/L2H1/L2H5" and said["layers"] == [0, 2]
    vlmfix.wrap(model, "zerotuning:gamma=2,head_list=1/5,layers=0")
    assert vlmfix.effects(model)[0]["head_list"] == "L0H1/L0H5"
    vlmfix.wrap(model, "zerotuning:head_list=1/5,layers=0,select=random")
    assert vlmfix.effects(model)[0]["head_list"].count("H") == 2
    path = str(tmp_path / "heads.json")
    HeadList(model="", tool="zerotuning", scores=((1.0,) * 6,) * 4).select(top=7).save(path)
    turned, random = ZeroTuning(gamma=4.0, head_list=path).controls()
    assert turned.gamma == 0.25 and random.select == "random"
    names = []
    for one in (ZeroTuning(head_list=path), random):
        vlmfix.wrap(model, one)
        names.append(vlmfix.effects(model)[0]["head_list"])
    assert names[0] == "L0H0/L0H1/L0H2/L0H3/L0H4/L0H5/L1H0" and names[1].count("H") == 7 and names[1] != names[0]
    assert [c.gamma for c in ZeroTuning(gamma=2.0).controls()] == [0.5]
    assert ZeroTuning(head_list=((1, 2),)).head_list == "L1H2"


def test_refusals():
    for settings, sentence in [
        ({"gamma": 0}, "gamma: expected a number above 0, got 0"),
        ({"gamma": math.inf}, "gamma: expected a number above 0"),
        ({"gamma": math.nan}, "gamma: expected a number above 0"),
        ({"head_list": ()}, "no head_list"),
        ({"layers": ()}, "no layers"),
        ({"span": "last"}, "span: expected first, image or system, or 2 numbers such as 1/2, got 'last'"),
        ({"span": (4, 2)}, "span: expected two rising numbers"),
        ({"span": (1, 2, 3)}, "span: expected"),
        ({"select": "random"}, "needs a head_list"),
        ({"select": "best"}, "select: expected given or random"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ZeroTuning(**settings)
    model = llava()
    for one, sentence in [
        (ZeroTuning(layers=(4,)), r"layers: expected numbers in 0\.\.3, got \[4\]"),
        (ZeroTuning(head_list=(6,)), r"heads in 0\.\.5, got L0H6"),
        (ZeroTuning(head_list="L3H1", layers=(1,)), "none of L3H1 lies in the layers"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            vlmfix.wrap(model, one)
    text = {"input_ids": torch.tensor([[1, 4, 9, 12, 7, 7, 30]])}
    with ZeroTuning(span="image")(model), pytest.warns(UserWarning, match="held no keys of the span image"):
        answer(model, text)
