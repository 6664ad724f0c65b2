"""The contract that every intervention keeps on every architecture: see design in CONTRIBUTING, "Contract"."""

import copy
import json
import pickle
import threading
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import torch

import vlmfix
from tests.contract.examples import INTERVENTIONS, ONLY, READERS
from tests.models import ARCHITECTURES, picture_prompt, plant_sinks
from vlmfix.hooks import REGISTRY, VAR, VHR
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import as_interventions, from_json, method_class
from vlmfix.method.stages import ASK_STAGES

GUIDES = {name for name, one in INTERVENTIONS.items() if "logits" in one.stages() and one.acts_at("logits")}
"""Methods that act where the next token is chosen: a plain forward pass does not show them."""
PAIRS = [(m, a) for m in INTERVENTIONS for a in ARCHITECTURES if a in ONLY.get(m, ARCHITECTURES)]
CASES = [(m, a, k) for m, a in PAIRS for k in ("sdpa", "eager")]


def footprint(model):
    """Everything that hooks and attributes could leave behind, of every module."""
    return {
        name: (
            {
                k: id(v) for k, v in vars(m).items() if not isinstance(v, dict) and k != "rope_deltas"
            },  # Qwen's own state
            {k: [(i, id(v)) for i, v in d.items()] for k, d in vars(m).items() if isinstance(d, dict)},
            list(vars(m)),
        )
        for name, m in model.named_modules()
    }


def build(architecture, attn="sdpa"):
    model = plant_sinks(ARCHITECTURES[architecture](attn))
    logits(model, picture_prompt(model))  # transformers itself adds hooks to a model on its first pass
    return model


@torch.no_grad()
def logits(model, prompt):
    return model(**prompt).logits


def chosen_by(model, prompt):
    """Scores from which the first two tokens are chosen, (2, B, V)."""
    return torch.stack(answer(model, prompt, max_new_tokens=2, output_scores=True, return_dict_in_generate=True).scores)


def answer(model, prompt, **settings):
    special = [
        58,
        59,
        60,
        61,
    ]  # a random model would write image tokens, which transformers itself refuses without a cache
    return model.generate(**prompt, **{"max_new_tokens": 8, "do_sample": False, "suppress_tokens": special, **settings})


def test_every_method_is_under_contract():
    in_ask = {name for name in REGISTRY if set(ASK_STAGES) & set(method_class(name).stages())}
    assert set(INTERVENTIONS) == set(REGISTRY) - in_ask, "methods that act in ask: tests/asking/test_ask_stages.py"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_changes_nothing(architecture, attn):
    model = build(architecture, attn)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    before, plain = footprint(model), logits(model, prompt)
    for nothing in (None, "none", []):
        assert vlmfix.wrap(model, nothing) is model
        assert footprint(model) == before

    @dataclass(frozen=True)
    class Watch(Intervention):
        rows = "all"

        def weights(self, a, site):
            assert a.shape[2] == site.rows.shape[1] and a.shape[3] == site.geometry.n
            return a.clone()

        def heads(self, o, site):
            return o * 1

    with Watch()(model):
        assert torch.equal(logits(model, prompt), plain), "looking at everything and changing nothing"


@pytest.mark.parametrize(("method", "architecture", "attn"), CASES)
def test_bites_and_comes_off(method, architecture, attn):
    model = build(architecture, attn)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    before, plain, said = footprint(model), chosen_by(model, prompt), answer(model, prompt)
    vlmfix.wrap(model, INTERVENTIONS[method])
    once, edited = footprint(model), chosen_by(model, prompt)
    assert torch.equal(edited, plain) == (method in READERS)
    assert all(s["acted"] for s in vlmfix.effects(model)[0]["samples"])
    vlmfix.wrap(model, INTERVENTIONS[method])
    assert footprint(model) == once, "wrapping with the same changes nothing"
    assert torch.equal(chosen_by(model, prompt), edited), "two generations in a row are equal"
    vlmfix.unwrap(model)
    assert footprint(model) == before
    assert torch.equal(chosen_by(model, prompt), plain) and torch.equal(answer(model, prompt), said)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_two_generations_in_a_row(method):
    model = build("llava")
    first, second = picture_prompt(model, seed=1), picture_prompt(model, seed=2)
    with INTERVENTIONS[method](model):
        alone = answer(model, second)
        answer(model, first)
        assert torch.equal(answer(model, second), alone), "nothing leaks from one picture to the next"


