"""Second streams: image-free contrast, M3ID, VCD and PAI's guidance, against brute force and transformers' own."""

import math
from dataclasses import dataclass

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from tests.contract.test_contract import answer, build, logits
from tests.models import ARCHITECTURES, IMAGE, picture_prompt
from vlmfix.hooks import PAI, VCD, Contrast
from vlmfix.hooks.contrast import contrasted
from vlmfix.hooks.vcd import kept, noise_like
from vlmfix.method.intervention import Intervention

NO_CUT = 1e-30


def scores(model, prompt, one=None, **settings):
    """Scores (n, V) and tokens of one sample."""
    settings = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, **settings}
    if one is None:
        return answer(model, prompt, **settings)
    with one(model):
        return answer(model, prompt, **settings)


def without_image(prompt):
    keep = prompt["input_ids"][0] != IMAGE
    ids = prompt["input_ids"][:, keep]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def full_pass(model, prompt, answered):
    """Logits (V) after the prompt and some answer, in one plain pass without a cache."""
    ids = torch.cat([prompt["input_ids"], answered], dim=1)
    more = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "mm_token_type_ids" in prompt:
        more["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, answered.shape[1]))
    return logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})[0, -1]


def test_the_rule_by_hand():
    """Two tokens survive beta = 0.3; among them the odds are those of p (p/q)^w."""
    p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]), torch.tensor([[0.25, 0.6, 0.1, 0.05]])
    out = contrasted(p.log() + 7, q.log() - 3, weight=2.0, beta=0.3).exp()
    odds = (0.5 * 2**2) / (0.3 * 0.5**2)
    torch.testing.assert_close(out, torch.tensor([[odds / (1 + odds), 1 / (1 + odds), 0.0, 0.0]]))
    kept_one = contrasted(torch.randn(50, 20), torch.randn(50, 20) * 9, weight=5.0, beta=1.0)
    assert (kept_one.isfinite().sum(-1) == 1).all(), "the likeliest token is never ruled out"
    banned = contrasted(torch.tensor([[1.0, -math.inf, 0.5]]), torch.zeros(1, 3), weight=1.0, beta=NO_CUT)
    assert banned[0, 1] == -math.inf and banned[0, [0, 2]].isfinite().all(), "what transformers forbids stays forbidden"


def test_contrast_equals_the_guidance_of_transformers():
    """LLaVA, one sample, greedy: the same maths, there without the plausibility rule."""
    model = build("llava")
    prompt = picture_prompt(model)
    theirs = scores(
        model, prompt, guidance_scale=1.7, negative_prompt_ids=without_image(prompt)["input_ids"],
        negative_prompt_attention_mask=without_image(prompt)["attention_mask"],
    )  # fmt: skip
    ours = scores(model, prompt, Contrast(gamma=1.7, beta=NO_CUT))
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(a, b.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["pai", "m3id", "ritual"])
def test_cached_stream_equals_brute_force(architecture, variant):
    model = build(architecture)
    prompt = picture_prompt(model, seed=3)
    one = Contrast(gamma=1.8, lam=0.3, variant=variant, beta=0.05)
    out = scores(model, prompt, one, max_new_tokens=5)
    said = out.sequences[:, prompt["input_ids"].shape[1] :]
    for t, found in enumerate(out.scores):
        w = 0.8 if variant == "pai" else math.exp(0.3 * (t + (variant == "m3id"))) - 1
        other = full_pass(model, without_image(prompt), said[:, :t])
        want = contrasted(full_pass(model, prompt, said[:, :t])[None], other[None], w, 0.05)
        allowed = torch.ones(64, dtype=torch.bool)
        allowed[58:62] = False  # `answer` forbids these before the rule
        if allowed[want[0].argmax()]:
            both = allowed & want[0].isfinite() & found[0].isfinite()
            gap = (found[0] - want[0])[both]
            assert both.any() and (gap - gap.mean()).abs().max() < 1e-3


