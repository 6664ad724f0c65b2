"""PyramidDrop against a plain rewrite of its rule, and the properties that the rule implies."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

import vlmfix
from tests.models import ARCHITECTURES, IMAGE, TEXT, VISION, llava, picture_prompt, qwen2_5_vl
from vlmfix.engine.attachment import attached
from vlmfix.hooks import PAI, VAR, VCD, VHR, Contrast, PyramidDrop, Truncate
from vlmfix.hooks.pyramiddrop import attention_of, best, cut, hide
from vlmfix.method.intervention import Intervention


@torch.no_grad()
def logits(model, prompt):
    return model(**prompt).logits


def generate(model, prompt, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [58, 59, 60, 61], **settings}
    out = model.generate(**prompt, **settings, output_scores=True, return_dict_in_generate=True)
    return out, torch.stack(out.scores).nan_to_num(neginf=0)


def state(model):
    return attached(model).last().memos[0]["prompt"]


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_best_of_every_image_by_hand():
    score = torch.tensor([[9.0, 1, 3, 2, 9, 5, 5, 4]])
    image = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 2]])
    kept = best(score, image, torch.tensor([[1, 2, 1]]))
    assert kept.int().tolist() == [[0, 0, 1, 1, 0, 1, 0, 0]], "two of the first, one of the second; ties to the earlier"


def test_attention_is_ranked_in_float32_over_all_visible_keys():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 8, generator=g), torch.randn(2, 2, 5, 8, generator=g)
    visible = torch.tensor([[True] * 5, [False, True, True, True, False]])
    k[1, :, 2] = 30 * q[1].view(2, 3, 8).mean(1)  # a huge key
    a = attention_of(q.half(), k.half(), 0.5, visible)
    for b in range(2):
        s = (q.half().float()[b][:, None] * k.half().float().repeat_interleave(3, 1)[b]).sum(-1) * 0.5
        want = s.masked_fill(~visible[b], -torch.inf).softmax(-1).mean(0)
        torch.testing.assert_close(a[b], want)
    assert a.dtype == torch.float32 and a[1].argmax() == 2 and a[1, 0] == a[1, 4] == 0
    torch.testing.assert_close(a.sum(1), torch.ones(2))


def rewritten(model, ids, pixels, n_prompt, layers, ratios, positions):
    """Logits of a whole sequence, one sample, no cache: the decoder written out, tokens dropped by list indexing."""
    decoder, kept, sets = model.model.language_model, torch.arange(ids.shape[1]), []
    x = model.get_input_embeddings()(ids)
    x[ids == IMAGE] = torch.cat(model.model.get_image_features(pixel_values=pixels).pooler_output)
    n_image = int((ids == IMAGE).sum())

    def run(layer, x):
        at = kept if positions == "keep" else torch.arange(len(kept))
        rope = decoder.rotary_emb(x, at[None, : x.shape[1]])
        return layer(x, position_embeddings=rope, attention_mask=causal(x.shape[1]))

    for i, layer in enumerate(decoder.layers):
        if i in layers:
            weights = []
            hook = layer.self_attn.register_forward_hook(lambda _m, _a, out, seen=weights: seen.append(out[1]))
            run(layer, x[:, kept < n_prompt])
            hook.remove()
            score = weights[0][0, :, -1].mean(0).tolist()
            image = [j for j, p in enumerate(kept.tolist()) if p < n_prompt and ids[0, p] == IMAGE]
            best_first = sorted(image, key=score.__getitem__, reverse=True)
            gone = best_first[max(1, int(n_image * ratios[layers.index(i)])) :]
            stay = [j for j in range(len(kept)) if j not in gone]
            kept, x = kept[stay], x[:, stay]
            sets.append(kept[kept < n_prompt])
        x = run(layer, x)
    return model.lm_head(decoder.norm(x))[0], kept, sets


def causal(n):
    return torch.full((1, 1, n, n), torch.finfo(torch.float32).min).triu(1)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@torch.no_grad()
def test_equals_the_decoder_written_out(positions):
    model = llava("eager", n_layers=6)
    prompt = picture_prompt(model)
    n = prompt["input_ids"].shape[1]
    with PyramidDrop(positions=positions)(model):
        assert vlmfix.effects(model)[0]["layers"] == [1, 3, 4]
        out, scores = generate(model, prompt)
        mine = state(model)
        want, kept, sets = rewritten(
            model, out.sequences[:, :-1], prompt["pixel_values"], n, [1, 3, 4], [0.5, 0.25, 0.125], positions
        )
        whole = logits(model, prompt)
    want[:, [58, 59, 60, 61]] = 0
    torch.testing.assert_close(scores[:, 0], want[-8:], rtol=0, atol=1e-4)
    for a, b in zip(mine.index, sets, strict=True):
        assert a[0].tolist() == b.tolist(), "kept tokens, in order"
    assert whole.shape[1] == n, "a plain forward pass keeps its shape"
    gone = [j for j in range(n) if j not in kept]
    assert len(gone) == 14 and not whole[0, gone].any() and (whole[0, kept[kept < n]] != 0).any(-1).all()


def test_renumbering_is_another_thing():
    model = llava()
    prompt = picture_prompt(model)
    found = []
    for positions in ("keep", "renumber"):
        with PyramidDrop(positions=positions)(model):
            found.append(generate(model, prompt)[1])
    assert not torch.allclose(*found, atol=1e-2)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropping_equals_masking(architecture, attn):
    model = ARCHITECTURES[architecture](attn)
    prompt = picture_prompt(model, 2, lengths=[3, 6], n_images=2)
    found = {}
    for form in ("drop", "mask"):
        with PyramidDrop(form=form)(model):
            out, found[form] = generate(model, prompt)
            torch.testing.assert_close(generate(model, prompt, use_cache=False)[1], found[form], rtol=0, atol=1e-4)
            kept = state(model).kept
        lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        n = prompt["input_ids"].shape[1]
        assert lengths[0] == n + 7 == out.past_key_values.get_seq_length()
        assert lengths[1:] == [n + 7 - (0 if form == "mask" else int((~k[0]).sum())) for k in kept]
    torch.testing.assert_close(found["drop"], found["mask"], rtol=0, atol=1e-4)
    assert not torch.allclose(found["drop"], generate(model, prompt)[1], atol=1e-2)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_an_image_may_come_first(attn):
    """A dropped first token has nobody left to look at, and must not spoil the rest."""
    model = llava(attn)
    prompt = picture_prompt(model)
    ids = torch.cat([torch.full((1, 16), IMAGE), torch.tensor([[5, 9, 20, 33]])], dim=1)
    found = {}
    for form in ("drop", "mask"):
        with PyramidDrop(form=form)(model):
            found[form] = generate(model, {"input_ids": ids, "pixel_values": prompt["pixel_values"]})[1]
            assert not state(model).kept[0][0, 0], "the first token goes"
    torch.testing.assert_close(found["drop"], found["mask"], rtol=0, atol=1e-4)


def test_sizes_of_the_paper():
    """32 layers, 576 image tokens: 288, 144, 72 are left, and the caches hold as much."""
    torch.manual_seed(0)
    text = {
        **TEXT,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 700,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "image_size": 96}),
        text_config={"model_type": "llama", **text, "num_hidden_layers": 32},
        image_token_index=IMAGE,
        image_seq_length=576,
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 50, (1, 605), generator=torch.Generator().manual_seed(0))
    ids[0, 5:581] = IMAGE
    with PyramidDrop()(model), torch.no_grad():
        out = model(input_ids=ids, pixel_values=torch.randn(1, 3, 96, 96), use_cache=True, logits_to_keep=1)
        (sample,) = vlmfix.effects(model)[0]["samples"]
        kept = state(model).kept
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [605] * 8 + [317] * 8 + [173] * 8 + [101] * 8
    assert sample == {
        "acted": True,
        "image_tokens": 576,
        "layers": {8: {"image_tokens": 288}, 16: {"image_tokens": 144}, 24: {"image_tokens": 72}},
    }
    assert all((b <= a).all() for a, b in pairwise(kept)), "nested"
    assert all(k[ids != IMAGE].all() for k in kept), "text stays"


def test_a_huge_key_stays():
    """Planted where the ranking reads it: in the key projection of the stages' first layers."""
    model = llava()
    prompt = picture_prompt(model)
    token = int((prompt["input_ids"][0] == IMAGE).nonzero()[9])
    with PyramidDrop(ratios=(0.5, 0.25, 0.01))(model):
        generate(model, prompt)
        before = [bool(k[0, token]) for k in state(model).kept]
        assert not all(before)

    @dataclass(frozen=True)
    class Planted(PyramidDrop):
        def tokens(self, inputs, site, look):
            def planted(inputs):
                q, k, scale = look(inputs)
                index = site.memo["prompt"].index
                place = token if not index else int((index[-1][0] == token).nonzero())
                k[:, :, place] = 100 * q[:, :, -1].view(1, 2, 3, 8).sum(2)
                return q, k, scale

            return super().tokens(inputs, site, planted)

    with Planted(ratios=(0.5, 0.25, 0.01))(model):
        generate(model, prompt)
        kept = state(model).kept
    assert all(k[0, token] for k in kept)
    assert int((kept[-1] & (prompt["input_ids"] == IMAGE)).sum()) == 1, "at least one is kept"


