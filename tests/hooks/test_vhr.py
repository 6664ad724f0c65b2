"""VHR against vectors made with a port of the released code, and the properties that its rule implies."""

import pytest
import torch

import vlmfix
from tests import vectors
from tests.models import llava as tiny_llava
from tests.models import picture_prompt, qwen2_5_vl
from vlmfix.hooks import VHR
from vlmfix.hooks.vhr import choose, layers_for

ARRAYS, CASES, META = vectors.load("vhr_select")


@pytest.mark.parametrize("name", [n for n in CASES if f"{n}/vhd" in ARRAYS])
def test_choice(name):
    v = {k.split("/")[1]: a for k, a in ARRAYS.items() if k.startswith(name + "/")}
    text, visual = v["text"][None], v["visual"][None]
    release = choose(text, visual)
    torch.testing.assert_close(release.vhd[0], v["vhd"], rtol=1e-5, atol=0)
    assert torch.equal(release.outliers[0], v["outliers_release"])
    assert torch.equal(release.selected[0], v["selected_release"])
    assert bool(release.guard[0]) == CASES[name]["guard_active"]
    assert torch.equal(choose(text, visual, filter="off").selected[0], v["selected_nofilter"])
    paper = choose(text, visual, "l2", "paper")
    assert torch.equal(paper.outliers[0], v["outliers_paper"])
    assert torch.equal(paper.selected[0], v["selected_paper"])


def test_choice_in_a_batch():
    found = choose(ARRAYS["batch/text"], ARRAYS["batch/visual"])
    assert torch.equal(found.selected, ARRAYS["batch/selected_release"])


def test_identical_contexts_choose_nothing():
    same = torch.randn(2, 8, 4)
    assert not choose(same, same).selected.any()


def test_non_finite_chooses_nothing_in_that_sample():
    text, visual = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    visual[1, 3, 0] = float("nan")
    selected = choose(text, visual).selected
    assert selected[0].sum() == 4 and not selected[1].any()


@pytest.mark.parametrize("n_layers", [24, 28, 32, 36, 40])
def test_layer_table(n_layers):
    assert list(layers_for("qwen2_5_vl", n_layers)) == META["layers_ours"][str(n_layers)]


def test_layer_table_of_the_paper():
    assert list(layers_for("llava", 32)) == META["layers_paper"]["llava_7b_L32"]
    assert list(layers_for("llava_next", 32)) == META["layers_paper"]["llava_7b_L32"]
    assert list(layers_for("instructblip", 32)) == META["layers_paper"]["instructblip_7b_L32"]
    assert layers_for("llava", 40) == (1, *range(22, 40))


@pytest.mark.parametrize("name", ["vhr_e2e_mha", "vhr_e2e_gqa"])
def test_inside_a_decoder(name):
    arrays, cases, _ = vectors.load(name)
    v = {k.split("/", 1)[1]: a for k, a in arrays.items() if k.startswith("e2e/")}
    case = cases["e2e"]
    model = vectors.llama(arrays, case["config"])
    layers = tuple(v["layers"].tolist())
    for b in range(case["samples"]):
        prompt = {"inputs_embeds": v[f"emb_{b}"][None], "image_mask": v[f"image_{b}"][None]}
        with VHR(alpha=case["alpha"], layers=layers)(model):
            prefill, tokens, steps = vectors.greedy(model, case["steps"], **prompt)
            found = vlmfix.effects(model)[0]["samples"][0]["layers"]
        torch.testing.assert_close(prefill, v[f"prefill_{b}"], rtol=0, atol=1e-4)
        assert tokens == v[f"tokens_{b}"].tolist()
        torch.testing.assert_close(steps, v[f"steps_{b}"], rtol=0, atol=1e-4)
        for layer in layers:
            assert found[layer]["heads"] == v[f"selected_{b}"][layer].nonzero()[:, 0].tolist()


def test_image_free_pass_and_visual_heads():
    """Head outputs themselves equal the reference's, in the order of the layers."""
    arrays, cases, _ = vectors.load("vhr_e2e_gqa")
    v = {k.split("/", 1)[1]: a for k, a in arrays.items() if k.startswith("e2e/")}
    model = vectors.llama(arrays, cases["e2e"]["config"])
    layers = tuple(v["layers"].tolist())
    seen = {}

    class Spy(VHR):
        def heads(self, o, site):
            seen["text"] = site.memo["text"]
            seen[site.layer] = o[:, -1]
            return super().heads(o, site)

    with Spy(layers=layers)(model):
        model(inputs_embeds=v["emb_0"][None], image_mask=v["image_0"][None])
    for i, layer in enumerate(layers):
        torch.testing.assert_close(seen["text"][layer][0], v["text_last_0"][i], rtol=0, atol=1e-4)
        torch.testing.assert_close(seen[layer][0], v["visual_last_0"][i], rtol=0, atol=1e-4)


