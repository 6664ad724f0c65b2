"""PAINT against vectors made with the authors' released functions, and the properties that its rule implies."""

import warnings

import pytest
import torch

import vlmfix
from tests import vectors
from tests.models import llava, llava_next, picture_prompt, qwen2_5_vl
from vlmfix.hooks import PAINT, Contrast
from vlmfix.hooks.contrast import contrasted
from vlmfix.hooks.paint import choose
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

pytestmark = pytest.mark.filterwarnings("ignore:PAINT with alpha")
SELECT = vectors.load("paint_select")


def case_of(arrays, name):
    return {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(name + "/")}


@torch.no_grad()
def logits(model, prompt):
    return model(**prompt).logits


def told(model):
    return vlmfix.effects(model)[0]["samples"]


# ---- against the released code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECT[1])
def test_choice(name):
    v, case = case_of(SELECT[0], name), SELECT[1][name]
    first, late = (v[k].reshape(-1, case["heads"], 1 + case["N"]).sum(1)[:, 1:] for k in ("cls_local", "cls_summary"))
    local, summary = choose(first, late, case["rho"])
    if "local_mask" in v:
        assert torch.equal(local, v["local_mask"]) and torch.equal(summary, v["summary_mask"])
    else:
        assert local[0].nonzero()[:, 0].tolist() == v["local"].tolist()
        assert summary[0].nonzero()[:, 0].tolist() == v["summary"].tolist()
    assert not (local & summary).any()


@pytest.mark.parametrize("name", vectors.load("paint_attn")[1])
def test_one_attention_layer(name):
    arrays, cases, _ = vectors.load("paint_attn")
    v, case = case_of(arrays, name), cases[name]
    keys = (v["local_keys"], v["summary_keys"])
    paint = PAINT(alpha=case["alpha"], beta=case["beta"])
    memo = {"keys": keys, "boost": case["alpha"] * keys[0] + case["beta"] * keys[1], "shares": {}}
    ones = torch.ones_like(keys[0])
    geometry = Geometry(keys[0] | keys[1], ones, ones)

    def weights(q, k, row, start):
        n, m = q.shape[2], k.shape[2]
        s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        s = s.masked_fill(torch.arange(m) > torch.arange(n)[:, None] + start, torch.finfo(s.dtype).min)
        rows = torch.zeros(1, n, dtype=torch.bool)
        rows[:, row] = True
        site = Site(2, 4, geometry.fitted(m), rows, start, 0, memo, n_prompt=0 if start else n)
        return site.admit(paint.scores(s, site), s).softmax(-1)

    a = weights(v["q"], v["k"], -1, 0)
    torch.testing.assert_close(a, v["attn_on"], rtol=0, atol=1e-6)
    assert not torch.allclose(a[:, :, -1], v["attn_off"][:, :, -1], atol=1e-3)
    torch.testing.assert_close(a[:, :, :-1], v["attn_off"][:, :, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(v["q_decode"], v["k_decode"], 0, case["T"]), v["attn_decode"], rtol=0, atol=1e-6)
    torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:3]))


@pytest.mark.parametrize("name", vectors.load("paint_guidance")[1])
def test_guidance(name):
    """Ours are log-probabilities again: the same up to a constant. With gamma 1 there is no second stream at all."""
    arrays, cases, _ = vectors.load("paint_guidance")
    v, gamma = case_of(arrays, name), cases[name]["gamma"]
    if gamma == 1:
        torch.testing.assert_close(v["logits_image"].log_softmax(-1), v["scores"], rtol=0, atol=1e-5)
        return
    out = contrasted(v["logits_image"], v["logits_text"], gamma - 1, Contrast().beta)
    assert torch.equal(out.isinf(), v["scores"].isinf())
    torch.testing.assert_close(out, v["scores"].log_softmax(-1), rtol=0, atol=1e-5)