@pytest.mark.parametrize("form", ["drop", "mask"])
def test_ratio_one_and_no_image_change_nothing(form):
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    text = {"input_ids": prompt["input_ids"].clamp(max=50)}
    plain, bare, said = logits(model, prompt), logits(model, text), generate(model, prompt)[1]
    with PyramidDrop(ratios=(1, 1, 1), form=form)(model):
        assert torch.equal(logits(model, prompt), plain)
        with pytest.warns(UserWarning, match="did nothing in a whole generation"):
            assert torch.equal(generate(model, prompt)[1], said)
        assert not any(s["acted"] for s in vlmfix.effects(model)[0]["samples"])
    with PyramidDrop(form=form)(model):
        assert torch.equal(logits(model, text), bare)
        assert not any(s["acted"] for s in vlmfix.effects(model)[0]["samples"])


def test_every_image_keeps_its_share():
    model = llava()
    prompt = picture_prompt(model, 2, n_images=3, lengths=[3, 6])
    with PyramidDrop()(model):
        generate(model, prompt)
        kept = state(model).kept
    image = prompt["input_ids"] == IMAGE
    for k, n in zip(kept, (8, 4, 2), strict=True):
        assert k[image].view(2, 3, 16).sum(-1).tolist() == [[n] * 3] * 2


