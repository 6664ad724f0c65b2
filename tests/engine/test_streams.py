"""Second streams go through the model beside the first one, token by token, and say what they say by themselves."""

import functools
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from tests.contract.test_contract import answer, build
from tests.contract.test_stages import Fade, Louder
from tests.models import ARCHITECTURES, picture_prompt
from vlmfix.engine.streams import join
from vlmfix.engine.wrap import wrapped
from vlmfix.hooks import PAI, VCD, VHR, Contrast, PyramidDrop
from vlmfix.method.intervention import Intervention

CONTRAST, NOISED = Contrast(gamma=1.8, beta=0.05), VCD(t=999, beta=0.05)
METHODS = {
    "shorter": [CONTRAST],
    "as long": [NOISED],
    "edited scores": [PAI(alpha=3.0, gamma=1.8, skip_first=1)],
    "edited heads": [VHR(layers=(1, 2, 3)), CONTRAST],
    "edited MLP outputs": [Louder(rows="all"), CONTRAST],
    "edited cache": [Fade(), CONTRAST],
    "two streams": [PAI(alpha=3.0, gamma=1.8, skip_first=1), NOISED],
}
TOKENS = 8


def said(model, prompt, methods, **settings):
    """What `generate` gives, and the passes through the decoder that it took."""
    passes = []
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    told = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    try:
        with wrapped(model, methods):
            return answer(model, prompt, **told, **settings), len(passes)
    finally:
        handle.remove()


def apart(monkeypatch, *given, **settings):
    """The same with each stream by itself."""
    with monkeypatch.context() as patch:
        patch.setattr("vlmfix.engine.forward.join", lambda *_: None)
        return said(*given, **settings)


def same(one, other):
    """The same tokens from the same scores, up to rounding."""
    assert torch.equal(one.sequences, other.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lengths", [[5], [6, 3, 9]], ids=["single", "padded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_per_token_gives_what_separate_passes_give(architecture, method, lengths, monkeypatch):
    model, methods = build(architecture), METHODS[method]
    prompt = picture_prompt(model, len(lengths), lengths=lengths)
    one, n = said(model, prompt, methods)
    other, n_apart = apart(monkeypatch, model, prompt, methods)
    same(one, other)
    more = 2 if method == "two streams" else 1
    own = 1 if method == "edited heads" else 0  # VHR's pass before the first
    assert n == TOKENS + more + own, "each stream reads its prompt, then all go together"
    assert n_apart == (1 + more) * TOKENS + own
    assert type(one.past_key_values) is DynamicCache and len(one.past_key_values.layers[0].keys) == len(lengths)


def test_sampled_sequences_of_one_prompt(monkeypatch):
    model = build("llava")
    prompt, found = picture_prompt(model, 2, lengths=[3, 6]), []
    for way in (said, lambda *a, **k: apart(monkeypatch, *a, **k)):
        torch.manual_seed(0)
        found.append(way(model, prompt, [CONTRAST], do_sample=True, num_return_sequences=3))
    (one, n), (other, _) = found
    same(one, other)
    assert n == TOKENS + 1 and len(one.sequences) == 6


def test_edits_see_the_first_stream_alone():
    seen = []

    @dataclass(frozen=True)
    class Watch(Intervention):
        def weights(self, a, site):
            seen.append((len(a), a.shape[-1], site.geometry.n))
            return a

        def heads(self, o, site):
            seen.append((len(o), site.geometry.n, site.geometry.n))
            return o

    model = build("llava")
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    _, n = said(model, prompt, [Watch(), CONTRAST])
    assert n == TOKENS + 1
    assert all(rows == 2 and keys == known for rows, keys, known in seen)


def _without_positions(model):
    model.register_forward_pre_hook(
        lambda module, args, given: (args, {**given, "position_ids": None}), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("change", "settings", "methods"),
    [
        (None, {"num_beams": 2}, [CONTRAST]),
        (None, {"output_hidden_states": True}, [CONTRAST]),
        (None, {"cache_implementation": "static", "disable_compile": True}, [CONTRAST]),
        (None, {}, [CONTRAST, PyramidDrop(layers=(2,), ratios=(0.5,))]),
        (lambda model: model.set_attn_implementation("eager"), {}, [CONTRAST]),
        (_without_positions, {}, [CONTRAST]),
    ],
    ids=["beams", "hidden states", "static cache", "tokens leave", "eager", "no positions"],
)
def test_what_is_not_known_to_be_safe_runs_apart(change, settings, methods, monkeypatch):
    model = build("llava")
    if change is not None:
        change(model)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    one, n = said(model, prompt, methods, **settings)
    other, n_apart = apart(monkeypatch, model, prompt, methods, **settings)
    assert n == n_apart == 2 * TOKENS and torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))


def test_layers_that_hand_on_other_keys_than_the_cache_s_run_apart(monkeypatch):
    """As latent attention does, which makes keys out of what the cache gives."""
    from transformers.models.llama import modeling_llama

    model = build("llava")
    original = modeling_llama.LlamaAttention.forward

    class Copying(DynamicCache):
        def update(self, *args, **kwargs):
            return tuple(x.clone() for x in super().update(*args, **kwargs))

    @functools.wraps(original)
    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            held, past_key_values = past_key_values, Copying()
            past_key_values.layers = held.layers
        return original(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    assert said(model, picture_prompt(model), [CONTRAST])[1] == 2 * TOKENS


class Ready:
    """A stream that would join."""

    def may_join(self, positions):
        return True

    def join(self, tokens):
        return torch.full_like(tokens, 3), None


class Rolling(DynamicCache):
    """A cache of another kind."""


def test_a_pass_is_joined_only_if_all_that_it_is_told_is_known():
    ids = torch.tensor([[5], [6]])
    told = {"input_ids": ids, "position_ids": torch.full_like(ids, 9), "past_key_values": DynamicCache()}
    told |= {"attention_mask": torch.ones(2, 10, dtype=torch.long), "output_attentions": False, "labels": None}
    joined = join(told, [Ready()])
    assert joined["input_ids"].tolist() == [[5], [6], [5], [6]]
    assert joined["position_ids"].tolist() == [[9], [9], [3], [3]] and len(joined["attention_mask"]) == 4
    for change in (
        {"past_key_values": Rolling()},
        {"past_key_values": None},
        {"position_ids": None},
        {"input_ids": None},
        {"attention_mask": torch.ones(2, 1, 1, 10)},
        {"output_attentions": True},
        {"cache_position": torch.tensor([9])},
    ):
        assert join({**told, **change}, [Ready()]) is None, change
    assert join(told, []) is None
