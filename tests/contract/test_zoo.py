"""The contract over every model type that transformers maps to image-text-to-text: architecture x method.

A few types run by default; `--all-models` (`make test-models`) runs all of them.
"""

import copy
import functools
import json
import threading
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

import vlmfix
from tests import zoo
from tests.contract.test_contract import INTERVENTIONS, READERS, STEPWISE, footprint
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.hooks import VAR, VHR, PyramidDrop
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.registry import from_json
from vlmfix.model.anatomy import anatomy

METHODS = INTERVENTIONS | {
    "pyramiddrop": PyramidDrop(layers=(2, 3), ratios=(0.5, 0.25)),
    "var": VAR(
        dims=(9,), tau=1.0, rho=0.001, min_visual_mass=1e-6, skip_first=0, skip_last=False, require_visual_sink=False
    ),
    "vhr": VHR(layers=(0, 1, 2, 3)),
}
"""Settings that bite on random models: here a third of all tokens are sinks."""


@pytest.fixture
def model(model_type):
    found = _model_of(model_type)
    yield found
    vlmfix.unwrap(found)


@functools.lru_cache(maxsize=1)
def _model_of(model_type, attn="sdpa"):
    model = zoo.tiny(model_type, attn)
    logits(model, zoo.prompt(model, ["ttIt"]))  # transformers itself adds hooks to a model on its first pass
    return model


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def answer(model, inputs, n=4, sampled=False, **settings):
    """Token ids (B, n) and the scores they were chosen from, (n, B, V)."""
    out = model.generate(
        **inputs, max_new_tokens=n, do_sample=sampled, suppress_tokens=list(range(140, zoo.VOCAB)), output_scores=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return out.sequences[:, -len(out.scores) :], torch.stack(out.scores)


def same(a, b, tolerance=2e-3):
    """Equal up to rounding."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_nothing_changes_nothing(model):
    inputs = zoo.prompt(model, ["tttIttt", "ttIttttt"])
    before, plain = footprint(model), logits(model, inputs)
    seen = []

    @dataclass(frozen=True)
    class Watch(Intervention):
        rows = "all"

        def weights(self, a, site):
            assert a.shape[2] == site.rows.shape[1] and a.shape[3] == site.geometry.n
            seen.append(site)
            return a.clone()

        def heads(self, o, site):
            return o * 1

    with Watch()(model):
        assert torch.equal(logits(model, inputs), plain), "looking at everything and changing nothing"
    assert footprint(model) == before
    image = inputs["input_ids"] == zoo.image_token(model)
    assert seen and all(torch.equal(site.geometry.image, image) for site in seen)


def test_recomputed_rows_are_the_models_own(model):
    """Weights that are changed by nothing but rounding give the model's own logits: scores, masks and gates are right."""
    inputs = zoo.prompt(model, ["tttIttt", "ttIttttt"])
    want = answer(model, inputs, 3)[1]

    @dataclass(frozen=True)
    class Again(Intervention):
        rows = "all"

        def weights(self, a, site):
            return a * (1 + 1e-6)

    with Again()(model):
        same(answer(model, inputs, 3)[1], want)


def test_the_lens_after_the_last_layer_is_the_model(model):
    """The head and norm that methods read inner layers with are the model's own."""
    parts, chosen = anatomy(model), []

    @dataclass(frozen=True)
    class Lens(Intervention):
        name = "lens"
        traits = Traits(lens=True)

        def hidden_layers(self, n_layers):
            return (-1, n_layers - 1)

        def logits(self, scores, step):
            assert step.hidden(-1).shape == step.hidden(len(parts.layers) - 1).shape
            chosen.append(step.lens(len(parts.layers) - 1)[..., :140])
            return scores

    if "head" in parts.lacks or "residual stream" in parts.lacks:
        with pytest.raises(TypeError, match="lens reads"), Lens()(model):
            pass
        return
    with Lens()(model):
        _, scores = answer(model, zoo.prompt(model, ["tttIttt", "ttIttttt"]), 2)
    own = scores[..., :140]
    masked = own < -1e30  # image tokens that a model never writes
    same(torch.stack(chosen).masked_fill(masked, 0), own.masked_fill(masked, 0))


def refused(model, one):
    """Whether a method is refused on a model with a sentence; every such pair is in `zoo.REFUSED`."""
    if model.config.model_type not in zoo.REFUSED.get(one.name, ()):
        return False
    with pytest.raises((TypeError, ValueError), match=f"(?i){one.name}|second stream"), one(model):
        answer(model, zoo.prompt(model, ["tttIttt"]), 1)
    return True


class Stopped(BaseException):
    """Like Ctrl-C."""


def interrupted(model, inputs):
    """An answer that breaks off in the last layer of its second pass, and so does the `with` block around it."""
    passes = []

    def stop(*_):
        passes.append(1)
        if len(passes) == 2:
            raise Stopped

    with wrapped(model, attached(model).requested, None):
        handle = anatomy(model).layers[-1].module.register_forward_hook(stop)
        try:
            answer(model, inputs)
        finally:
            handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_contract(model, method):
    one = METHODS[method]
    if refused(model, one):
        return
    layouts, quirks = ["tttIttt", "ttIttttttt", "Ittttttt"], zoo.QUIRKS.get(model.config.model_type, ())
    inputs = zoo.prompt(model, layouts)
    before, (said, plain) = footprint(model), answer(model, inputs)

    vlmfix.wrap(model, one)
    once, (edited_said, edited) = footprint(model), answer(model, inputs)
    assert torch.equal(edited[:3], plain[:3]) == (method in READERS), "it bites, at the third token at the latest"
    assert all(s["acted"] for s in vlmfix.effects(model)[0]["samples"])
    vlmfix.wrap(model, one)
    assert footprint(model) == once, "wrapping with the same changes nothing"
    assert torch.equal(answer(model, inputs)[1], edited), "two generations in a row are equal"
    whole = inputs if "cache" not in quirks else zoo.prompt(model, layouts[1:2], first=1)
    if method not in STEPWISE:
        same(answer(model, whole, use_cache=False)[1], answer(model, whole)[1])

    for b, layout in enumerate(layouts if "batch" not in quirks else []):
        alone_said, alone = answer(model, zoo.prompt(model, [layout], first=b))
        n = len(alone)  # where an answer ends before the others do, it is padded in the batch
        assert torch.equal(alone_said[0], edited_said[b, :n]), f"sample {b} alone and in a batch"
        same(alone[:, 0], edited[:n, b])

    if not (one.traits.sequential or one.traits.stepwise) and "beams" not in quirks:
        beams = [answer(model, whole, 3, num_beams=2, use_cache=cache)[0] for cache in (True, False)]
        assert torch.equal(*beams)

    with pytest.raises(Stopped):
        interrupted(model, inputs)
    assert torch.equal(answer(model, inputs)[1], edited), "nothing is left of a generation that broke off"

    vlmfix.unwrap(model)
    assert footprint(model) == before
    again = answer(model, inputs)
    assert torch.equal(again[0], said) and torch.equal(again[1], plain), "off without a trace"


def test_edited_rows_only(model):
    """What the rows setting admits is edited, and all other rows stay equal to the bit."""
    inputs = zoo.prompt(model, ["tttIttt", "ttIttttt"])
    parts = anatomy(model)
    number = parts.attention_layers[0]

    @dataclass(frozen=True)
    class Louder(Intervention):
        rows: str = "last"

        def at_layers(self, n_layers):
            return (number,)

        def weights(self, a, site):
            return 1.5 * a

    valid, image = inputs["attention_mask"].bool(), inputs["input_ids"] == zoo.image_token(model)
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    after = valid & (image.cumsum(1) == image.sum(1, keepdim=True)) & ~image
    admitted = {"last": last, "after_last_image": after, "text": valid & ~image, "all": valid}
    found = []
    handle = parts.layers[number].out_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        logits(model, inputs)
        for rows, expected in admitted.items():
            with Louder(rows=rows)(model):
                logits(model, inputs)
            assert torch.equal((found[-1] != found[0]).view(*valid.shape, -1).any(-1), expected), rows
    finally:
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_frozen_and_round_trip(method):
    one = METHODS[method]
    assert from_json(json.loads(json.dumps(one.to_json()))) == one
    with pytest.raises(FrozenInstanceError):
        one.name = "other"


def test_quirks_are_the_models_own(model):
    """What is not asked of a wrapped model, the untouched one does not keep either."""
    layouts, quirks = ["tttIttt", "ttIttttttt", "Ittttttt"], zoo.QUIRKS.get(model.config.model_type, ())
    inputs = zoo.prompt(model, layouts)
    if "cache" in quirks:
        with_cache, without = (answer(model, inputs, use_cache=cache)[1] for cache in (True, False))
        assert not torch.allclose(with_cache, without, rtol=2e-3, atol=2e-3)
    if "batch" in quirks:
        together = answer(model, inputs)[1]
        alone = [answer(model, zoo.prompt(model, [layout], first=b))[1] for b, layout in enumerate(layouts)]
        assert not torch.allclose(torch.cat(alone, dim=1), together, rtol=2e-3, atol=2e-3)
    if "beams" in quirks:
        with pytest.raises(ValueError, match="do not match"):
            answer(model, inputs, 3, num_beams=2)


@pytest.mark.parametrize("method", METHODS)
def test_two_threads(model, method):
    if refused(model, METHODS[method]):
        return
    prompts = [zoo.prompt(model, [layout], first=i) for i, layout in enumerate(("tttIttt", "tIttttttt"))]
    with METHODS[method](model):
        one_by_one, found = [answer(model, p, 6)[1] for p in prompts], [None, None]
        gate = threading.Barrier(2)

        def run(i):
            gate.wait()
            found[i] = answer(model, prompts[i], 6)[1]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(found, one_by_one, strict=True))


def test_what_weights_can_hold_they_hold(model):
    """Head gains folded into the output projections, to the bit; a type whose layers share one says so."""
    inputs = zoo.prompt(model, ["tttIttt"])
    layers = anatomy(model).attention_layers
    heads = "/".join(f"L{layer}H{head}" for layer in (layers[0], layers[-1]) for head in (0, 3))
    plain = logits(model, inputs)
    with wrapped(model, f"headgain:head_list={heads},gain=2"):
        expected = logits(model, inputs)
    assert not torch.equal(plain, expected)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(vlmfix.bake(vlmfix.wrap(twin, f"headgain:head_list={heads},gain=2")), inputs), expected)