@pytest.mark.parametrize(("method", "architecture", "attn"), CASES)
def test_with_cache_equals_without(method, architecture, attn):
    model = build(architecture, attn)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    with INTERVENTIONS[method](model):
        scores = {}
        for use_cache in (True, False):
            out = answer(
                model, prompt, use_cache=use_cache, max_new_tokens=6, output_scores=True, return_dict_in_generate=True
            )
            scores[use_cache] = torch.stack(out.scores)
    torch.testing.assert_close(scores[True], scores[False], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "architecture", "attn"), CASES)
def test_batch_with_left_padding_equals_singles(method, architecture, attn):
    model = build(architecture, attn)
    lengths = [3, 9, 5, 7]
    together = picture_prompt(model, 4, lengths=lengths)
    n_pixels = together["pixel_values"].shape[0] // 4
    with INTERVENTIONS[method](model):
        batch = answer(model, together, output_scores=True, return_dict_in_generate=True, max_new_tokens=5)
        chosen = vlmfix.effects(model)[0]["samples"]
        width = together["input_ids"].shape[1]
        for b in range(4):
            keep = together["attention_mask"][b].bool()
            single = {
                k: together[k][b : b + 1, keep]
                for k in ("input_ids", "attention_mask", "mm_token_type_ids")
                if k in together
            }
            single["pixel_values"] = together["pixel_values"][b * n_pixels : (b + 1) * n_pixels]
            for k in ("image_sizes", "image_grid_thw"):
                if k in together:
                    single[k] = together[k][b : b + 1]
            alone = answer(model, single, output_scores=True, return_dict_in_generate=True, max_new_tokens=5)
            assert torch.equal(alone.sequences[0, -5:], batch.sequences[b, width:])
            torch.testing.assert_close(
                torch.stack(alone.scores)[:, 0], torch.stack(batch.scores)[:, b], rtol=1e-3, atol=1e-4
            )
            (own,) = vlmfix.effects(model)[0]["samples"]
            for layer, found in own.get("layers", {}).items():
                for key in ("visual_sinks", "text_sinks", "heads"):
                    assert found.get(key) == chosen[b]["layers"][layer].get(key)


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_right_padding_equals_left_padding(method, architecture):
    model = build(architecture)
    left, right = (picture_prompt(model, 2, lengths=[3, 8], pad=pad) for pad in ("left", "right"))
    for p in (left, right):
        p["position_ids"] = None
    with INTERVENTIONS[method](model):
        a, b = logits(model, left), logits(model, right)
    n = right["attention_mask"].sum(1)
    for row in range(2):
        torch.testing.assert_close(a[row, -1], b[row, n[row] - 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_several_images(method, architecture):
    model = build(architecture)
    prompt = picture_prompt(model, 1, n_images=3)
    seen = []

    @dataclass(frozen=True)
    class Look(Intervention):
        def heads(self, o, site):
            seen.append(site.geometry)
            return o

    plain = chosen_by(model, prompt)
    with INTERVENTIONS[method](model):
        assert torch.equal(chosen_by(model, prompt), plain) == (method in READERS)
    with Look()(model):
        logits(model, prompt)
    g, ids = seen[0], prompt["input_ids"]
    assert torch.equal(g.image, ids == 60)
    first, last = g.image[0].nonzero()[[0, -1], 0]
    assert g.system[0].nonzero()[-1, 0] == first - 1 and g.instruction[0].nonzero()[0, 0] == last + 1
    assert g.last_prompt.tolist() == [ids.shape[1] - 1] and not g.generated.any()


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_beams(method, architecture):
    """Every beam is scored as a plain pass over its full sequence scores it."""
    model = build(architecture)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    if INTERVENTIONS[method].traits.sequential:
        with INTERVENTIONS[method](model), pytest.raises(ValueError, match="beam search is not supported"):
            answer(model, prompt, num_beams=3)
        return
    with INTERVENTIONS[method](model):
        out = answer(
            model, prompt, num_beams=3, num_return_sequences=3, max_new_tokens=5, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        told = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        again = {}
        for use_cache in (True, False):
            again[use_cache] = answer(model, prompt, num_beams=3, max_new_tokens=5, use_cache=use_cache)
    assert torch.equal(again[True], again[False]) and torch.isfinite(told).all()
    assert torch.equal(again[True], out.sequences[::3])


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_comes_off_after_an_exception(method):
    model = build("llava")
    prompt = picture_prompt(model)
    before, plain = footprint(model), logits(model, prompt)

    class Stop(BaseException):
        """Like Ctrl-C."""

    def interrupt(*_):
        raise Stop

    with pytest.raises(Stop), INTERVENTIONS[method](model):
        handle = model.get_decoder().layers[2].mlp.register_forward_hook(interrupt)
        try:
            answer(model, prompt)
        finally:
            handle.remove()
    assert footprint(model) == before and torch.equal(logits(model, prompt), plain)
    with INTERVENTIONS[method](model):
        good = answer(model, prompt)
        with pytest.raises(ValueError, match="size"):
            model(input_ids=prompt["input_ids"], pixel_values=torch.zeros(1, 3, 5, 5))
        decoder_alone = model.get_decoder()(input_ids=torch.tensor([[1, 4, 5]])).last_hidden_state
        assert torch.equal(answer(model, prompt), good)
    assert torch.equal(model.get_decoder()(input_ids=torch.tensor([[1, 4, 5]])).last_hidden_state, decoder_alone)


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_two_threads(method, architecture):
    model = build(architecture)
    prompts = [picture_prompt(model, seed=s, lengths=[4 + 3 * s]) for s in range(2)]
    with INTERVENTIONS[method](model):
        one_by_one = [answer(model, p, max_new_tokens=12) for p in prompts]
        found = [None, None]
        gate = threading.Barrier(2)

        def run(i):
            gate.wait()
            found[i] = [answer(model, prompts[i], max_new_tokens=12) for _ in range(2)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    for i in range(2):
        assert all(torch.equal(again, one_by_one[i]) for again in found[i])


def test_threads_report_their_own_generation():
    model = build("llava")
    prompts = [picture_prompt(model, seed=s, n_images=s + 1) for s in range(2)]
    with INTERVENTIONS["var"](model):
        told, gate = [None, None], threading.Barrier(2)

        def run(i):
            answer(model, prompts[i])
            gate.wait()
            told[i] = vlmfix.effects(model)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for i in range(2):
            answer(model, prompts[i])
            assert vlmfix.effects(model) == told[i]
    assert told[0] != told[1]


def test_a_generate_of_someone_else_is_kept():
    model = build("llava")
    model.generate = someone = lambda **_: "theirs"
    vlmfix.wrap(model, "vhr")
    assert model.generate() == "theirs"
    assert vlmfix.unwrap(model).generate is someone


@torch.no_grad()  # not inside the generator: each would put back what it found, in the wrong order
def test_interleaved_generations_in_one_thread():
    """State belongs to the cache, so two hand-written loops may take turns."""
    model = build("llava")
    prompts = [picture_prompt(model, seed=s, lengths=[4 + s]) for s in range(2)]

    def loop(prompt):
        out = model(**prompt, use_cache=True)
        for _ in range(4):
            token = out.logits[:, -1:].argmax(-1)
            yield int(token)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    for method in INTERVENTIONS.values():
        with method(model):
            alone = [list(loop(p)) for p in prompts]
            turns = list(zip(loop(prompts[0]), loop(prompts[1]), strict=True))
            assert [list(t) for t in zip(*turns, strict=True)] == alone


def test_chunked_prefill():
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[6, 9])
    del prompt["attention_mask"]
    embeds = model.get_input_embeddings()(prompt["input_ids"]).detach()
    mask = prompt["input_ids"] == 60
    embeds[mask] = torch.randn(embeds[mask].shape, generator=torch.Generator().manual_seed(0))
    embeds[:, 6, 7] = 400.0
    with INTERVENTIONS["var"](model):
        whole = answer(
            model, {"inputs_embeds": embeds, "image_mask": mask}, output_logits=True, return_dict_in_generate=True
        )
        with torch.no_grad():
            for cut in (3, 12, 25):
                scope = model(inputs_embeds=embeds[:, :cut], image_mask=mask, use_cache=True)
                out = model(inputs_embeds=embeds[:, cut:], image_mask=mask, past_key_values=scope.past_key_values)
                torch.testing.assert_close(out.logits[:, -1], whole.logits[0], rtol=1e-4, atol=1e-4)
    plain = answer(model, {"inputs_embeds": embeds}, output_logits=True, return_dict_in_generate=True)
    assert not torch.allclose(whole.logits[0], plain.logits[0], atol=1e-2)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_continuing_from_a_cache(method):
    """A second turn on the cache of the first: rows after the last image of all turns, sets of heads kept."""
    model = build("llava")
    prompt = picture_prompt(model)
    foreign = answer(model, prompt, return_dict_in_generate=True).past_key_values
    with INTERVENTIONS[method](model):
        first = answer(model, prompt, return_dict_in_generate=True)
        copied = copy.deepcopy(first.past_key_values)
        turn = torch.cat([first.sequences, torch.tensor([[5, 8, 13]])], dim=1)
        second = model.generate(
            input_ids=turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False
        )
        assert second.shape[1] == turn.shape[1] + 4
        again = model.generate(input_ids=turn, past_key_values=copied, max_new_tokens=4, do_sample=False)
        assert torch.equal(again, second), "a copy of the cache goes on as the cache does"
        with pytest.raises(ValueError, match=r"cache holds .* computed without these interventions"):
            model.generate(input_ids=second, past_key_values=foreign, max_new_tokens=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_stay_distributions_and_only_admitted_rows_change(architecture):
    model = build(architecture)
    prompt = picture_prompt(model, 2, n_images=2, lengths=[3, 6])
    sums, outputs = [], {}

    @dataclass(frozen=True)
    class Checked(VAR):
        def weights(self, a, site):
            out = super().weights(a, site)
            sums.append((out.sum(-1) - a.sum(-1)).abs().max())
            return out

    layer = model.get_decoder().layers[2].self_attn.o_proj
    handle = layer.register_forward_pre_hook(lambda _, args: outputs.setdefault(len(outputs), args[0]))
    plain = logits(model, prompt)
    var = INTERVENTIONS["var"]
    settings = {f.name: getattr(var, f.name) for f in fields(var)}
    with Checked(**{**settings, "skip_first": 2, "skip_last": True})(model):
        edited = logits(model, prompt)
    handle.remove()
    assert max(sums) < 1e-6 and not torch.equal(plain, edited)
    image = prompt["input_ids"] == 60
    after = (image.cumsum(1) == image.sum(1, keepdim=True)) & ~image
    changed = (outputs[0] != outputs[1]).any(-1)
    assert changed.any() and (changed <= after).all(), "rows up to the last image token are bit-equal"


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_settings_are_frozen_and_round_trip(method):
    one = INTERVENTIONS[method]
    with pytest.raises(FrozenInstanceError):
        one.name = "other"
    assert from_json(json.loads(json.dumps(one.to_json()))) == one
    assert as_interventions(method) == (type(one)(),)
    assert all(f.name in type(one).__annotations__ for f in fields(one) if f.name != "rows")
    assert not {f.name for f in fields(one)} & set(vars(Intervention)) - {"rows"}, "a setting hides a stage"


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_copies_and_pickles_stay_wrapped_and_independent(method):
    model = plant_sinks(ARCHITECTURES["llava"]())
    prompt = picture_prompt(model)
    vlmfix.wrap(model, INTERVENTIONS[method])
    twins = [pickle.loads(pickle.dumps(model))]  # transformers' own hooks cannot be pickled after a first pass
    edited = logits(model, prompt)
    twins.append(copy.deepcopy(model))
    vlmfix.unwrap(model)
    plain = answer(model, prompt)
    for twin in twins:
        assert torch.equal(logits(twin, prompt), edited)
        with torch.no_grad():
            model.get_decoder().layers[1].self_attn.v_proj.weight.mul_(1)
        assert torch.equal(answer(vlmfix.unwrap(twin), prompt), plain)


def test_composition_is_applied_in_order_and_replaced_as_a_whole():
    model = build("llava")
    prompt = picture_prompt(model)
    both = [INTERVENTIONS["var"], INTERVENTIONS["vhr"]]
    results = {}
    for name, given in {"var": both[:1], "vhr": both[1:], "both": both}.items():
        vlmfix.wrap(model, given)
        assert [r["name"] for r in vlmfix.effects(model)] == [i.name for i in given]
        results[name] = logits(model, prompt)
    assert not torch.equal(results["both"], results["var"]) and not torch.equal(results["both"], results["vhr"])
    with both[0](model):
        assert torch.equal(logits(model, prompt), results["var"])
    assert torch.equal(logits(model, prompt), results["both"]), "what was in force before is in force again"


def test_a_failing_wrap_leaves_what_was_in_force():
    model = build("llava")
    vlmfix.wrap(model, "vhr")
    prompt = picture_prompt(model)
    edited = logits(model, prompt)
    with pytest.raises(ValueError, match="layers"):
        vlmfix.wrap(model, VHR(layers=(99,)))
    assert [r["name"] for r in vlmfix.effects(model)] == ["vhr"] and torch.equal(logits(model, prompt), edited)


def test_score_edits_respect_masks():
    """A score edit that shouts at every key: hidden keys stay hidden, so causality and padding hold."""
    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 8])

    @dataclass(frozen=True)
    class Shout(Intervention):
        rows = "all"

        def scores(self, s, site):
            return s + 5 * s.abs()

    late = {**prompt, "input_ids": prompt["input_ids"].clone()}
    late["input_ids"][:, -1] = 9
    late["input_ids"][0, 0] = 9  # padding
    with Shout()(model):
        a, b = logits(model, prompt), logits(model, late)
        assert not torch.equal(a, logits(vlmfix.unwrap(model), prompt))
    keep = prompt["attention_mask"].bool()
    keep[:, -1] = False
    assert torch.equal(a[keep], b[keep])


def test_saving_a_wrapped_model_saves_the_model(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = build("llava")
    prompt = picture_prompt(model)
    plain = logits(model, prompt)
    vlmfix.wrap(model, INTERVENTIONS["vhr"])
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and torch.equal(logits(again.eval(), prompt), plain)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_static_cache_and_assisted_generation(method):
    model = build("llava")
    prompt = picture_prompt(model)
    assistant = ARCHITECTURES["llava"](n_layers=2, seed=5)
    with INTERVENTIONS[method](model):
        said = answer(model, prompt)
        if method == "pyramiddrop":  # layers of different length
            with pytest.raises(ValueError, match="needs a cache that grows"):
                answer(model, prompt, cache_implementation="static", disable_compile=True)
        else:
            assert torch.equal(answer(model, prompt, cache_implementation="static", disable_compile=True), said)
        if method in GUIDES or INTERVENTIONS[method].traits.sequential:
            with pytest.raises(ValueError, match="assisted generation is not supported"):
                answer(model, prompt, prompt_lookup_num_tokens=3)
            return
        assert torch.equal(answer(model, prompt, prompt_lookup_num_tokens=3), said)
    del assistant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build("llava").to(dtype)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    prompt["pixel_values"] = prompt["pixel_values"].to(dtype)
    plain = chosen_by(model, prompt)
    for name, method in INTERVENTIONS.items():
        with method(model):
            edited = chosen_by(model, prompt)
            assert logits(model, prompt).dtype == dtype
        assert not edited.isnan().any() and torch.equal(edited, plain) == (name in READERS)


@pytest.mark.parametrize("method", INTERVENTIONS)
def test_weights_offloaded_by_accelerate(method):
    from accelerate import cpu_offload

    prompt = picture_prompt(build("llava"), 2, lengths=[3, 6])
    model = build("llava")
    with INTERVENTIONS[method](model):
        want = answer(model, prompt)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with INTERVENTIONS[method](model):
        assert torch.equal(answer(model, prompt), want)


def test_layers_on_another_device():
    """Masks follow the layer: here on meta, which holds no numbers but refuses to mix."""
    from vlmfix.engine.passes import Pass
    from vlmfix.engine.state import Generation
    from vlmfix.model.geometry import Geometry

    ones = torch.ones(1, 6, dtype=torch.bool)
    generation = Generation(Geometry(ones.clone(), ones, ones), [{}], frozenset({0}))
    for this_pass in (Pass(generation, 0, 6, 6), Pass(generation, 6, 1, 0)):
        site = this_pass.site(0, "last", 2, 4, this_pass.start + this_pass.n_rows, slice(None), torch.device("meta"))
        assert (
            site.rows.device.type == site.geometry.image.device.type == site.geometry.instruction.device.type == "meta"
        )
    site = Pass(generation, 0, 6, 6).prompt_site(0, 2, 4, torch.device("meta"))
    assert site.rows.device.type == site.geometry.valid.device.type == "meta"
