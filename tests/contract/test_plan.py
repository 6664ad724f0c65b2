"""Decoding by plan: the same answers as in the general way, in one graph of compiled code, on several families."""

from dataclasses import dataclass

import pytest
import torch
from transformers import CompileConfig

from tests import zoo
from tests.contract.test_zoo import METHODS as EVERY
from tests.contract.test_zoo import answer, logits, same
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.hooks import PAI, VAR, VHR, Contrast, ZeroTuning
from vlmfix.method.intervention import Intervention

PLANNED = [name for name, one in EVERY.items() if one.traits.by_plan]
FAMILIES = ("llava", "mistral3", "gemma3", "qwen3_vl", "kimi_k25", "qwen3_5")
"""Full attention, grouped, windowed, M-RoPE, latent, gated among linear layers."""
ALL_KINDS = [
    VAR(dims=(7,), tau=0.5, skip_first=0, rho=0.0, min_visual_mass=0.0),
    ZeroTuning(gamma=3.0),
    VHR(layers=(0, 1, 2, 3)),
]
"""Weights, scores and head outputs at once."""
STATIC = {"cache_implementation": "static"}


@pytest.fixture
def compiles_anew():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def compiled(fullgraph=True):
    config = CompileConfig(backend="eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    return config


def plan_of(model):
    return attached(model).last().plan


def generally(monkeypatch):
    """No passes go by plan any more."""
    monkeypatch.setattr("vlmfix.engine.running.can_plan", lambda edits: False)


def in_general(monkeypatch, model, interventions, inputs, n=6, **settings):
    """The answer of the general way."""
    with monkeypatch.context() as patch, wrapped(model, interventions):
        generally(patch)
        said = answer(model, inputs, n, **settings)
        assert plan_of(model) is None
    return said


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_answers_as_in_general(model_type, name, monkeypatch):
    model, one = zoo.tiny(model_type), EVERY[name]
    if name == "paint" and model_type != "llava":
        pytest.skip("paint takes towers with a class token")
    inputs = zoo.prompt(model, ["tttIttt", "ttItttIttt"])  # padding
    for settings in ({}, {"num_beams": 2}, STATIC | {"disable_compile": True}):
        want = in_general(monkeypatch, model, one, inputs, **settings)
        with wrapped(model, one):
            found = answer(model, inputs, 6, **settings)
            assert plan_of(model).begun
        assert torch.equal(found[0], want[0])
        same(found[1], want[1], 1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_in_one_graph(model_type, compiles_anew, request):
    """As `generate` compiles by itself on a GPU, and in one piece: no graph break of ours. All kinds of edits together,
    and with --all-models each method alone on one family."""
    model = zoo.tiny(model_type)
    inputs = zoo.prompt(model, ["tttIttt"])
    every = [EVERY[name] for name in PLANNED if name != "paint"]
    alone = request.config.getoption("--all-models") and model_type == "llava"
    for interventions in [ALL_KINDS, *([each] for each in every if alone)]:
        with wrapped(model, interventions):
            want = answer(model, inputs, 6, **STATIC, disable_compile=True)
            found = answer(model, inputs, 6, **STATIC, compile_config=compiled())
            assert torch.equal(found[0], want[0])
            same(found[1], want[1], 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("settings", [{}, STATIC], ids=["dynamic", "static"])
def test_windows_that_move(settings, compiles_anew, monkeypatch):
    """The window is shorter than the prompt, so its first key moves on with every token."""
    model = zoo.tiny("gemma3", changes={"text_config": {"sliding_window": 8}})
    inputs = zoo.prompt(model, ["tttttttIt"])
    assert inputs["input_ids"].shape[1] > 8
    want = in_general(monkeypatch, model, ALL_KINDS, inputs, 12, **settings, disable_compile=True)
    with wrapped(model, ALL_KINDS):
        found = answer(model, inputs, 12, **settings, disable_compile=True)
        assert plan_of(model).windows
        same(found[1], want[1], 1e-4)
        if settings:
            found = answer(model, inputs, 12, **settings, compile_config=compiled())
            same(found[1], want[1], 1e-4)
    with wrapped(model, []):
        plain = answer(model, inputs, 12, **settings, disable_compile=True)
    assert not torch.allclose(plain[1], want[1], atol=1e-3)


def by_hand(model, step, inputs, n=5):
    """Logits (n, V) of a loop written by hand."""
    out = step(**inputs, use_cache=True)
    cache, rows = out.past_key_values, [out.logits[0, -1]]
    for _ in range(n - 1):
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        out = step(input_ids=rows[-1].argmax().view(1, 1), attention_mask=mask, past_key_values=cache)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("target", ["model", "forward"])
@pytest.mark.parametrize("first", ["wrap", "compile"])
def test_compiled_before_or_after_by_whatever_name(first, target, compiles_anew):
    """The prompt is read uncompiled, its answer in one graph; with the methods off the plain model is back."""
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, ["tttIttt"])
    plain = by_hand(model, model, inputs)
    with wrapped(model, ALL_KINDS):
        want = by_hand(model, model, inputs)
    assert not torch.allclose(plain, want, atol=1e-3)

    def step():
        return torch.compile(model if target == "model" else model.forward, backend="eager", fullgraph=True)

    if first == "compile" and target == "forward":
        pytest.skip("a bound method that was compiled beforehand does not know what comes around it")
    before = step() if first == "compile" else None
    with wrapped(model, ALL_KINDS):
        run = step() if before is None else before
        same(by_hand(model, run, inputs), want, 1e-4)
        assert not torch._dynamo.utils.counters["graph_break"]
    if first == "compile":
        same(by_hand(model, before, inputs), plain, 1e-4)
    same(by_hand(model, model, inputs), plain, 1e-6)


def test_two_answers_in_turns(compiles_anew):
    """Two caches, whose masks differ, go on in turns through one compiled model."""
    model = zoo.tiny("llava")
    prompts = [zoo.prompt(model, [layout]) for layout in ("tttIttt", "tIttttt")]
    with wrapped(model, ALL_KINDS):
        want = [by_hand(model, model, each) for each in prompts]
        step, caches, rows = torch.compile(model, backend="eager"), [], []
        for each in prompts:
            out = step(**each, use_cache=True)
            caches.append(out.past_key_values)
            rows.append([out.logits[0, -1]])
        for _ in range(4):
            for cache, row in zip(caches, rows, strict=True):
                mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
                out = step(input_ids=row[-1].argmax().view(1, 1), attention_mask=mask, past_key_values=cache)
                row.append(out.logits[0, -1])
    for row, each in zip(rows, want, strict=True):
        same(torch.stack(row), each, 1e-4)


def test_a_sample_without_image_keeps_the_general_way():
    """To the bit, what the kernel gives."""
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, ["tttIttt", "ttttttt"])
    plain = answer(model, inputs)[1]
    with wrapped(model, PAI(alpha=2.0, skip_first=0)):
        edited = answer(model, inputs)[1]
        assert attached(model).last().laid and plan_of(model) is None
    assert torch.equal(edited[0, 1], plain[0, 1]) and not torch.equal(edited[:, 0], plain[:, 0])


def test_gradients_keep_the_general_way():
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, ["tttIttt"])
    with wrapped(model, ALL_KINDS):
        with torch.no_grad():
            want = by_hand(model, model, inputs)
        with torch.enable_grad():
            found = by_hand(model, model, inputs)
            assert plan_of(model) is None and found.requires_grad
        same(found, want, 1e-4)


