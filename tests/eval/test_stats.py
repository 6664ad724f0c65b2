"""Intervals and paired differences against reference figures (tests/data/stats_reference.json) and closed forms."""

import gzip
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vlmfix.eval.scorers import chair, stats

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "stats_reference.json").read_text())
NAMES = {
    "CHAIRs": "CHAIR_S",
    "CHAIRi": "CHAIR_I",
    "Recall": "recall",
    "Precision": "precision",
    "F1": "F1",
    "CHAIRi_unique": "CHAIR_I_unique",
}
METRICS = {name: chair.METRICS[name] for name in NAMES.values()}


@cache
def counts(name):
    """Counts of a caption file, from the reference's own object lists."""
    with gzip.open(DATA / "chair" / "scores" / "rohrbach" / f"{name}.json.gz", "rt") as f:
        sentences = json.load(f)["sentences"]
    rows = [
        {
            "captions": 1,
            "hallucinated_captions": bool(set(s["gen"]) - set(s["gt"])),
            "mentions": len(s["gen"]),
            "hallucinated_mentions": sum(x not in s["gt"] for x in s["gen"]),
            "unique_mentions": len(set(s["gen"])),
            "true_unique": len(set(s["gen"]) & set(s["gt"])),
            "truth": len(s["gt"]),
        }
        for s in sentences
    ]
    return {k: np.array([r[k] for r in rows], float) for k in rows[0]}, [s["image_id"] for s in sentences]


SINGLE = [k for k in REFERENCE["single"] if k.startswith("rohrbach:")]
PAIRED = [k for k in REFERENCE["paired"] if k.startswith("rohrbach:")]


@pytest.mark.parametrize("key", SINGLE)
def test_intervals(key):
    want = REFERENCE["single"][key]
    found = stats.estimates(counts(key.split(":")[1])[0], METRICS)
    for theirs, ours in NAMES.items():
        assert found[ours].value == pytest.approx(want[theirs], abs=1e-9)
        assert (found[ours].low, found[ours].high) == pytest.approx(want["bootstrap_95"][theirs], abs=0.003)


@pytest.mark.parametrize("key", PAIRED)
def test_paired_differences(key):
    want = REFERENCE["paired"][key]
    found = stats.differences(*counts(want["method"]), *counts(want["base"]), METRICS)
    for theirs, ours in NAMES.items():
        d = found[ours]
        assert d.value == pytest.approx(want["delta"][theirs], abs=1e-9)
        assert (d.low, d.high) == pytest.approx(want["bootstrap_95"][theirs], abs=0.003)
        assert d.n == want["n"] and d.left_out == 0
        assert d.clear == (min(d.low, d.high) > 0 or max(d.low, d.high) < 0)


def test_pairing_is_by_image_and_not_by_order():
    a, images = counts("opera/llava-1.5-greedy")
    b, b_images = counts("opera/llava-1.5-ours")
    order = np.random.default_rng(1).permutation(len(images))
    shuffled = {k: v[order] for k, v in b.items()}
    straight = stats.differences(b, b_images, a, images, METRICS, 500)
    mixed = stats.differences(shuffled, [b_images[i] for i in order], a, images, METRICS, 500)
    for name in METRICS:
        assert straight[name].value == mixed[name].value
    unpaired = np.hypot(*(e.high - e.low for e in (stats.estimates(x, METRICS, 500)["CHAIR_S"] for x in (a, b))))
    assert straight["CHAIR_S"].high - straight["CHAIR_S"].low < 0.95 * unpaired


def test_images_that_only_one_method_has_are_left_out_and_counted():
    a, images = counts("opera/llava-1.5-greedy")
    fewer = {k: v[:-7] for k, v in a.items()}
    d = stats.differences(fewer, images[:-7], a, images, METRICS, 200)["CHAIR_S"]
    assert (d.value, d.low, d.high, d.n, d.left_out) == (0, 0, 0, 493, 7) and d.p == 1 and not d.clear


def test_undefined_figures_are_none():
    nothing = {k: np.zeros(5) for k in counts(SINGLE[0].split(":")[1])[0]}
    found = stats.estimates(nothing, METRICS, 100)
    assert all(e == stats.Estimate(None, None, None) for e in found.values())
    empty = {k: v[:0] for k, v in nothing.items()}
    assert stats.estimates(empty, METRICS, 100)["CHAIR_S"].value is None
    assert stats.differences(empty, [], empty, [], METRICS, 100)["CHAIR_S"].n == 0


def test_the_same_seed_gives_the_same_interval_whatever_the_block():
    a, _ = counts("opera/llava-1.5-greedy")
    assert stats.estimates(a, METRICS, 300) == stats.estimates(a, METRICS, 300)
    assert stats.estimates(a, METRICS, 300) != stats.estimates(a, METRICS, 300, seed=1)


@pytest.mark.parametrize("key", REFERENCE["paired"])
def test_mcnemar_is_exact(key):
    want = REFERENCE["paired"][key]
    counted = want["only_method_hallucinates"], want["only_base_hallucinates"]
    assert stats.mcnemar(*counted) == pytest.approx(want["mcnemar_exact_p"], rel=1e-12)
    assert stats.mcnemar(*counted[::-1]) == stats.mcnemar(*counted)


def test_mcnemar_by_hand():
    assert stats.mcnemar(0, 0) == stats.mcnemar(3, 3) == stats.mcnemar(4, 3) == 1.0
    assert stats.mcnemar(0, 5) == 2 / 2**5
    assert stats.mcnemar(1, 9) == 2 * (1 + 10) / 2**10
    assert stats.mcnemar(7, 20) == 2 * sum(math.comb(27, k) for k in range(8)) / 2**27
    assert 0 < stats.mcnemar(1900, 2100) < 0.01, "thousands of images neither overflow nor take long"
    with pytest.raises(ValueError, match="got -1 and 2"):
        stats.mcnemar(-1, 2)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.02, None, 0.02]) == [0.04, None, 0.04], "what was not tested does not count"
    assert stats.holm([0.7, 0.9]) == [1.0, 1.0] and stats.holm([0.3]) == [0.3] and stats.holm([]) == []