def test_inside_a_decoder():
    arrays, cases, _ = vectors.load("paint_e2e")
    v, case = case_of(arrays, "e2e"), cases["e2e"]

    class Given(PAINT):
        """The tokens come with the vectors, since this model sees nothing."""

        def resolve(self, model, anatomy, processor=None):
            return self, {}

        def keys(self, prompt, memo):
            return v["local_keys_0"][None], v["summary_keys_0"][None]

    model = vectors.llama(arrays, case["config"])
    prompt = {"inputs_embeds": v["emb_0"][None], "image_mask": v["image_0"][None]}
    settings = {"alpha": case["alpha"], "beta": case["beta"], "layers": tuple(case["layers"])}
    with Given(**settings)(model):
        prefill, tokens, steps = vectors.greedy(model, case["steps"], **prompt)
    torch.testing.assert_close(prefill, v["prefill_0"], rtol=0, atol=1e-4)
    assert tokens == v["tokens_0"].tolist()
    torch.testing.assert_close(steps, v["steps_0"], rtol=0, atol=1e-4)
    with Given(**settings, gamma=case["gamma"])(model):
        guided = model.generate(**prompt, max_new_tokens=case["steps"], do_sample=False, eos_token_id=None)
    assert guided[0].tolist() == v["tokens_cfg_0"].tolist()


def test_inside_a_vlm():
    arrays, cases, _ = vectors.load("var_vhr_paint_llava")
    v, case = case_of(arrays, "llava"), cases["llava"]
    model = vectors.llava(arrays, case)
    prompt = {"input_ids": v["input_ids_0"][None], "pixel_values": v["pixel_values_0"][None]}
    settings = {**case["paint"], "layers": tuple(case["paint"]["layers"])}
    with PAINT(**{**settings, "gamma": None})(model):
        prefill, tokens, steps = vectors.greedy(model, case["steps"], **prompt)
        keys = vlmfix.engine.attachment.attached(model).last().memos[0]["keys"]
        (sample,) = told(model)
    image = prompt["input_ids"] == case["image_token_index"]
    for found, want in zip(keys, (v["paint_local_0"], v["paint_summary_0"]), strict=True):
        assert torch.equal(found[image], want) and not found[~image].any()
    assert sample["local"] == [int(v["paint_local_0"].sum())] and sample["summary"] == [int(v["paint_summary_0"].sum())]
    torch.testing.assert_close(prefill, v["paint_prefill_0"], rtol=0, atol=1e-4)
    assert tokens == v["paint_tokens_0"].tolist()
    torch.testing.assert_close(steps, v["paint_steps_0"], rtol=0, atol=1e-4)
    with PAINT(**settings)(model):
        guided = model.generate(**prompt, max_new_tokens=case["steps"], do_sample=False, eos_token_id=None)
    assert guided[0, prompt["input_ids"].shape[1] :].tolist() == v["paint_tokens_guided_0"].tolist()


# ---- properties ------------------------------------------------------------------------------------------------------


def test_choice_by_hand():
    first = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0]])
    late = torch.tensor([[9.0, 1.0, 1.1, 1.0, 1.2, 1.0, 1.1, 1.0]])
    local, summary = choose(first, late, 0.4)
    assert summary[0].nonzero()[:, 0].tolist() == [0] and local[0].nonzero()[:, 0].tolist() == [2, 3], "S wins"
    local, summary = choose(first, torch.ones(1, 8), 0.4)
    assert not summary.any() and local.sum() == int(8 * 0.4), "no outliers in a flat row"
    late[:, :3] = float("nan")
    assert choose(first, late, 1.0)[0].sum() == 8, "no error"


def test_selection_equals_the_towers_own_maps():
    """The class token's rows recomputed in float32 are those of eager attention."""
    from vlmfix.hooks.parts.tower import class_attention, tower

    model = llava("eager")
    pixels = picture_prompt(model, 3)["pixel_values"]
    vision, layers = tower(model)
    with torch.no_grad():
        out = vision(pixels, output_attentions=True, output_hidden_states=True)
        for i, layer in enumerate(layers):
            torch.testing.assert_close(
                class_attention(layer, out.hidden_states[i]), out.attentions[i][:, :, 0, 1:].sum(1)
            )


