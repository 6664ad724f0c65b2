"""KVSmooth's ranks and blends against the formula, by hand, and in a model."""

import torch

from tests.contract.test_contract import answer, build
from tests.models import picture_prompt
from vlmfix.hooks import KVSmooth
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

IMAGE = torch.tensor([[False, True]])
PROMPT = Geometry(IMAGE, IMAGE | True, IMAGE | True)
FLAT, SHARP, BETWEEN = [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]


def lams(one, rows):
    """What a layer smooths by, for weights of one head one after the other."""
    memo, seen = {}, []
    for row in rows:
        a = torch.tensor(row).view(1, 1, 1, -1)
        assert one.weights(a, Site(3, 32, PROMPT.fitted(4), torch.tensor([[True]]), 3, 0, memo, prompt=PROMPT)) is a
        seen.append(memo["lam"][3].item())
    return seen


def test_ranks_by_hand():
    """Of M = 4: the first has none below it; a flat row after a sharp one has one, and so on. Equal ones do not count."""
    free = KVSmooth(ref=0.5, radius=0.5, M=4)
    assert lams(free, [SHARP, FLAT, BETWEEN, FLAT, SHARP]) == [0.0, 0.25, 0.25, 0.5, 0.0]
    assert lams(KVSmooth(ref=0.5, radius=0.125, M=4), [SHARP, FLAT, FLAT]) == [0.375, 0.375, 0.375]
    # The first row has left the queue of two.
    assert lams(KVSmooth(ref=0.5, radius=0.5, M=2), [SHARP, FLAT, FLAT]) == [0.0, 0.5, 0.0]


def test_blend_by_hand():
    """The newest entry moves a quarter of the way; all others stay, to the bit."""
    memo = {"lam": {3: torch.tensor([0.25])}}
    keys, values = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    site = Site(3, 32, PROMPT.fitted(4), torch.tensor([[True]]), 3, 0, memo, prompt=PROMPT)
    k, v = KVSmooth().cache(keys, values, site)
    for new, old in ((k, keys), (v, values)):
        assert torch.equal(new[:, :, :-1], old[:, :, :-1])
        torch.testing.assert_close(new[:, :, -1], 0.75 * old[:, :, -1] + 0.25 * old[:, :, -2])


def test_smoothing_shows_at_the_third_token_in_its_layers_only():
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    settings = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    plain = answer(model, prompt, **settings)
    with KVSmooth(ref=0, radius=0)(model):
        assert all(map(torch.equal, answer(model, prompt, **settings).scores, plain.scores))
    with KVSmooth(ref=0.9, layers=(2,))(model):
        out = answer(model, prompt, **settings)
    n = prompt["input_ids"].shape[1]
    assert all(map(torch.equal, out.scores[:2], plain.scores[:2])) and not torch.equal(out.scores[2], plain.scores[2])
    for layer, (ours, untouched) in enumerate(
        zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True)
    ):
        assert torch.equal(ours.keys[:, :, :n], untouched.keys[:, :, :n])
        assert torch.equal(ours.keys[:, :, n], untouched.keys[:, :, n]) == (layer != 2)
    # The first two tokens are the same, so their raw keys are: the second smoothed one stands on the first smoothed one.
    raw, smooth = plain.past_key_values.layers[2].values, out.past_key_values.layers[2].values
    lam = ((raw - smooth)[:, :, n] / (raw[:, :, n] - raw[:, :, n - 1])).mean((1, 2))
    torch.testing.assert_close(lam, torch.full((2,), 0.7), rtol=1e-3, atol=1e-3)


def test_layers_and_control():
    assert KVSmooth().at_layers(32) == range(3, 31) and KVSmooth().at_layers(36) == range(3, 35)
    assert KVSmooth().controls() == (KVSmooth(radius=0.0),) and KVSmooth(radius=0.0).controls() == ()
