"""Listed heads scaled: the same as scaled columns of the output projections, from names and from files."""

import pytest
import torch

import vlmfix
from tests.models import llava as tiny_llava
from tests.models import picture_prompt, qwen2_5_vl
from vlmfix.hooks import HeadGain


def listed(path, top=3, **more):
    """A head list of the tiny models, four layers of six heads; the best heads are L3H5, L3H4, L3H3."""
    from vlmfix.method.heads import HeadList

    scores = [[layer * 6.0 + head for head in range(6)] for layer in range(4)]
    HeadList(model="", tool="visual", scores=scores, data={"n": 3, "ids": ["x"]}, **more).select(top=top).save(path)
    return str(path)


@pytest.mark.parametrize("build", [tiny_llava, qwen2_5_vl])
def test_listed_heads_are_scaled_columns(build, tmp_path):
    """The same heads for every picture, which is the same as scaling columns of the output projections."""
    model = build()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain = model(**prompt).logits
    with torch.no_grad():
        for layer, head in ((1, 4), (3, 0), (3, 5)):
            vlmfix.engine.attachment.anatomy(model).layers[layer].out_proj.weight[:, head * 8 : head * 8 + 8] *= 3
    wanted = model(**prompt).logits
    model = build()
    passes = []
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    with HeadGain(head_list="L3H5/L1H4/L3H0", gain=2.99999)(model):
        found = model(**prompt).logits
        (did,) = vlmfix.effects(model)
    handle.remove()
    assert len(passes) == 1, "fixed heads need no image-free pass"
    assert did["samples"] == [{"acted": True, "layers": {3: {"heads": [5, 0]}, 1: {"heads": [4]}}}] * 2
    real = prompt["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=2e-3)
    assert (plain - found)[real].abs().max() > 0.1
    assert torch.equal(model(**prompt).logits, plain)


def test_listed_heads_from_a_file(tmp_path):
    path = listed(tmp_path / "heads.json")
    model = tiny_llava()
    prompt = picture_prompt(model)
    found = {}
    for spec in (
        f"headgain:head_list={path}",
        "headgain:head_list=L3H5/L3H4/L3H3",
        f"headgain:head_list={path},select=least",
    ):
        with vlmfix.engine.wrap.wrapped(model, spec):
            found[spec] = (model(**prompt).logits, vlmfix.effects(model)[0])
    (file, told), (named, _), (least, worst) = found.values()
    assert torch.equal(file, named) and not torch.equal(file, least)
    assert told["head_list"] == "L3H5/L3H4/L3H3" and worst["head_list"] == "L0H0/L0H1/L0H2"
    assert told["facts"]["head_list"]["file"] == path and worst["facts"]["select"] == "least"
    controls = HeadGain(head_list=path).controls()
    assert [c.select for c in controls] == ["random", "least", "listed"] and controls[2].gain == 1 / 1.5
    assert [c.select for c in HeadGain(head_list="L1H1").controls()] == ["random", "listed"]


def test_listed_heads_leave_text_alone_and_go_through_beams_and_pieces(tmp_path):
    model = tiny_llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    plain = model(**text).logits
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]}
    with HeadGain(head_list="L3H5/L1H4/L1H0/L2H2", gain=2)(model):
        assert torch.equal(model(**text).logits, plain)
        whole = model.generate(**prompt, **settings)
        beams = model.generate(**prompt, **settings, num_beams=3)
        one = {k: v[:1] for k, v in prompt.items()}
        assert torch.equal(model.generate(**one, **settings, num_beams=3), beams[:1])
    scaled = tiny_llava()
    with torch.no_grad():
        for layer, head in ((3, 5), (1, 4), (1, 0), (2, 2)):
            vlmfix.engine.attachment.anatomy(scaled).layers[layer].out_proj.weight[:, head * 8 : head * 8 + 8] *= 2
    assert torch.equal(scaled.generate(**prompt, **settings), whole)
    assert torch.equal(scaled.generate(**prompt, **settings, num_beams=3), beams)


def test_harmful_heads_are_to_be_weakened(tmp_path, recwarn):
    path = listed(tmp_path / "heads.json", direction="high is bad")
    vlmfix.wrap(tiny_llava(), HeadGain(head_list=path, gain=0.5))
    vlmfix.wrap(tiny_llava(), HeadGain(head_list=path, select="random"))
    assert not recwarn
    with pytest.warns(UserWarning, match="whose high scores are bad; weaken them, gain=0.5"):
        vlmfix.wrap(tiny_llava(), HeadGain(head_list=path))


def test_head_lists_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected head_list=FILE, made by vlmfix heads, .* got none"):
        vlmfix.wrap(tiny_llava(), HeadGain())
    with pytest.raises(ValueError, match=r"gain: expected a number above 0, or numbers .*, got 0"):
        HeadGain(head_list="L1H1", gain=0)
    with pytest.raises(ValueError, match=r"head_list: expected the file of a head list, .* got 3"):
        HeadGain(head_list=3)
    for spec, sentence in (("L9H0", "expected layers in 0..3 and heads in 0..5, got L9H0"), ("no.json", "cannot read")):
        with pytest.raises(ValueError, match=sentence):
            vlmfix.wrap(tiny_llava(), HeadGain(head_list=spec))
    path = listed(tmp_path / "heads.json")
    with pytest.raises(ValueError, match=r"made on .* with 4 layers x 6 heads, but this model has 2 x 6"):
        vlmfix.wrap(tiny_llava(n_layers=2), HeadGain(head_list=path))


def test_each_head_has_its_own_gain(tmp_path):
    """Gains in the order of the list; a list of the tool `gains` brings them along."""
    model = tiny_llava()
    prompt = picture_prompt(model)
    with vlmfix.engine.wrap.wrapped(model, "headgain:head_list=L1H2,gain=3+headgain:head_list=L3H0,gain=0.5"):
        apart = model(**prompt).logits
    with vlmfix.engine.wrap.wrapped(model, "headgain:head_list=L1H2/L3H0,gain=3/0.5"):
        together = model(**prompt).logits
    assert torch.equal(apart, together)
    path = listed(tmp_path / "heads.json")
    from vlmfix.method.heads import HeadList

    by_tool = HeadList.load(path)
    HeadList(model="", tool="gains", scores=by_tool.scores, selected=by_tool.selected).save(path)
    with HeadGain(head_list=path)(model):
        (did,) = vlmfix.effects(model)
    assert did["gain"] == [23.0, 22.0, 21.0]
    with pytest.raises(ValueError, match="one for each of the 2 heads, got 3"):
        vlmfix.wrap(model, "headgain:head_list=L1H2/L3H0,gain=1/2/3")
    assert HeadGain(head_list="L1H2/L3H0", gain=(2.0, 0.5)).controls()[-1].gain == (0.5, 2.0)
