"""ACT against vectors made with the authors' function and from the definition, and the properties of its rule."""

from dataclasses import replace

import pytest
import torch

import vlmfix
from tests import vectors
from tests.models import answer, edited_as_a_whole, llava, picture_prompt
from vlmfix.hooks import ACT
from vlmfix.method.heads import HeadList
from vlmfix.method.intervention import Intervention
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry

V, _, META = vectors.load("act_maths")
LAYER = 2


def named(heads):
    return tuple((LAYER, int(h)) for h in heads)


def geometry(n, valid=None, image=None, batch=1):
    valid = torch.ones(batch, n, dtype=torch.bool) if valid is None else valid
    image = torch.zeros_like(valid) if image is None else image.view(1, -1)
    return Geometry(image & valid, valid, valid)


def prefill(act, a, g=None, memo=None, rows=None, piece=None):
    """A layer's prefill: the survey in pieces, then the edit of all rows (those in `rows`)."""
    g = g or geometry(a.shape[-1])
    memo = {} if memo is None else memo
    n, rows = a.shape[2], g.prompt if rows is None else rows
    for index in torch.arange(n).split(piece or n):
        act.survey(a[:, :, index], Site(LAYER, 4, g, g.prompt[:, index], 0, 0, memo, n, index))
    return act.weights(a, Site(LAYER, 4, g, rows, 0, 0, memo, n, torch.arange(n))), memo


def step(act, row, memo, n_prompt):
    n = row.shape[-1]
    site = Site(LAYER, 4, geometry(n_prompt).fitted(n), torch.ones(1, 1, dtype=torch.bool), n - 1, 0, memo)
    return act.weights(row, site)


def of(case, **more):
    settings = {k: case[k] for k in ("beta", "rule") if k in case}
    settings |= {"alpha": case["alpha"]} if case["rule"] == "alpha" else {"tau": case["threshold"]}
    return ACT(layers=(LAYER,), **{**settings, **more})


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["name"])
def test_prefill(case, variant):
    name = case["name"]
    a = V[f"{name}/attn_in"]
    out, memo = prefill(of(case, variant=variant, head_list=named(case["heads"])), a)
    torch.testing.assert_close(out, V[f"{name}/{variant}"], rtol=0, atol=2e-6)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), rtol=0, atol=1e-6)
    state = memo["received"][LAYER]
    torch.testing.assert_close((state.total[0, :, 0] / state.seen[0]), V[f"{name}/score"], rtol=0, atol=1e-6)
    _, memo = prefill(of(case, variant=variant, beta=0.4), a)
    assert torch.equal(memo["sinks"][LAYER][0, :, 0], V[f"{name}/sinks_{variant}"])
    chosen = set(case["heads"])
    others = [h for h in range(case["heads_total"]) if h not in chosen]
    assert torch.equal(out[:, others], a[:, others]), "heads not listed are bit-equal"
    if variant == "paper":
        bias = V[f"{name}/gamma"].log()[None, :, :, None] * V[f"{name}/sinks_paper"][None, :, None]
        as_scores = (a.log() + bias.nan_to_num(0.0, neginf=-80.0)).softmax(-1)
        heads = sorted(chosen)
        if case["beta"] > 0:
            torch.testing.assert_close(out[:, heads], as_scores[:, heads], rtol=0, atol=3e-6)


def test_spared_token_differs_between_the_variants():
    case = next(c for c in META["cases"] if c["name"] == "no_bos_sink")
    one, two = (prefill(of(case, variant=v), V["no_bos_sink/attn_in"])[0] for v in ("paper", "official"))
    assert not torch.allclose(one, two, atol=1e-3)


def test_decode_keeps_the_sinks_of_the_prompt():
    (case,) = META["decode"]
    act = of(case, head_list=named(case["heads"]))
    out, memo = prefill(act, V["decode/prefill_in"])
    torch.testing.assert_close(out, V["decode/prefill_out"], rtol=0, atol=2e-6)
    n = case["n"]
    chosen = torch.zeros(case["heads_total"], 1, dtype=torch.bool)
    chosen[case["heads"]] = True
    assert torch.equal(memo["sinks"][LAYER][0, :, 0], V["decode/sinks"] & chosen)
    for i in range(case["steps"]):
        row = step(act, V["decode/rows_in"][i, ..., : n + i + 1], memo, n)
        torch.testing.assert_close(row, V["decode/rows_out"][i, ..., : n + i + 1], rtol=0, atol=2e-6)
        assert (row.sum(-1) - 1).abs().max() < 1e-6
    bug = V["decode/official_first_step"].sum(-1)
    assert bug.max() == pytest.approx(case["official_row_sum_max"], abs=1e-4), "what the released decoding does"


