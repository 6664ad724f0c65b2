"""The truncation control against the reference's curves, differences and intervals."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfix.eval.scorers import chair, stats, truncation
from vlmfix.eval.scorers.stats import Estimate

DATA = Path(__file__).parents[2] / "data" / "chair"
REFERENCE = json.loads((DATA / "honesty_reference.json").read_text("utf-8"))
LEFT_OUT = ("opera_approx:opera/instructblip", "opera_approx:opera/llava-1.5-beam5")  # to save ten seconds; they agree
FIGURES = {"CHAIRs": "CHAIR_S", "CHAIRi_unique": "CHAIR_I_unique", "F1": "F1", "Recall": "recall", "words": "words"}


@cache
def captions(name):
    with gzip.open(DATA / f"captions/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return tuple((line["image_id"], line["caption"]) for line in map(json.loads, lines))


@cache
def base(variant, name):
    return truncation.cut_captions(captions(name), chair.coco_truth(variant, "val"), variant=variant)


@cache
def scores(variant, name):
    return chair.score_captions(captions(name), chair.coco_truth(variant, "val"), variant=variant)


def kept(keys):
    return [key for key in keys if not key.replace(": ", ":").startswith(LEFT_OUT)]


@pytest.mark.parametrize("key", kept(REFERENCE["truncation_curves"]))
def test_curves_as_in_the_reference(key):
    curve, expected = base(*key.split(":")).curve, REFERENCE["truncation_curves"][key]
    assert [str(cut) for cut in curve] == list(expected)
    for cut, figures in curve.items():
        for theirs, ours in FIGURES.items():
            assert figures[ours] == pytest.approx(expected[str(cut)][theirs], abs=1e-12), (cut, ours)


@pytest.mark.parametrize("key", kept(REFERENCE["truncation_control"]))
def test_controls_as_in_the_reference(key):
    variant, names = key.split(": ")
    name, method = names.split(" -> ")
    control = truncation.truncation_control(base(variant, name), scores(variant, method), resamples=2000)
    expected = REFERENCE["truncation_control"][key]
    assert (control.images, control.status, control.variant) == (expected["n"], expected["status"], variant)
    assert control.recall == pytest.approx(expected["method"]["Recall"], abs=1e-12)
    assert control.cut_chair_s == pytest.approx(expected["trunc_CHAIRs"], abs=1e-12)
    assert control.cut_words == pytest.approx(expected["cut_words"], abs=1e-9)
    assert control.chair_i_unique.value == pytest.approx(expected["dCHAIRi_unique"], abs=1e-12)
    for found, key in ((control.chair_s, "dCHAIRs"), (control.f1, "dF1")):
        assert found.value == pytest.approx(expected[key], abs=1e-12)
        assert [found.low, found.high] == pytest.approx(expected[f"{key}_bootstrap_95"], abs=1e-12)  # the same draws
    assert control.outside == 0
    assert control.below_curve is (expected["dCHAIRs_bootstrap_95"][1] < 0)
    assert json.loads(json.dumps(control.__dict__, default=vars))["chair_s"]["low"] == control.chair_s.low


def test_cut():
    assert truncation.cut(" A  dog\non a\tcouch. ", 3) == "A dog on"
    assert truncation.cut(" A  dog\non a\tcouch. ", None) == "A dog on a couch."
    assert truncation.cut("A dog.", 0) == truncation.cut("", 5) == ""
    assert (*truncation.CUTS[:2], *truncation.CUTS[-2:]) == (10, 15, 120, None)


# By hand: words 1 to 10 name a dog, words up to 15 a cat, words up to 20 a kite that is not there.
FILLER = " and so on and on"
LONG = f"A dog and so on and on and so on, a cat and so{' on, a kite and so'}{FILLER}"
TRUTH = {image: frozenset({"dog", "cat"}) for image in range(4)}


def by_hand(*texts, truth=TRUTH):
    return chair.score_captions(enumerate(texts), truth)


def test_by_hand():
    cuts = truncation.cut_captions(enumerate([LONG] * 4), TRUTH)
    assert {n: round(cuts.curve[n]["recall"], 3) for n in (10, 15, 20, None)} == {10: 0.5, 15: 1, 20: 1, None: 1}
    assert [cuts.curve[n]["CHAIR_S"] for n in (10, 15, 20, None)] == [0, 0, 1, 1]
    between = truncation.truncation_control(cuts, by_hand("A dog, a kite.", *["A dog and a cat."] * 3))
    assert (between.status, between.recall, between.cut_words) == ("inside", 0.875, pytest.approx(13.75))
    assert (between.cut_chair_s, between.chair_s.value) == (0, 0.25)
    assert not between.below_curve


def test_recall_above_vanilla_compares_with_the_uncut_base():
    cuts = truncation.cut_captions(enumerate(["A dog and a kite."] * 4), TRUTH)
    control = truncation.truncation_control(cuts, by_hand(*["A dog and a cat."] * 4))
    assert (control.status, control.cut_chair_s, control.cut_words) == ("recall above vanilla", 1, 5)
    assert control.chair_s == Estimate(-1, -1, -1)
    assert control.below_curve


def test_above_vanilla_is_above_the_uncut_base_even_where_a_cut_names_more():
    truth = {image: frozenset({"dog", "person"}) for image in range(4)}
    cuts = truncation.cut_captions(enumerate(["A dog and so on and on and the baby elephant."] * 4), truth)
    assert [cuts.curve[n]["recall"] for n in (10, 15, None)] == [1, 0.5, 0.5]
    control = truncation.truncation_control(cuts, by_hand(*["A dog, a man."] * 2, *["A dog."] * 2, truth=truth))
    assert (control.status, control.recall) == ("recall above vanilla", 0.75)
    assert (control.cut_chair_s, control.chair_s.value, control.cut_words) == (1, -1, 11)


def test_the_curve_is_sorted_by_recall():
    truth = {image: frozenset({"dog", "person"}) for image in range(4)}
    text = "A dog and so on and on and the baby elephant and so on and a man."
    cuts = truncation.cut_captions(enumerate([text] * 4), truth)
    assert [cuts.curve[n]["recall"] for n in (10, 15, 20, None)] == [1, 0.5, 1, 1]
    control = truncation.truncation_control(cuts, by_hand(*["A dog, a man."] * 2, *["A dog."] * 2, truth=truth))
    assert (control.status, control.cut_words, control.cut_chair_s) == ("inside", 12.5, 0.5)


def test_outside_is_never_extrapolated():
    cuts = truncation.cut_captions(enumerate([LONG] * 4), TRUTH)
    control = truncation.truncation_control(cuts, by_hand(*["Nothing."] * 4))
    assert control.status == "outside"
    assert control.chair_s == control.f1 == control.chair_i_unique == Estimate(None, None, None)
    assert (control.cut_chair_s, control.cut_words, control.outside) == (None, None, 1)
    assert not control.below_curve


def test_resamples_below_the_curve_are_left_out_and_counted():
    cuts = truncation.cut_captions(enumerate([LONG] * 4), TRUTH)
    control = truncation.truncation_control(cuts, by_hand("Nothing.", *["A dog and a cat."] * 3))
    assert control.status == "inside"
    assert control.outside == pytest.approx(1 / 4**4 + 4 * 3 / 4**4, abs=0.02)  # three or four times nothing
    assert control.chair_s.low is not None


def test_order_of_the_method_does_not_matter():
    method = scores("rohrbach", "opera/llava-1.5-ours")
    cuts = base("rohrbach", "opera/llava-1.5-greedy")
    straight, turned = (truncation.truncation_control(cuts, s, resamples=50) for s in (method, method[::-1]))
    assert straight == turned
    assert truncation.truncation_control(cuts, method, resamples=50, seed=1) != straight
    assert truncation.truncation_control(cuts, method, resamples=0).chair_s.low is None


def test_resamples_draw_whole_images():
    draws = np.concatenate(list(stats._draws(7, 300, seed=3)))
    assert draws.shape == (300, 7)
    assert (draws.sum(axis=1) == 7).all()
    assert np.array_equal(draws[5], np.bincount(np.random.default_rng(3).integers(0, 7, (300, 7))[5], minlength=7))


def test_what_does_not_compare_raises():
    cuts = truncation.cut_captions(enumerate(["A dog."] * 4), TRUTH)
    with pytest.raises(ValueError, match="1 images, such as 3, have a caption by only one"):
        truncation.truncation_control(cuts, by_hand(*["A dog."] * 3))
    other = [replace(score, variant="opera_approx") for score in by_hand(*["A dog."] * 4)]
    with pytest.raises(ValueError, match="the method is scored by opera_approx, the base by rohrbach"):
        truncation.truncation_control(cuts, other)
    with pytest.raises(ValueError, match="no object is in any of the 1 images"):
        truncation.cut_captions([(1, "A dog.")], {1: frozenset()})
    with pytest.raises(ValueError, match="no object is in any of the 0 images"):
        truncation.cut_captions([], TRUTH)
    with pytest.raises(ValueError, match="expected text"):
        truncation.cut_captions([(1, None)], TRUTH)


WORDS = (
    *("a", "dog", "dogs.", "hot", "dog", "toilet", "seat", "seats,", "(chair.)", '"bus."', 'car."', "dining", "table.", "wine"),
    *("glasses", "stop", "sign", "baby", "elephant", "cannot", "'dogs'", "skate-board", "traffic", "light).", "orange", "...", "."),
    *("3,", "x:3", "bow", "tie?", "İbus", "bus", "dog.**", "**bus.*car.", 'cup.”', "cat.>", "seat!.*?**", "a."),
)  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=14) | st.text(max_size=60).map(str.split))
def test_cut_captions_name_what_their_words_name(words):
    """Objects of all cuts in one pass, against reading every cut caption by itself."""
    for variant in ("rohrbach", "opera_approx", "strict"):
        found = chair.prefix_objects(words, range(len(words) + 1), variant=variant)
        for n, objects in enumerate(found):
            assert objects == {m.node for m in chair.mentions(" ".join(words[:n]), variant=variant)}, (variant, n)


def test_many_captions_are_cut_in_seconds():
    pairs = [(i, text) for i, (_, text) in enumerate(captions("pope/Instruction1_llava") * 2)]
    truth = dict.fromkeys(range(len(pairs)), frozenset({"person"}))
    began = time.process_time()
    truncation.cut_captions(pairs, truth)
    assert time.process_time() - began < 12, "1.5 seconds for 4,000 captions on a quiet machine; 10 before"