@pytest.mark.parametrize("one", [Contrast(gamma=1.8, beta=0.05), VCD(t=999, beta=0.05), PAI(gamma=1.8, skip_first=1)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beams_follow_their_parents(one, architecture):
    """What beam search says of its best sequence is what a single forced pass over that sequence says."""
    model = build(architecture)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    with one(model):
        out = answer(
            model, prompt, num_beams=4, num_return_sequences=4, max_new_tokens=6, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        told = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        width = prompt["input_ids"].shape[1]
        crossed = 0
        for row in range(8):
            said = out.sequences[row, width:]
            crossed += len(set(out.beam_indices[row].tolist())) > 1
            sample = {k: v[row // 4 :: 2] if len(v) == 2 else v.chunk(2)[row // 4] for k, v in prompt.items()}
            again = _forced(model, sample, said)
            torch.testing.assert_close(told[row], again, rtol=1e-3, atol=2e-3)
    assert crossed, "some beam changed its row, or the test shows nothing"


def test_beams_of_two_pictures_with_one_text_stay_apart():
    """The samples' sequences are equal, so only their place tells them apart."""
    model, one = build("llava"), VCD(t=999, beta=0.05)
    prompt = picture_prompt(model, 2)
    prompt["input_ids"][1] = prompt["input_ids"][0]
    with one(model):
        beams = {"num_beams": 4, "max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
        both = answer(model, prompt, **beams)
        for row in range(2):
            alone = answer(model, {k: v[row : row + 1] for k, v in prompt.items()}, **beams)
            assert torch.equal(alone.sequences[0], both.sequences[row])
            torch.testing.assert_close(alone.sequences_scores[0], both.sequences_scores[row], rtol=1e-4, atol=1e-4)
    assert not torch.equal(both.sequences[0], both.sequences[1])


def _forced(model, sample, said):
    """Log-probabilities of given tokens under the edited model, chosen one by one."""
    from transformers import LogitsProcessor

    found = []

    class Force(LogitsProcessor):
        def __call__(self, ids, scores):
            t = len(found)
            found.append(scores.log_softmax(-1)[0, said[t]])
            out = torch.full_like(scores, -math.inf)
            out[:, said[t]] = 0.0
            return out

    import vlmfix.engine.attachment

    wrapper = vlmfix.engine.attachment.attached(model).wrapper
    plain = wrapper.original

    def generate(*args, logits_processor=(), **kwargs):  # after the stage, which sees the plain scores
        return plain(*args, logits_processor=[*logits_processor, Force()], **kwargs)

    wrapper.original = generate
    try:
        answer(model, sample, max_new_tokens=len(said))
    finally:
        wrapper.original = plain
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_stream_equal_to_the_first_changes_nothing(architecture):
    model = build(architecture)
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain = scores(model, prompt)

    @dataclass(frozen=True)
    class Same(Intervention):
        name = "same"

        def begin(self, prompt, memo):
            memo["stream"] = prompt.stream_with()

        def logits(self, scores, step):
            return contrasted(scores, step.memo["stream"].logits, 3.0, NO_CUT)

    out = scores(model, prompt, Same())
    assert torch.equal(out.sequences, plain.sequences)
    for a, b, raw, mine in zip(plain.scores, out.scores, plain.logits, out.logits, strict=True):
        allowed = a.isfinite()
        gap = (a - b)[allowed].view(2, -1)
        assert (gap - gap.mean(1, keepdim=True)).abs().max() < 1e-3
        torch.testing.assert_close(raw, mine)  # the first stream does not feel the second


def test_released_pai_leaves_the_attention_of_the_prefill_alone():
    model = build("llava")
    prompt = picture_prompt(model)
    guided, released, paper = (
        scores(model, prompt, one).scores
        for one in (
            Contrast(gamma=1.5),
            PAI(alpha=2.0, skip_first=1, gamma=1.5, variant="release"),
            PAI(alpha=2.0, skip_first=1, gamma=1.5),
        )
    )
    assert torch.equal(released[0], guided[0]) and not torch.equal(released[1], guided[1])
    assert not torch.equal(paper[0], guided[0])
    alone = PAI(alpha=2.0, skip_first=1)
    both = [scores(model, prompt, PAI(alpha=2.0, skip_first=1, variant=v)).scores for v in ("paper", "release")]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)) and not alone.acts_at("logits")
    assert torch.equal(
        scores(model, prompt, PAI(alpha=2.0, skip_first=1, gamma=1.0)).sequences, scores(model, prompt, alone).sequences
    )


def test_m3id_weights():
    weights = []

    class Stream:
        logits = torch.zeros(1, 4)

    from unittest import mock

    from vlmfix.method.site import Step

    memo = {"blind": Stream(), "seen": torch.ones(1, dtype=torch.bool)}
    for variant in ("m3id", "ritual"):
        rule = lambda s, o, w, b, as_logits: weights.append(w) or s  # noqa: E731
        with mock.patch("vlmfix.hooks.contrast.contrasted", side_effect=rule):
            for step in (0, 49, 5000):
                Contrast(variant=variant).logits(torch.zeros(1, 4), Step(step, memo))
    assert (
        weights[:2] == pytest.approx([0.0202, 1.718], rel=1e-3)
        and weights[3] == 0.0
        and weights[2] == weights[5] == math.exp(20) - 1
    )


def test_noise():
    assert kept(500) ** 0.5 == pytest.approx(0.8630, abs=5e-5) and kept(999) ** 0.5 == pytest.approx(0.2850, abs=5e-5)
    assert (1 - kept(500)) ** 0.5 == pytest.approx(0.5052, abs=5e-5)
    three = noise_like(torch.zeros(3, 3, 16, 16), {}, 55, 1)
    assert three.shape == (1, 3, 16, 16) and torch.equal(three, noise_like(torch.zeros(1, 3, 16, 16), {}, 55, 1))
    assert not torch.equal(three, noise_like(torch.zeros(1, 3, 16, 16), {}, 56, 1))
    torch.manual_seed(1)
    assert torch.equal(three, noise_like(torch.zeros(1, 3, 16, 16), {}, 55, 1)), "not the seed of sampling"
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    flat = noise_like(torch.zeros(28, 96), {"image_grid_thw": grid}, 55, 2)
    assert flat.shape == (28, 96)
    copies = flat.view(28, 3, 2, 16)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1]), "both copies of a still image"
    alone = noise_like(torch.zeros(24, 96), {"image_grid_thw": grid[:1]}, 55, 2)
    assert torch.equal(flat[:24], alone) and abs(float(flat.std()) - 1) < 0.1
    with pytest.raises(TypeError, match="cannot tell images apart"):
        noise_like(torch.zeros(24, 96), {}, 55, 2)


@pytest.mark.parametrize("one", [Contrast(gamma=2.0), VCD()])
def test_prompts_without_an_image_are_left_alone(one):
    model = build("llava")
    ids = torch.tensor([[1, 5, 9, 13]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = scores(model, prompt)
    with pytest.warns(UserWarning, match="did nothing in a whole generation"):
        out = scores(model, prompt, one)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, out.scores, strict=True))


def test_a_second_turn_goes_on_in_both_streams():
    model = build("llava")
    prompt, one = picture_prompt(model), Contrast(gamma=1.8, beta=0.05)
    with one(model):
        first = answer(model, prompt, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, torch.tensor([[5, 8, 13]])], dim=1)
        second = model.generate(
            input_ids=turn, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    main, said = (
        full_pass(model, prompt, turn[:, prompt["input_ids"].shape[1] :]),
        turn[:, prompt["input_ids"].shape[1] :],
    )
    want = contrasted(main[None], full_pass(model, without_image(prompt), said)[None], 0.8, 0.05)
    torch.testing.assert_close(second.scores[0], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Contrast(gamma=0), "gamma: expected a number above 0, got 0"),
        (lambda: Contrast(beta=-0.1), r"beta: expected a number in 0..1"),
        (lambda: Contrast(weight="x"), "weight: expected constant or growing"),
        (lambda: Contrast(variant="x"), "variant: expected pai, m3id, ritual or gated"),
        (lambda: VCD(t=1000), r"t: expected a whole number in 0\.\.999"),
        (lambda: VCD(alpha=-1), "alpha: expected 0 or more"),
        (lambda: VCD(beta=1.5), "beta: expected"),
        (lambda: PAI(gamma=0), "gamma: expected a number above 0, got 0"),
        (lambda: PAI(variant="x"), "variant: expected paper or release"),
    ],
)  # fmt: skip
def test_mistakes(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


PENALISED = {
    "repetition_penalty": (
        {"repetition_penalty": 1.6},
        lambda ids, start: RepetitionPenaltyLogitsProcessor(1.6),
    ),
    "sequence_bias": (
        {"sequence_bias": {(5,): 1.5, (9,): -2.0}},
        lambda ids, start: SequenceBiasLogitsProcessor({(5,): 1.5, (9,): -2.0}),
    ),
}
FIRST = [VCD(t=999, beta=0.05), Contrast(lam=0.3, variant="m3id", beta=0.05)]
"""Methods whose releases contrast first and penalise then."""


@pytest.mark.parametrize("penalty", PENALISED)
@pytest.mark.parametrize("one", [*FIRST, Contrast(gamma=1.8, beta=0.05)], ids=["vcd", "m3id", "pai"])
def test_penalties_come_in_the_order_of_the_release(one, penalty):
    """VCD's loop and the ports of M3ID combine logits and then call the processors; PAI's guidance is one of them."""
    settings, make = PENALISED[penalty]
    model = build("llava")
    prompt = picture_prompt(model, seed=3)
    start = prompt["input_ids"].shape[1]
    out = scores(model, prompt, one, max_new_tokens=6, suppress_tokens=None, **settings)
    pixels = prompt["pixel_values"]
    share = kept(999)
    noised = pixels * share**0.5 + noise_like(pixels, prompt, 55, 1) * (1 - share) ** 0.5
    penalise, n_changed = make(out.sequences, start), 0
    for step, got in enumerate(out.scores):
        ids = out.sequences[:, : start + step]
        said = ids[:, start:]
        main = full_pass(model, prompt, said)[None]
        if isinstance(one, VCD):
            other, weight = full_pass(model, {**prompt, "pixel_values": noised}, said)[None], 1.0
        else:
            other = full_pass(model, without_image(prompt), said)[None]
            weight = 0.8 if one.variant == "pai" else math.exp(0.3 * (step + 1)) - 1
        if one in FIRST:
            combined = (1 + weight) * main - weight * other
            cutoff = main.max(-1, keepdim=True).values + math.log(0.05)
            want = penalise(ids, combined.masked_fill(main < cutoff, -math.inf))
            n_changed += int(not torch.equal(want.argmax(-1), combined.argmax(-1)))
        else:
            want = contrasted(penalise(ids, main.clone()), other, weight, 0.05)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)