def test_inside_a_vlm():
    arrays, cases, _ = vectors.load("var_vhr_paint_llava")
    v = {k.split("/", 1)[1]: a for k, a in arrays.items() if k.startswith("llava/")}
    case = cases["llava"]
    model = vectors.llava(arrays, case)
    prompt = {"input_ids": v["input_ids_0"][None], "pixel_values": v["pixel_values_0"][None]}
    settings = {**case["vhr"], "layers": tuple(case["vhr"]["layers"])}
    with VHR(**settings)(model):
        prefill, tokens, steps = vectors.greedy(model, case["steps"], **prompt)
        found = vlmfix.effects(model)[0]["samples"][0]["layers"]
    torch.testing.assert_close(prefill, v["vhr_prefill_0"], rtol=0, atol=1e-4)
    assert tokens == v["vhr_tokens_0"].tolist()
    torch.testing.assert_close(steps, v["vhr_steps_0"], rtol=0, atol=1e-4)
    chosen = torch.zeros_like(v["vhr_selected_0"])
    for layer, entry in found.items():
        chosen[layer, entry["heads"]] = True
    assert torch.equal(chosen, v["vhr_selected_0"])


def test_scaling_heads_equals_scaling_columns_of_the_projection():
    model = tiny_llava()
    prompt = picture_prompt(model, 1)
    with VHR(layers=(1, 2), alpha=1.5)(model):
        edited = model.generate(**prompt, max_new_tokens=6, do_sample=False, num_beams=2)
        found = vlmfix.effects(model)[0]["samples"][0]["layers"]
    for layer, entry in found.items():
        projection = model.model.language_model.layers[layer].self_attn.o_proj
        with torch.no_grad():
            for head in entry["heads"]:
                projection.weight[:, head * 8 : (head + 1) * 8] *= 1.5
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False, num_beams=2), edited)


def test_alpha_one_changes_nothing_and_alpha_does_not_change_the_first_choice():
    model = tiny_llava()
    prompt = picture_prompt(model, 2)
    with torch.no_grad():
        plain = model(**prompt).logits
        with VHR(alpha=1.0)(model):
            assert torch.equal(model(**prompt).logits, plain)
        heads = []
        for alpha in (0.5, 2.0):
            with VHR(alpha=alpha, layers=(2, 3))(model):
                model(**prompt)
                heads.append([s["layers"][2]["heads"] for s in vlmfix.effects(model)[0]["samples"]])
        assert heads[0] == heads[1] and all(len(h) == 3 for h in heads[0])


def test_no_layers_no_pass():
    model = tiny_llava()
    calls = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    with VHR(layers=())(model):
        model(**picture_prompt(model))
    assert len(calls) == 1


@pytest.mark.parametrize("build", [tiny_llava, qwen2_5_vl])
def test_image_free_pass_sees_no_image(build):
    model = build()
    prompt = picture_prompt(model, 2, lengths=[4, 7])
    seen = []
    model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with VHR()(model):
        model(**prompt)
    text, full = seen
    assert set(text) == {"inputs_embeds", "attention_mask", "use_cache"}
    kept = prompt["attention_mask"].bool() & (prompt["input_ids"] != 60)
    for b in range(2):
        embeds = model.get_input_embeddings()(prompt["input_ids"][b][kept[b]])
        assert torch.equal(text["inputs_embeds"][b][text["attention_mask"][b].bool()], embeds)
        assert text["attention_mask"][b, -1] == 1, "left padded"
    assert full["inputs_embeds"].shape[1] == prompt["input_ids"].shape[1]


def test_a_sample_without_image_is_left_alone():
    model = tiny_llava()
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with VHR()(model):
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_sample_without_image_in_a_batch_is_left_alone():
    model = tiny_llava()
    one = picture_prompt(model, 1, lengths=[5])
    width = one["input_ids"].shape[1]
    bare = torch.tensor([[0] * (width - 6) + [1, 5, 9, 20, 33, 8]])
    ids = torch.cat([one["input_ids"], bare])
    prompt = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": one["pixel_values"]}
    with torch.no_grad():
        plain = model(**prompt).logits
        with VHR()(model):
            edited = model(**prompt).logits
            chosen = [s["acted"] for s in vlmfix.effects(model)[0]["samples"]]
    assert chosen == [True, False]
    assert torch.equal(edited[1, -6:], plain[1, -6:]) and not torch.equal(edited[0], plain[0])


def test_progressive_off_chooses_from_a_plain_pass():
    model = tiny_llava()
    prompt = picture_prompt(model, 2, lengths=[4, 6])
    chosen = {}
    for progressive in (True, False):
        with VHR(layers=(0, 1, 2, 3), alpha=2.5, progressive=progressive)(model), torch.no_grad():
            model(**prompt)
            chosen[progressive] = [s["layers"] for s in vlmfix.effects(model)[0]["samples"]]
    for plain, progressive in zip(chosen[False], chosen[True], strict=True):
        assert plain[0]["vhd_mean"] == pytest.approx(progressive[0]["vhd_mean"], rel=1e-4)
        assert plain[3]["vhd_mean"] != pytest.approx(progressive[3]["vhd_mean"], rel=1e-3)