def test_streams_go_along(monkeypatch):
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, ["tttIttt", "ttIttttt"])
    both = [PAI(alpha=1.0, skip_first=0), Contrast(gamma=1.5)]
    want = in_general(monkeypatch, model, both, inputs)
    with wrapped(model, both):
        found = answer(model, inputs, 6)
        assert plan_of(model).begun and attached(model).last().streams
    same(found[1], want[1], 1e-4)


def test_what_was_done_is_counted_alike(monkeypatch):
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, ["tttIttt"])
    reports = []
    for by_plan in (True, False):
        with monkeypatch.context() as patch, wrapped(model, ALL_KINDS):
            if not by_plan:
                generally(patch)
            answer(model, inputs, 6)
            reports.append([each["samples"] for each in attached(model).effects()])
    torch.testing.assert_close(_numbers(reports[0]), _numbers(reports[1]), rtol=1e-5, atol=1e-6)


def _numbers(found):
    if isinstance(found, dict):
        return [number for key in sorted(found, key=str) for number in _numbers(found[key])]
    if isinstance(found, list):
        return [number for each in found for number in _numbers(each)]
    return [float(found)] if isinstance(found, (bool, int, float)) else []


@dataclass(frozen=True)
class Unplanned(Intervention):
    """Edits attention and does not say that it acts by plan."""

    name = "unplanned"

    def weights(self, a, site):
        site.memo["acted"] = site.has_image
        return a.sqrt()


def test_what_does_not_act_by_plan_still_acts_and_says_why_it_does_not_compile(compiles_anew, monkeypatch):
    model = zoo.tiny("llava")
    inputs = zoo.prompt(model, ["tttIttt"])
    with wrapped(model, Unplanned()):
        want = answer(model, inputs, **STATIC, disable_compile=True)
        found = answer(model, inputs, **STATIC, compile_config=compiled(fullgraph=False))
        assert plan_of(model) is None
        same(found[1], want[1], 1e-4)
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="does not act by plan"):
            answer(model, inputs, **STATIC, compile_config=compiled())
    assert not torch.equal(logits(model, inputs), want[1][0])


POINTWISE = [name for name, one in EVERY.items() if one.overrides("score_mod")]


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("model_type", ["llava", "gemma3", "mistral3"])
def test_pointwise_edits_inside_flex_attention(model_type, name, monkeypatch):
    """Prompt and answer, full and grouped heads, windows: as with sdpa, and no row of scores is done again."""
    if name == "paint" and model_type != "llava":
        pytest.skip("paint takes towers with a class token")
    model = zoo.tiny(model_type)
    inputs = zoo.prompt(model, ["tttIttt", "ttItttIttt"])
    with wrapped(model, EVERY[name]):
        want = answer(model, inputs, 4)
    plain = answer(model, inputs, 4)
    model.set_attn_implementation({"text_config": "flex_attention"})
    with torch.compiler.set_stance("force_eager"):  # no compiled flex on every CPU
        with wrapped(model, EVERY[name]), monkeypatch.context() as patch:
            patch.setattr("vlmfix.engine.attention.Scores", None)
            found = answer(model, inputs, 4)
            assert all(sample["acted"] for sample in attached(model).effects()[0]["samples"])
        same(answer(model, inputs, 4)[1], plain[1], 1e-3)
    same(found[1], want[1], 1e-3)
    assert not torch.allclose(found[1], plain[1], atol=1e-2)