def test_beams_get_log_probabilities_also_before_penalties():
    model = build("llava")
    prompt = picture_prompt(model, seed=3)
    for one in FIRST:
        out = scores(model, prompt, one, num_beams=2, repetition_penalty=1.0001, max_new_tokens=2)
        torch.testing.assert_close(out.scores[0].logsumexp(-1), torch.zeros(2), rtol=0, atol=2e-3)


def test_m3id_gate_by_hand():
    """A sample of which the model is sure stays; the other is contrasted with weight e^.02 - 1, and nothing ruled out."""
    from vlmfix.method.site import Step

    class Stream:
        logits = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(2, 3)

    c = torch.tensor([[0.28, 0.26, 0.46], [0.29, 0.29, 0.42]]).log()
    one = Contrast(variant="gated", gate=0.45)
    out = one.logits(c, Step(0, {"blind": Stream(), "seen": torch.ones(2, dtype=torch.bool)}))
    torch.testing.assert_close(out[0], c[0])
    w = math.exp(0.02) - 1
    torch.testing.assert_close(out[1], (c[1] + w * (c[1] - Stream.logits[1])).log_softmax(-1))
    assert (Contrast(variant="gated").gate, Contrast(variant="gated").beta, Contrast().gate) == (0.3, 0, 1)