def test_left_padding():
    case = META["left_pad"]
    a, valid = V["left_pad/attn_in"], V["left_pad/attention_mask"].bool()
    g = geometry(a.shape[-1], valid)
    act = of({**case, "threshold": None}, head_list=named(case["heads"]))
    out, memo = prefill(act, a, g)
    torch.testing.assert_close(out, V["left_pad/attn_out"], rtol=0, atol=2e-6)
    _, memo = prefill(replace(act, head_list=None), a, g)
    assert torch.equal(memo["sinks"][LAYER][:, :, 0], V["left_pad/sinks"])
    for b in range(2):
        keep = valid[b].nonzero()[:, 0]
        alone, _ = prefill(act, a[b : b + 1, :, keep][..., keep])
        torch.testing.assert_close(alone[0], out[b][:, keep][..., keep], rtol=0, atol=1e-6)


def test_rows_without_mass_outside_their_sinks():
    case = META["blocked_rows"]
    a = V["blocked_rows/attn_in"]
    out, memo = prefill(of(case), a)
    assert out.isfinite().all() and torch.equal(memo["sinks"][LAYER][0, :, 0], V["blocked_rows/sinks"])
    torch.testing.assert_close(out, V["blocked_rows/attn_out"], rtol=0, atol=2e-6)
    for head, row in case["rows_left_alone"]:
        assert torch.equal(out[0, head, row], a[0, head, row])


@pytest.mark.parametrize("rows", ["all_rows", "rows_after_image"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain", {}),
        ("sinks_image", {"sinks": "image"}),
        ("receivers_image", {"receivers": "image"}),
        ("both_image", {"sinks": "image", "receivers": "image"}),
    ],
)
def test_with_an_image(name, settings, rows):
    case, a = META["lvlm"], V["lvlm/attn_in"]
    g = geometry(a.shape[-1], image=V["lvlm/image"])
    _, memo = prefill(of(case), a, g)
    assert torch.equal(memo["sinks"][LAYER][0, :, 0], V["lvlm/sinks"])
    act = of(case, min_rows=case["min_rows"], **settings)
    out, memo = prefill(act, a, g, rows=g.prompt if rows == "all_rows" else g.instruction)
    torch.testing.assert_close(out, V[f"lvlm/{rows}/{name}"], rtol=0, atol=2e-6)
    kept = V["lvlm/sinks_min_rows"] & (V["lvlm/image"] if "sinks" in settings else True)
    assert torch.equal(memo["sinks"][LAYER][0, :, 0], kept)


