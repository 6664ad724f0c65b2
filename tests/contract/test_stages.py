"""Stages that no method of the registry fills yet: MLP outputs, the cache, hidden states of inner layers, readings."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import vlmfix
from tests import zoo
from tests.contract.test_contract import footprint
from tests.contract.test_zoo import answer, logits, same
from vlmfix.engine import attachment
from vlmfix.engine.hooks import CacheHook
from vlmfix.engine.wrap import wrapped
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.model.anatomy import anatomy

TYPES = ("llava", "qwen2_5_vl", "gemma3", "kimi_k25", "qwen3_5", "llama4", "blip-2")
"""Plain, M-RoPE, windows, latent attention, a hybrid, experts and OPT with samples in one row."""
LAYOUTS = ["tttIttt", "ttIttttttt"]


@dataclass(frozen=True)
class Louder(Intervention):
    """MLP outputs half as large again, in the rows that `rows` admits."""

    name = "louder"
    rows: str = "last"
    layers: tuple[int, ...] = (1, 3)

    def at_layers(self, n_layers):
        return self.layers

    def mlp(self, x, site):
        assert x.shape[:2] == site.rows.shape
        return torch.where(site.rows[..., None], 1.5 * x, x)


@dataclass(frozen=True)
class Fade(Intervention):
    """Values of image keys at half their size, once they are in the cache."""

    name = "fade"

    def cache(self, keys, values, site):
        assert keys.shape[-2] == values.shape[-2] == site.geometry.n and len(keys) == len(site.geometry.image)
        if not site.n_prompt:
            return keys, values
        return keys, torch.where(site.geometry.image[:, None, :, None], 0.5 * values, values)

    def effects(self, memo):
        return []


TOYS = {"mlp": Louder(), "cache": Fade()}


@pytest.fixture(scope="module", params=TYPES)
def model(request):
    model = zoo.tiny(request.param)
    logits(model, zoo.prompt(model, ["ttIt"]))  # transformers itself adds hooks to a model on its first pass
    yield model
    vlmfix.unwrap(model)


def quirks(model):
    return zoo.QUIRKS.get(model.config.model_type, ())


@pytest.mark.parametrize("stage", TOYS)
def test_bites_comes_off_and_leaves_other_samples_alone(model, stage):
    inputs = zoo.prompt(model, LAYOUTS)
    before, (_, plain) = footprint(model), answer(model, inputs)
    vlmfix.wrap(model, TOYS[stage])
    said, edited = answer(model, inputs)
    assert not torch.equal(edited, plain), "it bites"
    assert torch.equal(answer(model, inputs)[1], edited), "two generations in a row are equal"
    for b, layout in enumerate(LAYOUTS):
        alone_said, alone = answer(model, zoo.prompt(model, [layout], first=b))
        assert torch.equal(alone_said[0], said[b])
        same(alone[:, 0], edited[:, b])
    if "beams" not in quirks(model):
        together = answer(model, inputs, 3, num_beams=2)[0]
        for b, layout in enumerate(LAYOUTS):
            assert torch.equal(answer(model, zoo.prompt(model, [layout], first=b), 3, num_beams=2)[0][0], together[b])
    vlmfix.unwrap(model)
    assert footprint(model) == before and torch.equal(answer(model, inputs)[1], plain), "off without a trace"


def test_mlp_with_a_cache_equals_without(model):
    inputs = zoo.prompt(model, LAYOUTS[:1])
    with Louder()(model):
        same(answer(model, inputs, use_cache=False)[1], answer(model, inputs)[1])


def test_mlp_edits_admitted_rows_only(model):
    """All other rows of the module's output are equal to the bit."""
    inputs, outputs = zoo.prompt(model, LAYOUTS), []
    valid, image = inputs["attention_mask"].bool(), inputs["input_ids"] == zoo.image_token(model)
    last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    number = 1
    for rows, admitted in {"last": last, "text": valid & ~image, "all": valid}.items():
        outputs.clear()
        for methods in ([], [Louder(rows=rows, layers=(number,))]):
            with wrapped(model, methods):
                module = anatomy(model).layers[number].mlp
                handle = module.register_forward_hook(
                    lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
                )
                logits(model, inputs)
                handle.remove()
        changed = (outputs[0] != outputs[1]).any(-1).view(admitted.shape)
        assert torch.equal(changed, admitted), rows


def values_of(output):
    """What the layers have in the cache that a pass leaves; BLIP-2's is inside."""
    cache = getattr(output, "language_model_outputs", output).past_key_values
    return [layer.values for layer in cache.layers if isinstance(layer, DynamicLayer)]