def unequal(model):
    """One sample with two pictures, one with one, one without."""
    two, one = picture_prompt(model, 1, n_images=2, seed=1), picture_prompt(model, 1, seed=2)
    width = two["input_ids"].shape[1]
    fill = lambda x: torch.nn.functional.pad(x, (width - x.shape[1], 0))  # noqa: E731
    ids = torch.cat([two["input_ids"], fill(one["input_ids"]), fill(torch.tensor([[1, 5, 9, 20]]))])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.cat([two["pixel_values"], one["pixel_values"]]),
    }, [two, one, {"input_ids": torch.tensor([[1, 5, 9, 20]])}]


@pytest.mark.filterwarnings("ignore:pyramiddrop did nothing")
def test_unequal_samples_need_masks():
    model = llava()
    prompt, singles = unequal(model)
    with PyramidDrop()(model), pytest.raises(ValueError, match=r"equal numbers .* got \[32, 16, 0\]; .* form=mask"):
        generate(model, prompt)
    with PyramidDrop(form="mask")(model):
        together = generate(model, prompt)[1]
        assert [s["acted"] for s in vlmfix.effects(model)[0]["samples"]] == [True, True, False]
        for b, single in enumerate(singles):
            torch.testing.assert_close(generate(model, single)[1][:, 0], together[:, b], rtol=0, atol=1e-4)


def test_masking_works_with_a_static_cache():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    with PyramidDrop(form="mask")(model):
        want = generate(model, prompt)[1]
        got = generate(model, prompt, cache_implementation="static", disable_compile=True)[1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_second_turn_goes_on_from_short_caches():
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    found = []
    for form in ("drop", "mask"):
        with PyramidDrop(form=form)(model):
            first, _ = generate(model, prompt)
            ids = torch.cat([first.sequences, torch.tensor([[5, 8, 13]] * 2)], dim=1)
            mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 11), value=1)
            turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
            found.append(generate(model, turn)[1])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_masks_of_all_forms_are_cut():
    columns = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    four = torch.arange(72).view(2, 1, 6, 6)
    assert cut(None, columns, 6, rows=True) is None
    assert torch.equal(cut(four, columns, 6, rows=True)[1, 0], four[1, 0][columns[1]][:, columns[1]])
    assert torch.equal(cut(four[:, :, -1:], columns, 6, rows=False)[0, 0], four[0, 0, -1:, columns[0]])
    two = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert cut(two, columns, 6, rows=True).tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
    kept = torch.tensor([[False, True, False]])
    rows = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert hide(None, kept, 4, 0, "cpu")[0, 0].int().tolist() == rows, "kept ones, and each row itself: none is empty"
    given = torch.zeros(1, 1, 1, 6)
    assert (hide(given, kept, 4, 3, "cpu")[0, 0, 0] == 0).tolist() == [False, True, False, True, True, True]
    with pytest.raises(ValueError, match="over 6 keys, got 9"):
        cut(torch.zeros(2, 1, 1, 9), columns, 6, rows=False)
    with pytest.raises(TypeError, match="load the model with sdpa or eager"):
        hide(two, two.bool(), 6, 0, "cpu")


# ---- together with methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [PAI(), VAR(dims=(7,)), VHR(), PyramidDrop(ratios=(0.5,))])
def test_methods_that_tell_tokens_by_their_place_are_refused(other):
    with pytest.raises(ValueError, match=r"tells tokens by their place in the prompt|both drop tokens"):
        vlmfix.wrap(llava(), [other, PyramidDrop()])


