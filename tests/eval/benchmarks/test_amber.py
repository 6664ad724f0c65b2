"""AMBER: the official figures of answers and descriptions, digit for digit, and what they are made of."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfix.eval.benchmarks import amber, amber_captions
from vlmfix.eval.scorers import yesno

DATA = Path(__file__).parents[2] / "data" / "other" / "amber"
REFERENCE = json.loads((DATA / "reference.json").read_text("utf-8"))
DISCRIMINATIVE = [name for name in REFERENCE if name != "generative_62"]
PRINTED = {"all": "Descriminative Task", "existence": "Exsitence"}  # as the official script spells them


@cache
def questions():
    return tuple(amber.load())


def scored(name, parser="amber"):
    lines = json.loads(gzip.decompress((DATA / f"discriminative_{name}.json.gz").read_bytes()))
    answers = {line["id"]: line["response"] for line in lines}
    return amber.score([question for question in questions() if question.id in answers], answers, parser)


def summed(module, scores):
    counting = amber_captions if module is amber_captions else yesno
    return {name: column.sum() for name, column in counting.counts(scores).items()}


# Questions


def test_questions():
    assert Counter((question.group, question.label) for question in questions()) == {
        **{("existence", "no"): 4924, ("state", "yes"): 2382, ("state", "no"): 2382},
        **{("number", "yes"): 1036, ("number", "no"): 1036, ("action", "yes"): 396, ("action", "no"): 396},
        **{("relation", "yes"): 975, ("relation", "no"): 689},
    }
    assert questions()[0].id == 1005
    assert questions()[0].text == "Is the sky sunny in this image?"
    assert len({question.image for question in questions()}) == 1004


@pytest.mark.parametrize("name", DISCRIMINATIVE)
def test_official_figures(name):
    found = amber.official_figures(scored(name))
    assert list(found) == list(amber.GROUPS)
    for group, figures in found.items():
        expected = REFERENCE[name]["parsed"][PRINTED.get(group, group.capitalize())]
        assert figures == {key if key == "F1" else key.lower(): value for key, value in expected.items()}, group


def test_strict_reads_more_and_says_no_is_positive():
    official, strict = scored("odd_600"), scored("odd_600", "strict")
    assert summed(amber, official)["unknown"] > summed(amber, strict)["unknown"] > 0
    for score in official:
        assert (score.prediction == "yes", score.prediction == "no") == (score.answer == "Yes", score.answer == "No")
    n = summed(amber, strict)
    values = {name: float(metric(n)) for name, metric in amber.METRICS.items()}
    no = [score for score in strict if score.question.label == "no"]
    said_no = [score for score in strict if score.prediction == "no"]
    assert values["recall"] == pytest.approx(sum(score.correct for score in no) / len(no))
    assert values["precision"] == pytest.approx(sum(score.correct for score in said_no) / len(said_no))
    assert values["F1"] == pytest.approx(2 / (1 / values["precision"] + 1 / values["recall"]))
    assert values["accuracy"] == pytest.approx(sum(score.correct for score in strict) / 600)


def test_exact_figures_round_to_the_official_ones():
    for name, part in amber.groups(scored("full_75")).items():
        n, printed = summed(amber, part), REFERENCE["full_75"]["parsed"][PRINTED.get(name, name.capitalize())]
        for metric, key in (("accuracy", "Accuracy"), ("precision", "Precision"), ("recall", "Recall")):
            assert 100 * float(amber.METRICS[metric](n)) == pytest.approx(printed[key], abs=0.06)


# Descriptions


def sentences():
    """Items with their nouns, in two lots: the file describes pictures 1 and 2 twice."""
    lines = json.loads((DATA / "generative_62_nouns.json").read_text("utf-8"))
    item = {item.id: item for item in amber_captions.load()}
    return [
        ([item[line["id"]] for line in lot], {line["id"]: line["nouns"] for line in lot})
        for lot in (lines[:60], lines[60:])
    ]


def alike_if_they_begin_alike(one, other):
    return 1.0 if one == other else 0.9 if one[:2] == other[:2] else 0.0


def test_items():
    items = amber_captions.load()
    assert len(items) == 1004
    assert sum(len(item.truth) for item in items) == 5599
    assert sum(len(item.hallu) for item in items) == 4924
    assert {item.prompt for item in items} == {"Describe this image."}


@pytest.mark.parametrize(
    ("similarity", "key"), [("off", "similarity_exact"), (alike_if_they_begin_alike, "similarity_prefix2")]
)
def test_official_figures_of_descriptions(similarity, key):
    scores = [score for items, nouns in sentences() for score in amber_captions.score(items, nouns, similarity)]
    assert len(scores) == 62
    expected = REFERENCE["generative_62"][key]["parsed"]["Generative Task"]
    assert amber_captions.official_figures(scores) == expected
    n = summed(amber_captions, scores)
    for name, metric in amber_captions.METRICS.items():
        assert 100 * float(metric(n)) == pytest.approx(expected[name], abs=0.06)
    assert n["captions"] == 62
    assert len(amber_captions.clusters(scores)) == 60


def one(truth, hallu, nouns, similarity="off"):
    item = amber_captions.DescribedPicture(1, "1.jpg", "", tuple(truth), tuple(hallu))
    return amber_captions.score([item], {1: nouns}, similarity)[0]


def test_an_associated_word_is_found_before_the_word_itself():
    found = one(["tree", "forest"], [], ["forest"])  # forest is associated with tree
    assert found.covered == {0}
    assert not found.hallucinated


def test_nouns_by_hand():
    found = one(["sky", "dog"], ["cloud"], ["sky", "sky", "cloud", "orange", "Sky", "unicorn"])
    assert found.nouns == ("sky", "sky", "cloud", "orange")  # every naming, safe words too; nothing is lower-cased
    assert found.hallucinated == ("cloud",)
    assert (found.covered, found.hit) == ({0}, {0})


def test_similar_words_are_credited_but_not_above_the_limit():
    assert one(["sky"], [], ["cloud"], lambda one, other: 0.81).covered == {0}
    assert one(["sky"], [], ["cloud"], lambda one, other: 0.8).hallucinated == ("cloud",)
    both = one(["sky"], ["grass"], ["cloud"], lambda one, other: 0.9)
    assert (both.covered, both.hit, both.hallucinated) == ({0}, {0}, ())


def test_ids_must_match():
    items = amber_captions.load()[:2]
    for chosen, nouns in ((items, {1: []}), (items[:1], {1: [], 2: []}), ([items[0]] * 2, {1: []})):
        with pytest.raises(ValueError, match="give each item once"):
            amber_captions.score(chosen, nouns)


@pytest.mark.parametrize("similarity", ["on", "spacy", "spacy:", ""])
def test_unknown_similarity(similarity):
    with pytest.raises(ValueError, match="is no similarity; give 'off'"):
        amber_captions.score([], {}, similarity)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match="python -m spacy download en_core_web_lg"):
        amber_captions.score([], {}, "spacy:en_core_web_lg")
    with pytest.raises(ValueError, match=r"python -m nltk.downloader punkt_tab"):
        amber_captions.nltk_nouns({1: "A dog."})


def test_back_ends_are_asked_as_the_official_script_asks_them(monkeypatch):
    class Word(str):
        def similarity(self, other):
            return alike_if_they_begin_alike(self, other)

    spacy, nltk, stem = ModuleType("spacy"), ModuleType("nltk"), ModuleType("nltk.stem")
    loaded = []
    spacy.load = lambda model: loaded.append(model) or Word
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [
        (word, "NNS" if word.endswith("s") else "NNP" if word.istitle() else "JJ") for word in words
    ]
    stem.WordNetLemmatizer = type("WordNetLemmatizer", (), {"lemmatize": lambda self, word: word.removesuffix("s")})
    for module in (spacy, nltk, stem):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    scores = [s for items, nouns in sentences() for s in amber_captions.score(items, nouns, "spacy:any")]
    expected = REFERENCE["generative_62"]["similarity_prefix2"]["parsed"]["Generative Task"]
    assert amber_captions.official_figures(scores) == expected
    assert set(loaded) == {"any"}
    assert amber_captions.nltk_nouns({7: "green cars Sky"}) == {7: ["car", "Sky"]}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=4) | st.sampled_from(["sky", "cloud", "dog", "light"]), max_size=9))
def test_any_nouns(nouns):
    n = summed(amber_captions, [one(["sky", "dog"], ["cloud"], nouns)])
    assert 0 <= n["hallucinated_nouns"] <= n["nouns"] <= len(nouns)
    assert n["covered"] <= n["truth"]
    assert n["hit"] <= n["hallu"]