@torch.no_grad()
def test_cache_edits_come_after_the_attention_and_stay(model):
    inputs = zoo.prompt(model, LAYOUTS)
    plain = model(**inputs, use_cache=True)
    with Fade()(model):
        edited = model(**inputs, use_cache=True)
    assert torch.equal(plain.logits, edited.logits), "the pass itself is untouched"
    image = inputs["input_ids"] == zoo.image_token(model)
    pairs = list(zip(values_of(plain), values_of(edited), strict=True))
    assert pairs
    for before, after in pairs:
        shown = image[:, None, -before.shape[-2] :, None].expand_as(before)
        assert torch.equal(after[~shown], before[~shown]), "other keys are equal to the bit"
        # the first layer's are half of the untouched ones; later layers' too, as no pass has seen the edit yet
        assert torch.equal(after[shown], 0.5 * before[shown])


def test_a_cache_by_hand_is_the_reference():
    """The edit in `generate` is what one gets by halving values in the cache after the prefill."""
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, LAYOUTS[:1])
    with Fade()(model):
        said, scores = answer(model, inputs, 3)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        image = inputs["input_ids"] == zoo.image_token(model)
        for layer in out.past_key_values.layers:
            layer.values = torch.where(image[:, None, :, None], 0.5 * layer.values, layer.values)
        for n in range(1, 3):
            out = model(input_ids=said[:, n - 1 : n], past_key_values=out.past_key_values)
            same(out.logits[:, -1, :140], scores[n][:, :140])


class Rolling(DynamicLayer):
    """A kind of cache that nobody here knows."""


@torch.no_grad()
def test_caches_that_are_not_known_are_refused():
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, LAYOUTS[:1])
    unknown = DynamicCache()
    unknown.layers = [Rolling() for _ in range(4)]
    with Fade()(model):
        with pytest.raises(
            ValueError, match=r"fade edits the cache, and this pass has none; leave out use_cache=False"
        ):
            answer(model, inputs, use_cache=False)
        with pytest.raises(ValueError, match=r"fade edits keys and values, and cannot in a cache of StaticLayer"):
            answer(model, inputs, cache_implementation="static", disable_compile=True)
        with pytest.raises(ValueError, match=r"a cache of Rolling; leave out cache_implementation"):
            model(**inputs, past_key_values=unknown)
        with pytest.raises(ValueError, match=r"fade needs every token in its turn; assisted"):
            answer(model, inputs, prompt_lookup_num_tokens=2)


def test_an_offloaded_cache_is_refused():
    """It can be filled on a GPU only."""
    model = zoo.tiny("llava")
    cache = model(**zoo.prompt(model, LAYOUTS[:1])).past_key_values
    hook = CacheHook(None, anatomy(model), 0, [(0, Fade())])
    assert hook.kept([None, cache]) is cache.layers[0]
    cache.offloading = True
    with pytest.raises(ValueError, match=r"fade edits keys and values, and cannot in an offloaded cache"):
        hook.kept([None, cache])


def test_shapes_that_change_are_refused():
    @dataclass(frozen=True)
    class Cut(Intervention):
        def cache(self, keys, values, site):
            return keys[:, :, 1:], values[:, :, 1:]

    model = zoo.tiny("llava")
    with Cut()(model), pytest.raises(ValueError, match=r"cache: expected keys and values of shapes"):
        logits(model, zoo.prompt(model, LAYOUTS[:1]))


def test_a_model_without_the_part_is_refused(monkeypatch):
    model = zoo.tiny("llava")
    found = anatomy(model)
    bare = replace(found, layers=tuple(replace(layer, mlp=None) for layer in found.layers), n_streams=4)
    monkeypatch.setattr(attachment, "anatomy", lambda _: bare)
    with pytest.raises(TypeError, match="louder edits MLP outputs, but in the layers of llama no module can be told"):
        vlmfix.wrap(model, Louder())
    with pytest.raises(TypeError, match="peek reads hidden states, but llama has 4 residual streams a token"):
        vlmfix.wrap(model, Peek())
    with pytest.raises(TypeError, match="ReadFirst reads MLP outputs, but in the layers"):
        vlmfix.wrap(model, ReadFirst(readings=("mlp",)))


@pytest.mark.parametrize("layers", [(1, 4), (-1,)], ids=["too high", "negative"])
def test_layers_that_are_not_there_are_refused(layers):
    """They would act nowhere, without a word; a setting `layers` is refused by its name."""

    @dataclass(frozen=True)
    class Elsewhere(Louder):
        def at_layers(self, n_layers):
            return layers

    model = zoo.tiny("llava")
    with pytest.raises(ValueError, match=r"louder acts in layers .* expected numbers in 0..3 on this model"):
        vlmfix.wrap(model, Elsewhere())