def test_nothing_to_do_changes_nothing():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain = logits(model, prompt)
    for idle in (PAINT(alpha=0, beta=0), PAINT(layers=())):
        with idle(model):
            assert torch.equal(logits(model, prompt), plain)
    text = {"input_ids": prompt["input_ids"].clamp(max=50)}
    plain = logits(model, text)
    with PAINT()(model):
        assert torch.equal(logits(model, text), plain) and told(model) == []


def test_only_the_last_row_and_these_layers_change():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    outs = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outs.append(args[0]))
        for layer in model.get_decoder().layers
    ]
    logits(model, prompt)
    with PAINT(layers=(1, 2), rho=1.0)(model):
        logits(model, prompt)
    [h.remove() for h in hooks]
    plain, edited = outs[:4], outs[4:]
    assert torch.equal(plain[0], edited[0])
    assert torch.equal(plain[1][:, :-1], edited[1][:, :-1]) and not torch.equal(plain[1][:, -1], edited[1][:, -1])
    with PAINT()(model):
        assert vlmfix.effects(model)[0]["facts"]["layers"] == [2, 3]


def test_hidden_keys_stay_hidden_with_a_large_alpha():
    class Given(PAINT):
        def keys(self, prompt, memo):
            everything = torch.ones_like(prompt.geometry.image)
            return everything, everything & False

    model = llava("eager")
    prompt = picture_prompt(model, 2, lengths=[3, 9])
    late = {**prompt, "input_ids": prompt["input_ids"].clone()}
    late["input_ids"][0, :4] = 9  # padding
    assert not prompt["attention_mask"][0, :4].any()
    plain = logits(model, prompt)
    with Given(alpha=3.0, layers=(0, 1, 2, 3))(model):
        a, b = logits(model, prompt), logits(model, late)
    assert a.isfinite().all() and torch.equal(a[:, -1], b[:, -1]) and not torch.equal(a[:, -1], plain[:, -1])


def test_every_picture_by_itself():
    model = llava()
    three = picture_prompt(model, 1, n_images=3)
    with PAINT(rho=0.5)(model):
        logits(model, three)
        keys = vlmfix.engine.attachment.attached(model).last().memos[0]["keys"]
        (sample,) = told(model)
        assert len(sample["local"]) == len(sample["summary"]) == 3
        found = torch.stack(keys)[:, 0, three["input_ids"][0] == 60].view(2, 3, 16)
        for i in range(3):
            one = picture_prompt(model)
            one["pixel_values"] = three["pixel_values"][i : i + 1]
            logits(model, one)
            alone = torch.stack(vlmfix.engine.attachment.attached(model).last().memos[0]["keys"])
            assert torch.equal(alone[:, one["input_ids"] == 60], found[:, i])
    assert not torch.equal(found[:, 0], found[:, 1])


def test_batches_with_and_without_a_picture_and_beams():
    model = llava()
    one = picture_prompt(model, 1, lengths=[5])
    bare = torch.tensor([[0] * (one["input_ids"].shape[1] - 6) + [1, 5, 9, 20, 33, 8]])
    ids = torch.cat([bare, one["input_ids"]])
    prompt = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": one["pixel_values"]}
    plain = logits(model, prompt)
    with PAINT(rho=1.0)(model):
        edited = logits(model, prompt)
        assert [s["acted"] for s in told(model)] == [False, True]
        model.generate(**prompt, num_beams=3, max_new_tokens=3, do_sample=False)
        assert [s["acted"] for s in told(model)] == [False] * 3 + [True] * 3
        boost = vlmfix.engine.attachment.attached(model).last().memos[0]["boost"]
        assert torch.equal(boost > 0, (ids == 60).repeat_interleave(3, dim=0))
    assert torch.equal(edited[0, -6:], plain[0, -6:]) and not torch.equal(edited[1], plain[1])


def test_report_tells_where_attention_went():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    with PAINT()(model):
        logits(model, prompt)
        for sample in told(model):
            before, after = sample["attention"]["before"], sample["attention"]["after"]
            assert after["local"] > before["local"] > 0 and after["other"] < before["other"]
            assert sum(after.values()) < 1 + 1e-6
    with PAINT(weaken=True)(model):
        logits(model, prompt)
        assert all(s["attention"]["after"]["local"] < s["attention"]["before"]["local"] for s in told(model))