def test_one_attention_layer_in_a_model():
    """The stored layer inside a Llama: through the core, kernel and all, against the authors' outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    case, d = META["layer"], V["layer/x"].shape[-1]
    h = case["heads_total"]
    config = LlamaConfig(
        vocab_size=8, hidden_size=d, intermediate_size=8, num_hidden_layers=1, num_attention_heads=h, head_dim=case["head_dim"],
        num_key_value_heads=h, rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    layer.input_layernorm = torch.nn.Identity()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer.self_attn, name).weight.data = V[f"layer/{name}"]
    seen = {}
    layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(out=out[0]))
    prompt = {"inputs_embeds": V["layer/x"], "image_mask": torch.zeros(1, case["n"], dtype=torch.bool)}
    with torch.no_grad():
        model(inputs_embeds=V["layer/x"])
        torch.testing.assert_close(seen["out"], V["layer/out_plain"], rtol=0, atol=1e-4)
        heads = tuple((0, head) for head in case["heads"])
        for variant in ("paper", "official"):
            act = ACT(rule="abs", tau=case["threshold"], beta=case["beta"], head_list=heads, variant=variant)
            with act(model):
                model(**prompt)
                torch.testing.assert_close(seen["out"], V["layer/out_edited"], rtol=0, atol=1e-4)
                sinks = vlmfix.effects(model)[0]["samples"][0]["layers"][0]["text_sinks"]
            assert sinks == sum(map(len, case["sinks"]))


def random_weights(n=40, h=4, seed=0, batch=1):
    g = torch.Generator().manual_seed(seed)
    s = 2.5 * torch.randn(batch, h, n, n, generator=g) + 2 * torch.randn(batch, h, 1, n, generator=g)
    return s.masked_fill(torch.arange(n) > torch.arange(n)[:, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("sinks", ["all", "image"])
@pytest.mark.parametrize("receivers", ["all", "image"])
@pytest.mark.parametrize("answering", ["cached", "running"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_properties(sinks, receivers, answering, variant):
    a, n = random_weights(), 32
    image = torch.arange(n) // 8 == 1
    act = ACT(
        alpha=2.0,
        tau=0.06,
        beta=0.3,
        layers=(LAYER,),
        sinks=sinks,
        receivers=receivers,
        answering=answering,
        variant=variant,
    )
    first = a[:, :, :n, :n]
    out, memo = prefill(act, first, geometry(n, image=image))
    sink = act._mark(memo["received"][LAYER], Site(LAYER, 4, geometry(n, image=image), None, 0, 0, {}))[:, :, 0]
    assert sink.any()
    rows = [out]
    for i in range(n, 40):
        row = a[:, :, i : i + 1, : i + 1]
        g = geometry(n, image=image).fitted(i + 1)
        new = act.weights(row, Site(LAYER, 4, g, torch.ones(1, 1, dtype=torch.bool), i, 0, memo))
        rows.append(new)
    for after in rows:
        assert (after.sum(-1) - 1).abs().max() < 1e-6
    assert (out[..., 0] >= first[..., 0] - 1e-7).all() or variant == "official", "the first token never shrinks"
    moved = (out != first).any(-1)
    assert moved.any()
    marked = sink[:, :, None].expand_as(first)
    changed_rows = moved[..., None] & (first > 0)
    torch.testing.assert_close(out[changed_rows & marked], 0.3 * first[changed_rows & marked])
    ratio = out / first
    free = changed_rows & ~marked & (image if receivers == "image" else torch.ones_like(image))
    lowest = ratio.masked_fill(~free, torch.inf).amin(-1)[moved]
    highest = ratio.masked_fill(~free, -torch.inf).amax(-1)[moved]
    torch.testing.assert_close(lowest, highest, rtol=1e-5, atol=0)
    assert torch.equal(out[~moved], first[~moved])
    if receivers == "image":
        text = changed_rows & ~marked & ~image
        assert torch.equal(out[text], first[text])


def test_pieces_of_any_size_give_the_same():
    a = random_weights()
    whole, _ = prefill(ACT(alpha=2.0, layers=(LAYER,)), a)
    for piece in (1, 7, 39):
        torch.testing.assert_close(
            prefill(ACT(alpha=2.0, layers=(LAYER,)), a, piece=piece)[0], whole, rtol=0, atol=1e-6
        )


def test_worked_row():
    a = torch.tensor([0.5, 0.3, 0.1, 0.1]).view(1, 1, 1, 4)
    memo = {"received": {LAYER: None}, "sinks": {LAYER: torch.tensor([False, True, False, False]).view(1, 1, 1, 4)}}
    site = Site(LAYER, 4, geometry(4), torch.ones(1, 1, dtype=torch.bool), 3, 0, memo)
    out = ACT().weights(a, site).flatten()
    torch.testing.assert_close(out, torch.tensor([0.628571, 0.12, 0.125714, 0.125714]), rtol=0, atol=1e-6)


def test_few_rows_and_a_short_prompt():
    a = random_weights(12)
    out, memo = prefill(ACT(alpha=12.0, layers=(LAYER,)), a)
    assert torch.equal(out, a), "a threshold of 1: no sinks"
    _, memo = prefill(ACT(alpha=1.0, min_rows=5, layers=(LAYER,)), a)
    assert not memo["sinks"][LAYER][..., 8:].any() and memo["sinks"][LAYER].any()
    _, memo = prefill(ACT(alpha=1.0, layers=(LAYER,)), a)
    assert memo["sinks"][LAYER][..., 8:].any()
    assert memo["marks"][LAYER][2].sum() == memo["sinks"][LAYER][..., 5:].sum()


@torch.no_grad()
def test_a_factor_of_one_is_the_untouched_model():
    model, prompt = llava(), picture_prompt(llava())
    plain = model(**prompt).logits
    with ACT(beta=1.0)(model):
        assert torch.equal(model(**prompt).logits, plain)


BITES = ACT(alpha=1.2, beta=0.0, layers=(1, 2, 3))


@pytest.mark.parametrize("rows", ["all", "after_last_image", "last"])
@pytest.mark.parametrize("answering", ["cached", "running"])
def test_with_cache_equals_without(rows, answering):
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 9])
    act, scores = replace(BITES, rows=rows, answering=answering, min_rows=2), []
    with act(model):
        for use_cache in (True, False):
            out = answer(model, prompt, use_cache=use_cache, output_scores=True, return_dict_in_generate=True)
            scores.append(torch.stack(out.scores))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-4)
    with replace(act, answering="cached" if answering == "running" else "running")(model):
        other = answer(model, prompt, output_scores=True, return_dict_in_generate=True)
    assert not torch.allclose(torch.stack(other.scores), scores[0], atol=1e-4)


def test_a_whole_sequence_edited_with_the_same_sinks(monkeypatch):
    """Prompt and answer in eager attention, written out over all queries and keys; sinks from the prompt's rows alone."""
    act = BITES

    def edit(a, layer, n):
        if layer not in act.layers:
            return a
        received = a[:, :, :n].sum(2)[..., :n] / (n - torch.arange(n))
        sink = (received > act.alpha / n) & (torch.arange(n) > 0)
        sink = torch.nn.functional.pad(sink, (0, a.shape[-1] - n))[:, :, None]
        s, r = (a * sink).sum(-1, keepdim=True), (a * ~sink).sum(-1, keepdim=True)
        return torch.where(r < 1e-6, a, torch.where(sink, act.beta * a, a * (1 + (1 - act.beta) * s / r)))

    got, want, _ = edited_as_a_whole(monkeypatch, act, edit)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_second_turn_goes_on_with_the_sums():
    model, prompt = llava(), picture_prompt(llava())
    n = prompt["input_ids"].shape[1]
    cut = n - 4
    act = replace(BITES, rows="last")  # only the last row of a turn is edited: earlier layers stay stock
    act = replace(act, layers=(1,))
    with act(model):
        first = model(input_ids=prompt["input_ids"][:, :cut], pixel_values=prompt["pixel_values"], use_cache=True)
        model(input_ids=prompt["input_ids"][:, cut:], past_key_values=first.past_key_values)
        turns = vlmfix.effects(model)[0]["samples"][0]["layers"][1]
        model(**prompt)
        once = vlmfix.effects(model)[0]["samples"][0]["layers"][1]
    for key in ("visual_sinks", "text_sinks", "newest_sinks"):
        assert turns[key] == once[key] > 0