# ---- what can be read -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peek(Intervention):
    """Notes hidden states at every token."""

    name = "peek"
    layers: tuple[int, ...] = (0, 2)
    noted: ClassVar[list] = []

    def hidden_layers(self, n_layers):
        return self.layers

    def logits(self, scores, step):
        self.noted.append({layer: step.hidden(layer).clone() for layer in self.layers})
        with pytest.raises(ValueError, match=r"step.hidden\(1\): expected one of hidden_layers, \[0, 2\]"):
            step.hidden(1)
        return scores


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_hidden_states_of_the_row_that_predicts(model, settings):
    if settings and "beams" in quirks(model):
        pytest.skip("its own beam search fails")
    inputs = zoo.prompt(model, LAYOUTS)
    Peek.noted.clear()
    with Peek()(model):
        seen = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True,
            suppress_tokens=list(range(140, zoo.VOCAB)), **settings,
        ).hidden_states  # fmt: skip
    assert len(Peek.noted) == 3
    for noted, states in zip(Peek.noted, seen, strict=True):
        for layer, hidden in noted.items():
            assert torch.equal(hidden, states[layer + 1][:, -1])


def test_hidden_states_beside_second_streams():
    """The first stream's own."""
    from vlmfix.hooks import Contrast

    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, LAYOUTS)
    Peek.noted.clear()
    with wrapped(model, [Peek(), Contrast(gamma=1.0 + 1e-9, beta=1e-9)]):
        answer(model, inputs, 3)
    with_stream = list(Peek.noted)
    Peek.noted.clear()
    with Peek()(model):
        answer(model, inputs, 3)
    for ours, alone in zip(with_stream, Peek.noted, strict=True):
        assert all(ours[layer].shape == alone[layer].shape for layer in alone)
        assert all(torch.allclose(ours[layer], alone[layer], rtol=1e-3, atol=1e-4) for layer in alone)


@dataclass(frozen=True)
class ReadFirst(Intervention):
    """Reads layers before the first pass."""

    readings: tuple[str, ...] = ("heads", "mlp", "hidden")
    told: ClassVar[dict] = {}

    @property
    def traits(self):
        return Traits(captures=self.readings)

    def at_layers(self, n_layers):
        return range(1, n_layers)

    def begin(self, prompt, memo):
        for reading in ("heads", "mlp", "hidden"):
            for image in (True, False):
                self.told[reading, image] = prompt.capture(reading, self.at_layers(4), image=image)

    def logits(self, scores, step):
        return scores


@torch.no_grad()
def test_readings_are_the_untouched_model_s_own(model):
    inputs, parts = zoo.prompt(model, LAYOUTS), anatomy(model)
    with ReadFirst()(model):
        answer(model, inputs, 1)
    told = ReadFirst.told
    states = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    ).hidden_states[0]
    for layer in range(1, 3):
        same(told["hidden", True][layer], states[layer + 1][:, -1], 1e-4)
    for layer in range(1, 4):
        attends = parts.layers[layer].attention is not None
        assert (layer in told["heads", True]) == (layer in told["heads", False]) == attends
        for reading, shape in {"hidden": (2, zoo.WIDTH), "mlp": (2, zoo.WIDTH)}.items():
            assert told[reading, True][layer].shape == told[reading, False][layer].shape == shape
            assert not torch.equal(told[reading, True][layer], told[reading, False][layer])
        if attends:
            n_heads, size = parts.layers[layer].n_heads, parts.layers[layer].head_dim
            assert told["heads", True][layer].shape == (2, n_heads, size)


def test_readings_that_were_not_named_are_refused():
    model = zoo.tiny("llava")
    with ReadFirst(readings=("heads",))(model), pytest.raises(ValueError, match="nothing reads mlp in layers"):
        answer(model, zoo.prompt(model, LAYOUTS[:1]), 1)


def test_no_hook_where_nobody_acts():
    model = zoo.tiny("llava")
    logits(model, zoo.prompt(model, ["ttIt"]))

    def hooks():
        return {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks)
            for name, module in model.get_decoder().named_modules()
        }

    before = hooks()
    expected = {
        Louder(layers=(2,)): {"layers.2.mlp": 1},
        Peek(layers=(1,)): {"layers.1": 1},
        ReadFirst(readings=("hidden",)): {"layers.1": 1, "layers.2": 1, "layers.3": 1},
        ReadFirst(readings=()): {},
    }
    for one, new in expected.items():
        with one(model):
            added = {name: n - before[name] for name, n in hooks().items() if n > before[name]}
        assert added == new, one