def test_gamma_one_is_no_guidance():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    with PAINT()(model):
        want = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with PAINT(gamma=1.0)(model):
        assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), want)


def test_the_image_free_stream_is_never_edited():
    model = llava()
    prompt = picture_prompt(model)
    streams = []
    for one in (Contrast(gamma=1.1), PAINT(gamma=1.1, rho=1.0, layers=(0, 1, 2, 3))):
        with one(model):
            model.generate(**prompt, max_new_tokens=1, do_sample=False)
            streams.append(vlmfix.engine.attachment.attached(model).last().memos[0]["blind"].logits)
    assert torch.equal(*streams)


def test_controls_take_the_selection_out_or_turn_it_round():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    keys = {}
    for one in (PAINT(), *PAINT().controls()):
        with one(model):
            logits(model, prompt)
            keys[one.select, one.weaken] = torch.stack(vlmfix.engine.attachment.attached(model).last().memos[0]["keys"])
    assert set(keys) == {("attention", False), ("random", False), ("attention", True)}
    chosen, shuffled = keys["attention", False], keys["random", False]
    assert torch.equal(chosen, keys["attention", True])
    assert torch.equal(chosen.sum(-1), shuffled.sum(-1)) and not torch.equal(chosen, shuffled)
    assert not shuffled[:, prompt["input_ids"] != 60].any()


# ---- settings and refusals -------------------------------------------------------------------------------------------


def test_the_papers_setting_warns_once_with_the_figures():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        paper = PAINT(variant="paper")
    assert (paper.alpha, paper.beta, paper.rho, paper.gamma) == (0.7, 0.4, 0.25, 1.1)
    assert len(caught) == 1 and "37 % are mostly repeated phrases" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (PAINT().alpha, PAINT().beta, PAINT().gamma) == (0.5, 0.3, None)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"alpha": -0.1}, "alpha: expected 0 or more, got -0.1"),
        ({"beta": -1}, "beta: expected 0 or more, got -1"),
        ({"rho": 0}, "rho: expected a number above 0"),
        ({"rho": 1.5}, "rho: expected a number above 0"),
        ({"gamma": 0}, "gamma"),
        ({"variant": "mine"}, "variant: expected safe or paper"),
        ({"select": "all"}, "select: expected attention or random"),
    ],
)
def test_bad_settings(bad, said):
    with pytest.raises(ValueError, match=said):
        PAINT(**bad)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(
        TypeError, match=r"class token, such as CLIP's in LLaVA-1.5: Qwen2_5_VisionTransformer.* has none"
    ):
        vlmfix.wrap(qwen2_5_vl(), "paint")
    with pytest.raises(ValueError, match="llava_next cuts pictures into tiles"):
        vlmfix.wrap(llava_next(), "paint")
    with pytest.raises(ValueError, match=r"layers: expected numbers in 0\.\.3, got \[9\]"):
        vlmfix.wrap(llava(), PAINT(layers=(1, 9)))


def test_prompts_that_do_not_fit_are_refused():
    model = llava()
    prompt = picture_prompt(model)
    with PAINT()(model):
        del prompt["pixel_values"]
        with pytest.raises(ValueError, match=r"expected pixel_values \(images, 3, h, w\), got none"):
            logits(model, prompt)
    model = llava()
    model.config.vision_feature_select_strategy = "full"  # the class token becomes an image token too
    prompt = picture_prompt(model)
    prompt["input_ids"] = torch.cat(
        [prompt["input_ids"][:, :4], prompt["input_ids"][:, 3:4] * 0 + 60, prompt["input_ids"][:, 4:]], 1
    )
    del prompt["attention_mask"]
    with (
        PAINT()(model),
        pytest.raises(ValueError, match=r"1 pictures have 16 patches each, .* have \[17\] image tokens"),
    ):
        logits(model, prompt)


def test_chunked_prefill_is_refused():
    model = llava()
    ids = picture_prompt(model)["input_ids"]
    with PAINT()(model), pytest.raises(ValueError, match="paint needs the whole prompt in one pass"):
        model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