def test_variants():
    assert VHR(variant="paper") == VHR(variant="paper", distance="l2", filter="paper", progressive=True)
    assert VHR() == VHR(distance="sq_l2", filter="release", progressive=True)
    model = qwen2_5_vl(n_layers=16)
    assert vlmfix.effects(vlmfix.wrap(model, "vhr:variant=qwen_port"))[0]["layers"] == [1, *range(2, 16)]


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"variant": "mine"}, {"distance": "l1"}, {"filter": "none"}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VHR(**bad)


def test_layer_outside_the_model():
    with pytest.raises(ValueError, match=r"layers: expected numbers in 0\.\.3, got \[7\]"):
        vlmfix.wrap(tiny_llava(), VHR(layers=(1, 7)))


def test_large_alpha_warns():
    with pytest.warns(UserWarning, match="collapse"):
        VHR(alpha=3.5)


def test_chunked_prefill_is_refused():
    arrays, cases, _ = vectors.load("vhr_e2e_gqa")
    model = vectors.llama(arrays, cases["e2e"]["config"])
    ids = torch.randint(3, 50, (1, 12))
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 2:6] = True
    with VHR()(model), pytest.raises(ValueError, match="whole prompt in one pass; leave out prefill_chunk_size"):
        model.generate(ids, image_mask=mask, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)


def test_controls_take_the_selection_out():
    model = tiny_llava()
    prompt = picture_prompt(model, 2, lengths=[4, 7])
    chosen = {}
    vhr = VHR(layers=(2,), filter="off")
    for one in (vhr, *vhr.controls()):
        with one(model), torch.no_grad():
            model(**prompt)
            chosen[one.select, one.alpha] = [s["layers"][2]["heads"] for s in vlmfix.effects(model)[0]["samples"]]
    assert set(chosen) == {("vhd", 2.0), ("random", 2.0), ("least", 2.0), ("vhd", 0.5)}
    assert all(len(heads) == 3 for found in chosen.values() for heads in found)
    assert chosen["vhd", 2.0] == chosen["vhd", 0.5]
    assert all(set(a).isdisjoint(b) for a, b in zip(chosen["vhd", 2.0], chosen["least", 2.0], strict=True))
    assert chosen["random", 2.0][0] == chosen["random", 2.0][1] not in (chosen["vhd", 2.0][0], chosen["least", 2.0][0])


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
    with VHR(head_list="L3H5/L1H4/L3H0", alpha=2.99999)(model):
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
    for spec in (f"vhr:head_list={path}", "vhr:head_list=L3H5/L3H4/L3H3", f"vhr:head_list={path},select=least"):
        with vlmfix.engine.wrap.wrapped(model, spec):
            found[spec] = (model(**prompt).logits, vlmfix.effects(model)[0])
    (file, told), (named, _), (least, worst) = found.values()
    assert torch.equal(file, named) and not torch.equal(file, least)
    assert told["head_list"] == "L3H5/L3H4/L3H3" and worst["head_list"] == "L0H0/L0H1/L0H2"
    assert told["facts"]["head_list"]["file"] == path and worst["facts"]["select"] == "least"
    controls = VHR(head_list=path).controls()
    assert [c.select for c in controls] == ["random", "least", "vhd"] and controls[2].alpha == 0.5
    assert [c.select for c in VHR(head_list="L1H1").controls()] == ["random", "vhd"]


def test_listed_heads_leave_text_alone_and_go_through_beams_and_pieces(tmp_path):
    model = tiny_llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    plain = model(**text).logits
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [58, 59, 60, 61]}
    with VHR(head_list="L3H5/L1H4/L1H0/L2H2")(model):
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
    vlmfix.wrap(tiny_llava(), VHR(head_list=path, alpha=0.5))
    vlmfix.wrap(tiny_llava(), VHR(head_list=path, select="random"))
    assert not recwarn
    with pytest.warns(UserWarning, match="whose high scores are bad; weaken them, alpha=0.5"):
        vlmfix.wrap(tiny_llava(), VHR(head_list=path))


def test_head_lists_refused(tmp_path):
    with pytest.raises(ValueError, match="leave out layers"):
        VHR(head_list="L1H1", layers=(1,))
    with pytest.raises(ValueError, match=r"head_list: expected the file of a head list, .* got 3"):
        VHR(head_list=3)
    for spec, sentence in (("L9H0", "expected layers in 0..3 and heads in 0..5, got L9H0"), ("no.json", "cannot read")):
        with pytest.raises(ValueError, match=sentence):
            vlmfix.wrap(tiny_llava(), VHR(head_list=spec))
    path = listed(tmp_path / "heads.json")
    with pytest.raises(ValueError, match=r"made on .* with 4 layers x 6 heads, but this model has 2 x 6"):
        vlmfix.wrap(tiny_llava(n_layers=2), VHR(head_list=path))
