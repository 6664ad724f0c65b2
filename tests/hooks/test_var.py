"""VAR against vectors made with the authors' released functions, and the properties that its rule implies."""

import math

import pytest
import torch

import vlmfix
from tests import vectors
from tests.models import llava as tiny_llava
from tests.models import picture_prompt, plant_sinks
from vlmfix.hooks import VAR
from vlmfix.hooks.parts import sinks
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry


def run_layer(var, x, a, image, rows, valid=None, layer=2, n_layers=4, memo=None, prefill=True):
    """One attention layer: sinks from the prefill's layer input x (B, T, D), then the weight edit on a (B, H, Q, K)."""
    memo = {} if memo is None else memo
    n_keys = a.shape[-1]
    if prefill:
        n = x.shape[1]
        known = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
        geometry = Geometry(image[:, :n] & known, known, known)
        var.layer_input(x, Site(layer, n_layers, geometry, None, 0, 0, memo))
        memo["geometry"] = geometry
    n_prompt = a.shape[2] if prefill else 0
    site = Site(layer, n_layers, memo["geometry"].fitted(n_keys), rows, 0, 0, memo, n_prompt)
    return site.admit(var.weights(a.float(), site), a.float()), memo


def case_of(arrays, name):
    return {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(name + "/")}


def settings(case, **more):
    return VAR(
        rho=case["rho"], p=case["p"], min_visual_mass=case["min_visual_mass"], tau=case.get("tau", 1.0),
        dims=tuple(case.get("dims", (0,))), **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama2_7b", "small_two_dims", "tiny_rms"])
def test_sink_scores(name):
    arrays, cases, _ = vectors.load("var_sinks")
    v, case = case_of(arrays, name), cases[name]
    phi = sinks.phi(v["X"], tuple(case["dims"]))
    torch.testing.assert_close(phi, v["phi"], rtol=1e-5, atol=0)
    assert torch.equal(phi >= case["tau"], v["sink"])


ROW_CASES = [n for n in vectors.load("var_rows")[1] if n != "worked_example"]


@pytest.mark.parametrize("name", ROW_CASES)
def test_one_layer(name):
    arrays, cases, _ = vectors.load("var_rows")
    v, case = case_of(arrays, name), cases[name]
    out, memo = run_layer(settings(case), v["X"], v["A"], v["image"], v["query_rows"], v.get("valid"))
    n = v["X"].shape[1]
    assert torch.equal(memo["sinks"][2], v["sink"][:, :n])
    assert memo["notes"][2]["selected"].sum() == v["selected"].sum()
    tolerance = 1e-3 if name == "fp16" else 1e-6
    torch.testing.assert_close(out, v["A_out"].float(), rtol=0, atol=tolerance)
    if case["p"] > 0 and name != "fp16":
        changed = (out != v["A"]).any(-1)
        assert torch.equal(changed, v["selected"]), "exactly the selected head rows change"
    if "A_out_literal" in v:
        literal, memo = run_layer(
            settings(case, require_visual_sink=False), v["X"], v["A"], v["image"], v["query_rows"]
        )
        assert memo["notes"][2]["selected"].sum() == v["selected_literal"].sum() > 0
        torch.testing.assert_close(literal, v["A_out_literal"], rtol=0, atol=1e-6)


def test_worked_example():
    a = torch.tensor([0.5, 0.1, 0.2, 0.1, 0.1]).view(1, 1, 1, 5)
    image = torch.tensor([[False, True, True, True, False]])
    x = torch.ones(1, 5, 8)
    x[0, :2, 3] = 50.0  # the first token and the first image token are sinks
    out, _ = run_layer(VAR(dims=(3,), tau=2.0), x, a, image, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2, 0.04, 0.44, 0.22, 0.1]))


