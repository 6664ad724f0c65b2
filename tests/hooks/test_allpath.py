"""AllPath: the same as scaled columns of the output projections, and its published lists."""

from types import SimpleNamespace

import pytest
import torch

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.hooks import AllPath
from vlmfix.method.heads import parse_heads

PARTS = SimpleNamespace(layers=range(32), n_heads=32)
MODEL = SimpleNamespace(config=SimpleNamespace(_name_or_path="/models/llava-1.5-7b-hf/"))


def scaled(gains):
    model = llava()
    with torch.no_grad():
        for (layer, head), gain in gains.items():
            model.get_decoder().layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] *= gain
    return model


@torch.no_grad()
def test_constant_gains_are_scaled_columns():
    """A head in both lists is left alone; image rows are scaled as the others are."""
    prompt = picture_prompt(llava(), 2, lengths=[3, 6])
    want = scaled({(1, 4): 0, (2, 0): 2, (3, 5): 2})(**prompt).logits
    model = llava()
    plain = model(**prompt).logits
    with AllPath(bad="L1H4/L3H1", good="L2H0/L3H5/L3H1")(model):
        out = model(**prompt).logits
        assert [s["acted"] for s in vlmfix.effects(model)[0]["samples"]] == [True, True]
    real = prompt["attention_mask"].bool()
    torch.testing.assert_close(out[real], want[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[real], out[real], atol=1e-2)
    with AllPath(bad="L1H4", good="L2H0", gain=1, bad_gain=1)(model):
        assert torch.equal(model(**prompt).logits, plain)


@torch.no_grad()
def test_norm_keeps_the_layers_mean_factor_at_one():
    """One head of six doubled: 12/7 and 6/7."""
    prompt = picture_prompt(llava())
    want = scaled({(2, head): 12 / 7 if head == 0 else 6 / 7 for head in range(6)})(**prompt).logits
    model = llava()
    with AllPath(good="L2H0", norm=True)(model):
        torch.testing.assert_close(model(**prompt).logits, want, rtol=1e-4, atol=1e-4)


def test_published_lists_by_task():
    one, facts = AllPath().resolve(MODEL, PARTS)
    bad, good = parse_heads(one.bad), parse_heads(one.good)
    assert bad[0] == (27, 29) and not set(bad) & set(good) and len(bad) == 40
    assert (20, 28) in good and len(good) == len(set(good)) == 89, "one of 40 text heads is among the 50 image heads"
    assert facts["heads_origin"] == "published for llava-1.5-7b, chair"
    pope = AllPath(task="pope").resolve(MODEL, PARTS)[0]
    assert parse_heads(pope.bad)[0] == (19, 22) and pope.good != one.good
    with pytest.raises(ValueError, match=r"allpath: the authors published heads for llava-1.5-7b"):
        AllPath().resolve(SimpleNamespace(config=SimpleNamespace(_name_or_path="other")), PARTS)


def test_controls_and_mistakes():
    one = AllPath(bad="L1H4", good="L2H0/L3H5")
    random, exchanged = one.controls()
    assert exchanged == AllPath(bad="L2H0/L3H5", good="L1H4")
    resolved = random.resolve(llava(), SimpleNamespace(layers=range(4), n_heads=6))[0]
    assert (resolved.bad.count("/"), resolved.good.count("/")) == (0, 1) and resolved.bad != one.bad
    with pytest.raises(ValueError, match="every head is in both lists"):
        vlmfix.wrap(llava(), AllPath(bad="L1H4", good="L1H4"))