def test_others_go_along_and_their_second_streams_stay_whole():
    model = llava()
    prompt = picture_prompt(model)
    for other in (Contrast(gamma=2.0), VCD(t=999), Truncate()):
        vlmfix.wrap(model, [other, PyramidDrop()])
    plain = vlmfix.unwrap(model)
    streams = []
    for speed in ([], [PyramidDrop()]):
        with vlmfix.engine.wrap.wrapped(plain, [Contrast(gamma=2.0), *speed]):
            generate(model, prompt, max_new_tokens=1)
            streams.append(attached(model).last().memos[0]["blind"].logits)
    assert torch.equal(*streams)


@pytest.mark.parametrize(
    "other", [PAI(alpha=3.0, skip_first=0), VAR(dims=(7,), tau=1.0, rho=0.0, min_visual_mass=0.0), VHR()]
)
def test_masking_goes_together_with_methods(other):
    """Whatever a method does to the image, dropped tokens stay unseen."""
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    seen = {}

    @dataclass(frozen=True)
    class Watch(Intervention):
        def weights(self, a, site):
            seen[site.layer] = a
            return a

    with PyramidDrop(form="mask")(model):
        alone = generate(model, prompt)[1]
    for order in ([PyramidDrop(form="mask"), other, Watch()], [other, Watch(), PyramidDrop(form="mask")]):
        with vlmfix.engine.wrap.wrapped(model, order):
            both = generate(model, prompt, max_new_tokens=2)[1]
            memos = attached(model).last().memos
            kept = next(m["prompt"] for m in memos if "prompt" in m).kept
        assert not torch.allclose(both, alone[:2], atol=1e-3)
        for layer, a in list(seen.items())[1:]:
            hidden = torch.nn.functional.pad(~kept[layer - 1], (0, a.shape[-1] - kept[0].shape[1]))
            assert hidden.any() and not a[hidden[:, None, None].expand_as(a)].any()


# ---- control, settings, refusals -------------------------------------------------------------------------------------


def test_control_keeps_random_tokens():
    model = llava()
    prompt = picture_prompt(model, 3, lengths=[3, 6, 4])
    (control,) = PyramidDrop().controls()
    image, sets = prompt["input_ids"] == IMAGE, []
    for one in (PyramidDrop(), control):
        with one(model):
            logits(model, prompt)
            sets.append([k[image].view(3, 16) for k in state(model).kept])
    for mine, drawn, n in zip(*sets, (8, 4, 2), strict=True):
        assert drawn.sum(1).tolist() == mine.sum(1).tolist() == [n] * 3 and not torch.equal(mine, drawn)
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"ratios": (0.5, 0.6, 0.1)}, "ratios: expected numbers above 0 and up to 1 that do not rise"),
        ({"ratios": (1.5,)}, "ratios"),
        ({"ratios": (0.5, 0)}, "ratios"),
        ({"ratios": ()}, "ratios"),
        ({"layers": (0, 1, 2)}, "layers: expected rising numbers from 1 on"),
        ({"layers": (3, 2, 4)}, "layers"),
        ({"layers": (1, 2)}, "as many ratios as layers"),
        ({"form": "cut"}, "form: expected drop or mask"),
        ({"positions": "new"}, "positions: expected keep or renumber"),
        ({"select": "all"}, "select: expected attention or random"),
        ({"form": "mask", "positions": "renumber"}, "needs form=drop"),
    ],
)
def test_bad_settings(bad, said):
    with pytest.raises(ValueError, match=said):
        PyramidDrop(**bad)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"layers: expected rising numbers in 1\.\.3 on this model, got \[1, 2, 4\]"):
        vlmfix.wrap(llava(), PyramidDrop(layers=(1, 2, 4)))
    with pytest.raises(ValueError, match=r"in 1\.\.1 on this model, got \[0, 1, 1\]"):
        vlmfix.wrap(llava(n_layers=2), PyramidDrop())
    with pytest.raises(ValueError, match="positions in three dimensions"):
        vlmfix.wrap(qwen2_5_vl(), PyramidDrop(positions="renumber"))
    deep = qwen2_5_vl()
    deep.config.vision_config.deepstack_visual_indexes = [0, 1]
    with pytest.raises(ValueError, match=r"image features in layers 0\.\.1; start after them"):
        vlmfix.wrap(deep, PyramidDrop())
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MistralConfig(**TEXT, num_hidden_layers=4, sliding_window=8),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    with pytest.raises(ValueError, match="needs layers that see all tokens; mistral also has sliding"):
        vlmfix.wrap(LlavaForConditionalGeneration(config), PyramidDrop())


def test_chunked_prefill_is_refused():
    model = llava()
    with PyramidDrop()(model), pytest.raises(ValueError, match="pyramiddrop needs the whole prompt in one pass"):
        model.generate(picture_prompt(model)["input_ids"], max_new_tokens=2, prefill_chunk_size=4)