def test_four_layers_prefill_and_decode():
    arrays, cases, _ = vectors.load("var_forward")
    v, case = case_of(arrays, "llama2_7b_dims"), cases["llama2_7b_dims"]
    n = case["layers"]
    after = v["image"].cumsum(1) == v["image"].sum(1, keepdim=True)
    after &= ~v["image"]
    for skip_last in (False, True):
        var = settings(case, skip_last=skip_last)
        memos = [{} for _ in range(n)]
        for step in range(case["steps"] + 1):
            for layer in range(n):
                a = v[f"A_{step}_{layer}"]
                rows = after if step == 0 else torch.ones(1, 1, dtype=torch.bool)
                out = a
                if layer in var.at_layers(n):
                    out, _ = run_layer(var, v[f"X_{layer}"], a, v["image"], rows, memo=memos[layer], prefill=step == 0)
                skipped = layer < 2 or (skip_last and layer == n - 1)
                want = a if skipped else v[f"A_out_{step}_{layer}"]
                torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    assert torch.equal(memos[2]["sinks"][2], v["sink_2"])


@pytest.mark.parametrize("name", ["var_e2e_mha", "var_e2e_gqa"])
@pytest.mark.parametrize("skip_last", [False, True])
def test_inside_a_decoder(name, skip_last):
    arrays, cases, _ = vectors.load(name)
    v, case = case_of(arrays, "e2e"), cases["e2e"]
    model = vectors.llama(arrays, case["config"])
    suffix = "skip_last" if skip_last else "all"
    for b in range(case["samples"]):
        prompt = {"inputs_embeds": v[f"emb_{b}"][None]}
        prefill, tokens, _ = vectors.greedy(model, case["steps"], **prompt)
        torch.testing.assert_close(prefill, v[f"base_prefill_{b}"], rtol=0, atol=1e-4)
        with settings(case, skip_last=skip_last, skip_first=case["skip_first"])(model):
            prefill, tokens, steps = vectors.greedy(model, case["steps"], **prompt, image_mask=v[f"image_{b}"][None])
        torch.testing.assert_close(prefill, v[f"prefill_{suffix}_{b}"], rtol=0, atol=1e-4)
        assert tokens == v[f"tokens_{suffix}_{b}"].tolist()
        torch.testing.assert_close(steps, v[f"steps_{suffix}_{b}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("skip_last", [False, True])
def test_inside_a_vlm(skip_last):
    arrays, cases, _ = vectors.load("var_vhr_paint_llava")
    v, case = case_of(arrays, "llava"), cases["llava"]
    model = vectors.llava(arrays, case)
    suffix = "skip_last" if skip_last else "all"
    prompt = {"input_ids": v["input_ids_0"][None], "pixel_values": v["pixel_values_0"][None]}
    prefill, tokens, _ = vectors.greedy(model, case["steps"], **prompt)
    torch.testing.assert_close(prefill, v["base_prefill_0"], rtol=0, atol=1e-4)
    assert tokens == v["base_tokens_0"].tolist()
    with settings(case["var"], skip_last=skip_last)(model):
        prefill, tokens, steps = vectors.greedy(model, case["steps"], **prompt)
        acted = vlmfix.effects(model)[0]["samples"][0]
    torch.testing.assert_close(prefill, v[f"var_prefill_{suffix}_0"], rtol=0, atol=1e-4)
    assert tokens == v[f"var_tokens_{suffix}_0"].tolist()
    torch.testing.assert_close(steps, v[f"var_steps_{suffix}_0"], rtol=0, atol=1e-4)
    assert acted["acted"] and 0 < acted["selected"] < 1 and 0 < acted["mass_moved"] < 1
    want = (v["var_sinks_0"] & (v["input_ids_0"] == case["image_token_index"])).sum(1)
    assert {layer: found["visual_sinks"] for layer, found in acted["layers"].items()} == {
        layer: int(want[layer]) for layer in acted["layers"]
    }


@pytest.mark.parametrize("name", list(vectors.load("var_calibration")[1]))
def test_calibration(name):
    arrays, cases, _ = vectors.load("var_calibration")
    v, case = case_of(arrays, name), cases[name]
    found = sinks.calibrate(v["X"], case["tau"], case["first"])
    assert list(found.dims) == v["dims"].tolist()
    assert (found.tier, found.onset) == (case["tier"], case["onset"])


def random_rows(seed, b=2, h=3, q=4, k=12):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(b, h, q, k, generator=g).pow(3).softmax(-1)
    image = torch.zeros(b, k, dtype=torch.bool)
    image[:, 3:9] = True
    x = torch.randn(b, k, 16, generator=g)
    x[:, [0, 4], 5] = 40.0
    return x, a, image, torch.ones(b, q, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(5))
def test_properties(seed):
    x, a, image, rows = random_rows(seed)
    var = VAR(dims=(5,), tau=2.0, rho=0.3, min_visual_mass=0.1)
    out, memo = run_layer(var, x, a, image, rows)
    sink, receives = memo["sinks"][2], image & ~memo["sinks"][2]
    assert not torch.equal(out, a) and (out >= 0).all()
    torch.testing.assert_close(out.sum(-1), a.sum(-1), rtol=0, atol=1e-6)
    untouched = (~sink & ~image)[:, None, None].expand_as(a)
    assert torch.equal(out[untouched], a[untouched])
    share = lambda w: (w * receives[:, None, None]) / (w * receives[:, None, None]).sum(-1, keepdim=True)  # noqa: E731
    torch.testing.assert_close(share(out), share(a))
    assert torch.equal(run_layer(VAR(dims=(5,), tau=2.0, rho=0.3, p=0.0), x, a, image, rows)[0], a)
    emptied, _ = run_layer(VAR(dims=(5,), tau=2.0, rho=0.3, p=1.0), x, a, image, rows)
    chosen = (emptied != a).any(-1)
    assert (emptied.masked_fill(~sink[:, None, None], 0).sum(-1)[chosen] == 0).all()
    few, _ = run_layer(VAR(dims=(5,), tau=2.0, rho=0.7, min_visual_mass=0.1), x, a, image, rows)
    assert ((few != a).any(-1) <= (out != a).any(-1)).all(), "a larger rho selects a subset"
    for b in range(len(a)):
        alone, _ = run_layer(var, x[b : b + 1], a[b : b + 1], image[b : b + 1], rows[b : b + 1])
        torch.testing.assert_close(alone[0], out[b])


def test_all_visual_tokens_are_sinks():
    x, a, image, rows = random_rows(0)
    x[:, 3:9, 5] = 40.0
    for rho in (0.0, 0.5):
        out, _ = run_layer(VAR(dims=(5,), tau=2.0, rho=rho), x, a, image, rows)
        assert torch.equal(out, a)


def test_text_sinks_alone():
    x, a, image, rows = random_rows(0)
    x[:, 4, 5] = 0.0
    assert torch.equal(run_layer(VAR(dims=(5,), tau=2.0, rho=0.3), x, a, image, rows)[0], a)
    free = VAR(dims=(5,), tau=2.0, rho=0.3, require_visual_sink=False)
    assert not torch.equal(run_layer(free, x, a, image, rows)[0], a)


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": 0},
        {"rho": 1.5},
        {"p": -0.1},
        {"min_visual_mass": 2},
        {"dims": ()},
        {"variant": "best"},
        {"rows": "last"},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VAR(**bad)


def test_dims_outside_the_model():
    with pytest.raises(ValueError, match=r"dims: expected numbers in 0\.\.\d+, got \[9999\]"):
        vlmfix.wrap(tiny_llava(), VAR(dims=(9999,)))


def test_variants():
    assert VAR(variant="released") == VAR(variant="released", rho=0.5, p=0.4, skip_last=False)
    assert (VAR().rho, VAR().p, VAR().skip_last) == (0.5, 0.6, True)
    assert VAR(variant="general").rho == 0.8 and VAR(variant="vision_centric", p=0.1).p == 0.1
    assert sinks.default_tau(4096) == sinks.default_tau(5120) == 20
    assert math.isclose(sinks.default_tau(1024), 10)


def test_no_sink_dimension_is_a_warning_or_an_error():
    model = tiny_llava()
    with pytest.warns(UserWarning, match=r"var will not act on this model: no sink dimension was found"):
        vlmfix.wrap(model, "var")
    assert "idle" in vlmfix.effects(model)[0]["facts"]
    with pytest.raises(ValueError, match="no sink dimension was found"):
        vlmfix.wrap(model, VAR(require_dims=True))


def test_warns_when_it_never_acts():
    model, prompt = tiny_llava(), picture_prompt(tiny_llava())
    vlmfix.wrap(model, VAR(dims=(1,), tau=1e6))
    with pytest.warns(UserWarning, match=r"did nothing in a whole generation.*suspect D_sink first \(dims=\(1,\)"):
        model.generate(**prompt, max_new_tokens=2, do_sample=False)


def test_calibrates_itself_on_a_model_with_massive_activations():
    model = tiny_llava(n_layers=6)
    with torch.no_grad():  # the first token of every prompt carries one huge entry, as in large models
        model.get_input_embeddings().weight[1, 7] = 3000.0
    vlmfix.wrap(model, "var")
    found = vlmfix.effects(model)[0]
    assert found["dims"] == [7] and found["facts"] == {"dims_origin": "calibrated", "tier": "strict"}


def test_table_is_used_only_where_the_weights_bear_it_out(monkeypatch):
    model = tiny_llava(n_layers=6)
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 7] = 3000.0
    text = model.config.text_config
    known = lambda *dims: (sinks.Known("toy", ("llama",), text.hidden_size, 6, (0, 10**9), dims, "test"),)  # noqa: E731
    monkeypatch.setattr(sinks, "TABLE", known(7, 3))
    report = vlmfix.effects(vlmfix.wrap(model, "var"))[0]
    assert report["dims"] == [7] and report["facts"]["dims_origin"].startswith("table (toy: test), verified")
    vlmfix.unwrap(model)
    monkeypatch.setattr(sinks, "TABLE", known(3))
    assert vlmfix.effects(vlmfix.wrap(model, "var"))[0]["facts"]["dims_origin"] == "calibrated"


def test_generated_tokens_are_never_sinks():
    """A generated token that carries a massive activation gives no attention away; the same token in a prompt does."""
    model = plant_sinks(tiny_llava())
    prompt = picture_prompt(model)
    sink_token = torch.tensor([[11]])
    with VAR(dims=(7,), tau=3.0, rho=0.0, min_visual_mass=0.0, skip_first=1)(model), torch.no_grad():
        out = model(**prompt, use_cache=True)
        at_prefill = [layer["text_sinks"] for layer in vlmfix.effects(model)[0]["samples"][0]["layers"].values()]
        for _ in range(2):
            out = model(input_ids=sink_token, past_key_values=out.past_key_values, use_cache=True)
        later = [layer["text_sinks"] for layer in vlmfix.effects(model)[0]["samples"][0]["layers"].values()]
        longer = {**prompt, "input_ids": torch.cat([prompt["input_ids"], sink_token], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        model(**longer)
        in_prompt = [layer["text_sinks"] for layer in vlmfix.effects(model)[0]["samples"][0]["layers"].values()]
    assert later == at_prefill and all(a > b for a, b in zip(in_prompt, at_prefill, strict=True))


def test_control_gives_as_many_random_image_tokens():
    x, a, image, rows = random_rows(0)
    x[:, 6, 5] = 40.0  # two visual sinks, one text sink
    var = VAR(dims=(5,), tau=2.0, rho=0.1, min_visual_mass=0.1)
    (control,) = var.controls()
    _, memo = run_layer(var, x, a, image, rows)
    out, other = run_layer(control, x, a, image, rows)
    assert not torch.equal(memo["masks"][2], other["masks"][2])
    assert torch.equal(memo["masks"][2].sum(1), other["masks"][2].sum(1)), "as many of each kind"
    assert torch.equal(memo["masks"][2][..., 2], other["masks"][2][..., 2]), "text sinks are the same"
    torch.testing.assert_close(out.sum(-1), a.sum(-1), rtol=0, atol=1e-6)
    shifted = torch.cat([torch.zeros(2, 2, 16), x], 1)
    wide = torch.nn.functional.pad(image, (2, 0))
    valid = torch.ones_like(wide)
    valid[:, :2] = False
    _, padded = run_layer(control, shifted, torch.nn.functional.pad(a, (2, 0)), wide, rows, valid)
    assert torch.equal(padded["masks"][2][:, 2:], other["masks"][2]), "padding does not matter"