def test_refusals(tmp_path):
    for settings, sentence in [
        ({"beta": 1.2}, r"beta: expected a number in 0\.\.1, got 1.2"),
        ({"alpha": 0}, "alpha: expected a number above 0"),
        ({"min_rows": 0}, "min_rows: expected 1 or more"),
        ({"sinks": "text"}, "sinks: expected all or image, got 'text'"),
        ({"rows": "some"}, "rows: expected all, after_last_image or last"),
        ({"head_list": ()}, "head_list: expected the file of a head list, or heads such as L3H1/L3H5, got"),
        ({"layers": ()}, "no layers: ACT would do nothing"),
        ({"select": "random_heads"}, "needs a head_list"),
        ({"variant": "code"}, "variant: expected paper or official"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ACT(**settings)
    model = llava()
    for act, sentence in [
        (ACT(layers=(9,)), r"layers: expected numbers in 0\.\.3"),
        (ACT(head_list="L1H9"), r"heads in 0\.\.5, got L1H9"),
        (ACT(head_list="L1H2", layers=(2,)), "none of L1H2 lies in the layers"),
        (ACT(head_list=str(tmp_path / "none.json")), "cannot read the head list"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            vlmfix.wrap(model, act)
    with pytest.raises(ValueError, match="leaves the first two and the last alone"):
        vlmfix.wrap(llava(n_layers=3), ACT())
    prompt = picture_prompt(model)
    with ACT()(model), pytest.raises(ValueError, match="act needs the whole prompt in one pass"):
        answer(model, prompt, prefill_chunk_size=8)
    with ACT(answering="running")(model), pytest.raises(ValueError, match="follows one answer token by token"):
        answer(model, prompt, num_beams=2)
    with ACT(sinks="image", alpha=0.1)(model), pytest.warns(UserWarning, match="no image token was a sink"):
        answer(model, {"input_ids": torch.tensor([[1, 4, 9, 12, 7, 7, 30]])})


def test_head_lists(tmp_path):
    model = llava()
    scores = tuple(tuple(float(l * 6 + h) for h in range(6)) for l in range(4))  # noqa: E741
    path = str(tmp_path / "heads.json")
    HeadList(model="", tool="act", scores=scores).select(top=5).save(path)
    vlmfix.wrap(model, ACT(head_list=path))
    (said,) = vlmfix.effects(model)
    assert said["head_list"] == "L3H5/L3H4/L3H3/L3H2/L3H1" and said["layers"] == [3]
    assert said["facts"]["head_list"]["file"] == path
    tokens, heads = ACT(head_list=path).controls()
    assert (tokens.select, heads.select) == ("random_tokens", "random_heads")
    vlmfix.wrap(model, heads)
    (control,) = vlmfix.effects(model)
    assert control["head_list"].count("H") == 5 and control["head_list"] != said["head_list"]
    assert ACT(head_list=((1, 2), (3, 4))).head_list == "L1H2/L3H4"
    assert [c.select for c in ACT().controls()] == ["random_tokens"]


def test_random_tokens_are_as_many_and_others():
    a = random_weights(batch=2)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :9] = False
    a[1] = a[1] * valid[1]
    a[1, :, 9:, 9:] = random_weights(31, seed=3)[0]
    act = ACT(alpha=2.0, layers=(LAYER,))
    found = {}
    for select in ("received", "random_tokens"):
        _, memo = prefill(replace(act, select=select), a, geometry(40, valid))
        found[select] = memo["sinks"][LAYER][:, :, 0]
    assert torch.equal(found["received"].sum(-1), found["random_tokens"].sum(-1))
    assert not torch.equal(found["received"], found["random_tokens"])
    assert not found["random_tokens"][0, :, 0].any() and not found["random_tokens"][1, :, :10].any()
    _, memo = prefill(replace(act, select="random_tokens"), a[1:, :, 9:, 9:])
    assert torch.equal(memo["sinks"][LAYER][0, :, 0], found["random_tokens"][1, :, 9:]), "padding does not matter"


def test_looks_only_where_it_may():
    """Rows that are not admitted, and layers that are not edited, keep the kernel's output bit for bit."""
    model = llava()
    prompt, outputs = picture_prompt(model), {}
    handle = (
        model.get_decoder()
        .layers[2]
        .self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.setdefault(len(outputs), args[0]))
    )
    with torch.no_grad():
        model(**prompt)
        with ACT(alpha=1.2, rows="after_last_image", head_list="L2H0/L2H5")(model):
            model(**prompt)
    handle.remove()
    changed = (outputs[0] != outputs[1]).view(1, -1, 6, 8).any(-1)[0]
    image = (prompt["input_ids"] == 60)[0]
    after = (image.cumsum(0) == 16) & ~image
    assert changed.any() and not changed[~after].any() and not changed[:, 1:5].any()


def test_another_weight_edit_before_it_leaves_the_survey_alone():
    class Flat(Intervention):
        rows = "all"

        def weights(self, a, site):
            return (a > 0) / (a > 0).sum(-1, keepdim=True)

    model, prompt = llava(), picture_prompt(llava())
    marks = []
    for given in ([replace(BITES, layers=(0,))], [Flat(), replace(BITES, layers=(0,))]):
        with torch.no_grad():
            vlmfix.wrap(model, given)(**prompt)
        marks.append(vlmfix.effects(model)[-1]["samples"][0]["layers"][0]["visual_sinks"])
    assert marks[0] == marks[1] > 0


def test_a_survey_of_the_prompt_only():
    seen = []

    class Survey(Intervention):
        def survey(self, a, site):
            seen.append((a.shape[2], site.start, site.positions.tolist()))

    model = llava()
    with Survey()(model):
        answer(model, picture_prompt(model))
    n = picture_prompt(model)["input_ids"].shape[1]
    assert seen == [(n, 0, list(range(n)))] * 4, "once per layer, not again at every token"
