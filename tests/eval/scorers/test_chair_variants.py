"""CHAIR's variants against the figures of the programs they follow; NLTK and inflect are replayed from recordings."""

from __future__ import annotations

import gzip
import json
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmfix.eval.scorers import chair
from vlmfix.eval.scorers.chair import variants
from vlmfix.eval.scorers.chair.tokens import tokenize

DATA = Path(__file__).parents[2] / "data" / "chair"
FILES = sorted(f"{path.parent.name}/{path.name.removesuffix('.jsonl.gz')}" for path in DATA.glob("captions/*/*.gz"))
STRICT_CASES = json.loads((DATA / "strict_cases.json").read_text("utf-8"))
BUILD_FIXTURE = json.loads((DATA / "gt/gt_build_fixture_80.json").read_text("utf-8"))


def packed(path):
    with gzip.open(DATA / path, "rt", encoding="utf-8") as file:
        return json.load(file)


@cache
def summary(variant):
    return json.loads((DATA / f"scores/{variant}/summary.json").read_text("utf-8"))


@cache
def captions(name):
    with gzip.open(DATA / f"captions/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return tuple((line["image_id"], line["caption"]) for line in map(json.loads, lines))


@cache
def scores(name, variant):
    return chair.score_captions(captions(name), chair.coco_truth(variant, "val"), variant=variant)


def summed(scored):
    return {name: column.sum() for name, column in chair.counts(scored).items()}


def nodes(caption, variant):
    return [mention.node for mention in chair.mentions(caption, variant=variant)]


# NLTK and inflect, as recorded


@cache
def replay():
    return packed("opera_replay.json.gz")


@cache
def recorded_tokens():
    """Caption in lower case -> NLTK's tokens, and tokens -> first letters of their tags."""
    tokens, letters = {}, {}
    for name, tags in replay()["tags"].items():
        for at, (_, caption) in enumerate(captions(name)):
            other = replay()["tokens"][name].get(str(at))
            words = other.split() if other else [token.text for token in tokenize(caption)]
            tokens[caption.lower()] = words
            letters[" ".join(words)] = tags[at]
    return tokens, letters


def made_up_tokens(text):
    """Tokens of a text that was not recorded, with quotation marks rewritten as NLTK does it."""
    quotes = iter(("``", "''") * len(text))
    return [next(quotes) if token.text == '"' else token.text for token in tokenize(text)]


class FakeNltk:
    __version__ = "3.10.4"

    def __init__(self, missing=""):
        self.tag = SimpleNamespace(PerceptronTagger=self.tagger)
        self.stem = SimpleNamespace(WordNetLemmatizer=lambda: self)
        self.missing = missing

    def check(self, resource):
        if resource == self.missing:
            raise LookupError(f"Resource {resource} not found.")

    def word_tokenize(self, text):
        self.check("punkt_tab")
        return recorded_tokens()[0].get(text) or made_up_tokens(text)

    def tagger(self):
        self.check("averaged_perceptron_tagger_eng")
        full = {"J": "JJR", "V": "VBG", "N": "NNS", "R": "RB", "-": "DT"}

        def tag(words):
            letters = recorded_tokens()[1].get(" ".join(words), "N" * len(words))
            return [(word, full[letter]) for word, letter in zip(words, letters, strict=True)]

        return SimpleNamespace(tag=tag)

    def lemmatize(self, word, pos):
        self.check("wordnet")
        return replay()["lemmas"][pos].get(word, word)


class FakeInflect:
    class engine:
        singulars = packed("inflect_singulars.json.gz")

        def singular_noun(self, word):
            if not word.isascii():
                raise TypeError("odd word")
            return self.singulars.get(word, False)


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", FakeNltk())
    monkeypatch.setitem(sys.modules, "inflect", FakeInflect)
    forget()
    yield
    forget()


def forget():
    variants._nltk.cache_clear()
    variants._singular_noun.cache_clear()


# Against the references


@pytest.mark.parametrize("name", FILES)
def test_opera_as_in_the_reference_caption_by_caption(name):
    reference = packed(f"scores/opera/{name}.json.gz")
    for score, expected in zip(scores(name, "opera"), reference["sentences"], strict=True):
        assert score.image_id == expected["image_id"]
        assert [mention.node for mention in score.mentions] == expected["gen"]
        assert [[mention.word, mention.node] for mention in score.hallucinated] == expected["hall"]
        assert sorted(score.truth) == expected["gt"]
        assert score.chair_s == expected["CHAIRs"]
        assert score.chair_i == pytest.approx(expected["CHAIRi"], abs=1e-12)
        assert score.recall == pytest.approx(expected["Recall"], abs=1e-12)
        assert score.variant == "opera (nltk 3.10.4)"


@pytest.mark.parametrize("variant", ["opera", "opera_approx", "inflect", "strict"])
@pytest.mark.parametrize("name", FILES)
def test_corpus_figures_as_in_the_reference(name, variant):
    sums, expected = summed(scores(name, variant)), dict(summary(variant)[name])
    if variant == "opera":
        expected |= summary("pai").get(name, {})  # PAI's program is OPERA's with precision and F1
    counted = {
        "n": "captions",
        "n_hallucinated_captions": "hallucinated_captions",
        "n_hallucinated_mentions": "hallucinated_mentions",
        "n_mentions": "mentions",
        "n_object_mentions": "mentions",
        "n_gt": "truth",
    }
    figures = {
        "CHAIRs": "CHAIR_S",
        "CHAIRi": "CHAIR_I",
        "Recall": "recall",
        "Precision": "precision",
        "F1": "F1",
    }
    assert len(expected.keys() & (counted.keys() | figures.keys())) >= 8 - (variant == "opera" and "pope" in name)
    for key, ours in counted.items():
        assert sums[ours] == expected.get(key, sums[ours]), key
    for key, ours in figures.items():
        value = chair.METRICS[ours](sums)
        assert value == pytest.approx(expected.get(key, value), abs=1e-12), key


@pytest.mark.parametrize("case", STRICT_CASES, ids=lambda case: ascii(case["caption"][:40]))
def test_strict_cases(case):
    assert nodes(case["caption"], "strict") == case["nodes"]


def test_the_approximation_is_as_near_as_it_says():
    other, gaps = 0, {"CHAIR_S": [], "CHAIR_I": [], "recall": []}
    for name in FILES:
        exact, approximate = scores(name, "opera"), scores(name, "opera_approx")
        pairs = zip(exact, approximate, strict=True)
        other += sum([m.node for m in a.mentions] != [m.node for m in b.mentions] for a, b in pairs)
        for metric, found in gaps.items():
            found.append(100 * abs(chair.METRICS[metric](summed(exact)) - chair.METRICS[metric](summed(approximate))))
    assert other == 193
    assert {metric: f"{max(found):.2f}" for metric, found in gaps.items()} == {
        "CHAIR_S": "0.20",
        "CHAIR_I": "0.06",
        "recall": "0.19",
    }
    assert sum(gaps["CHAIR_S"]) / len(FILES) < 0.025


@pytest.mark.skipif("NLTK_DATA" not in os.environ, reason="needs the data of NLTK, named by NLTK_DATA")
def test_opera_with_nltk_itself(monkeypatch):
    monkeypatch.delitem(sys.modules, "nltk")
    forget()
    pytest.importorskip("nltk")
    exact = chair.score_captions(captions(FILES[0]), chair.coco_truth("opera"), variant="opera")
    assert [score.mentions for score in exact] == [score.mentions for score in scores(FILES[0], "opera")]


def test_inflect_itself(monkeypatch):
    monkeypatch.delitem(sys.modules, "inflect")
    pytest.importorskip("inflect")
    forget()
    singular = variants._singular_noun()
    assert all(singular(word) == expected for word, expected in FakeInflect.engine.singulars.items())
    assert singular("\ud800 'x") == "\ud800 'x"


# What each variant is known for


def by_all(found):
    return {variant: found for variant in variants.VARIANTS}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A bus.", {"opera": ["bus"], "opera_approx": ["bus"], "strict": ["bus"]}),
        (
            "Two ties.",
            {"opera": ["tie"], "opera_approx": ["tie"], "inflect": ["tie"], "strict": ["tie"]},
        ),
        ("A tennis racket.", by_all(["tennis racket"])),
        ("An orange shirt.", by_all(["orange"]) | {"strict": []}),
        ("A cheesecake and a motor bike.", {"strict": ["cake", "motorcycle"]}),
        ("An iPhone.", {"strict": ["cell phone"]}),
        ("A man/woman.", {"strict": ["person"]}),
        ("Two wine glasses.", by_all(["wine glass"])),
        ("A toilet seat and a seat.", by_all(["toilet"])),
        ("potted plants", by_all(["potted plant"])),
        ("Nothing.", {}),
    ],
)
def test_known_differences(caption, expected):
    assert {variant: nodes(caption, variant) for variant in variants.VARIANTS} == {
        variant: expected.get(variant, []) for variant in variants.VARIANTS
    }


def test_approximate_lemmas_depend_on_the_word_before():
    assert [token.text for token in variants.opera_approx("Skiing. They fly kites, kites")] == [
        *("ski", ".", "they", "fly", "kit", ",", "kite")
    ]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("An orange and white cat.", ["cat"]),
        ("A black, orange cat.", ["cat"]),
        ("The cat is orange.", ["cat"]),
        ("An orange on a table. An orange, a cat.", ["orange", "dining table", "orange", "cat"]),
        ("A male and a female elephant, two males.", ["elephant", "person"]),
        ("A passenger car seat; a passenger.", ["person"]),
        ("The toilet and its seat. A seat.", ["toilet", "chair"]),
        ("A pickup truck, a truck.", ["truck", "truck"]),
        ("A wine-glass, skate-boards, a cat-dog, a cat-like dog.", ["wine glass", "skateboard", "cat", "dog", "dog"]),
        ("The pitcher's mound and the pitcher’s hand.", ["person"]),
        ("A car.A dog", ["dog"]),
        ("a car.An a/b dog/cat", ["car", "dog", "cat"]),
    ],
)
def test_strict(caption, expected):
    assert nodes(caption, "strict") == expected


def test_spans_of_strict_point_into_the_caption():
    caption = "İ: the car.Two skate-boards by laptop-computers/Wine  glasses, a pickup truck"
    found = chair.mentions(caption, variant="strict")
    assert [(m.word, caption[m.start : m.end], m.index) for m in found] == [
        ("car", "car", 3),
        ("skateboards", "skate-boards", 6),
        ("laptop computers", "laptop-computers", 8),
        ("wine glasses", "Wine  glasses", 10),
        ("pickup truck", "pickup truck", 14),
    ]


def test_spans_of_opera_point_into_the_caption():
    caption = "İ \"dogs\" by a ''Hot  Dog''"
    found = chair.mentions(caption, variant="opera")
    assert [(m.word, caption[m.start : m.end]) for m in found] == [("dog", "dogs"), ("hot dog", "Hot  Dog")]


# Names, and what is missing


def test_labels():
    truth = chair.coco_truth
    assert [chair.label(variant) for variant in variants.VARIANTS] == [
        *("rohrbach", "opera (nltk 3.10.4)", "opera_approx", "inflect", "strict")
    ]
    assert chair.label("inflect", truth("inflect", "val")) == "inflect (gt rohrbach)"
    assert chair.label("opera_approx", truth("opera_approx", "val")) == "opera_approx"
    assert scores(FILES[0], "inflect")[0].variant == "inflect (gt rohrbach)"
    assert chair.explain(scores(FILES[0], "opera")[0])["variant"] == "opera (nltk 3.10.4)"


@pytest.mark.parametrize("resource", ["punkt_tab", "averaged_perceptron_tagger_eng", "wordnet"])
def test_opera_without_data_names_the_command(monkeypatch, resource):
    monkeypatch.setitem(sys.modules, "nltk", FakeNltk(missing=resource))
    with pytest.raises(ValueError, match=rf"data of NLTK 3\.10\.4 .*python -m nltk\.downloader .*{resource}") as error:
        chair.mentions("A dog.", variant="opera")
    assert "\n" not in str(error.value)
    name, line = variants.best_opera()
    assert name == "opera_approx"
    assert line.startswith("opera_approx stands in for opera: ")
    assert "\n" not in line


def test_best_opera_is_the_exact_one_where_it_can_be():
    assert variants.best_opera() == ("opera", "")


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "inflect", None)
    for variant, package in (("opera", "nltk"), ("inflect", "inflect")):
        with pytest.raises(ValueError, match=f"pip install {package}"):
            chair.score_captions([(42, "A dog.")], chair.coco_truth(variant, "val"), variant=variant)
    assert variants.best_opera()[0] == "opera_approx"
    assert nodes("Two dogs.", "opera_approx") == ["dog"]


@pytest.mark.parametrize(
    ("name", "hint"), [("oprea", "did you mean 'opera'"), ("chair", "known: inflect, opera,"), (5, "known: ")]
)
def test_unknown_variant(name, hint):
    for call in (
        lambda: chair.mentions("A dog.", variant=name),
        lambda: chair.score_captions([], {}, variant=name),
        lambda: chair.coco_truth(name),
        lambda: chair.ground_truth("x.json", variant=name),
        lambda: chair.load_masks("x.json", name),
    ):
        with pytest.raises(ValueError, match=f"is no variant of CHAIR; {hint}"):
            call()


@pytest.mark.parametrize("variant", ["opera_approx", "strict"])
def test_tables_of_coco_do_for_no_other_vocabulary(tmp_path, variant):
    path = tmp_path / "things.txt"
    path.write_text("drone, quadcopter\n", "utf-8")
    with pytest.raises(ValueError, match=f"{variant} knows the words of COCO only"):
        chair.mentions("Two drones.", chair.Vocabulary.load(path), variant)
    assert [m.node for m in chair.mentions("a drone", chair.Vocabulary.load(path), "opera")] == ["drone"]


# Ground truth


@pytest.mark.parametrize(
    ("captions_by", "truth_by"),
    [
        ("rohrbach", "opera"),
        ("rohrbach", "strict"),
        ("opera", "rohrbach"),
        ("opera_approx", "rohrbach"),
        ("inflect", "opera"),
        ("strict", "rohrbach"),
    ],
)
def test_mixing_variants_raises(captions_by, truth_by):
    with pytest.raises(ValueError, match=rf"COCO 2014 val, {truth_by}: .* does not go with captions read as"):
        chair.score_captions([(42, "A dog.")], chair.coco_truth(truth_by, "val"), variant=captions_by)


def test_an_approximate_truth_is_not_exact():
    approximate = chair.GroundTruth({42: frozenset({"dog"})}, "opera_approx")
    assert chair.score_captions([(42, "A dog.")], approximate, variant="opera_approx")[0].chair_s == 0
    with pytest.raises(ValueError, match="give ground truth made with opera, or score as opera_approx"):
        chair.score_captions([(42, "A dog.")], approximate, variant="opera")


def test_a_truth_without_captions_suits_every_variant():
    for truth in ({42: frozenset({"dog"})}, chair.GroundTruth({42: frozenset({"dog"})})):
        for variant in variants.VARIANTS:
            (score,) = chair.score_captions([(42, "A dog.")], truth, variant=variant)
            assert score.chair_s == 0
            assert score.variant == chair.label(variant)


def test_scores_of_different_variants_do_not_pool():
    with pytest.raises(ValueError, match=r"do not add up \(opera_approx, rohrbach\)"):
        chair.counts([*scores(FILES[0], "rohrbach"), *scores(FILES[0], "opera_approx")])


def test_the_ground_truth_of_coco():
    rohrbach, opera, strict = map(chair.coco_truth, ("rohrbach", "opera", "strict"))
    assert [len(chair.coco_truth("opera", split)) for split in ("val", "train")] == [40_504, 82_783]
    assert len(rohrbach) == len(opera) == len(strict) == 123_287
    assert sum(map(len, rohrbach.values())) == 393_178
    assert sum(map(len, opera.values())) == 394_680
    assert sum(rohrbach[image] != opera[image] for image in rohrbach) == 1_741
    more = {image for image in rohrbach if strict[image] != rohrbach[image]}
    assert len(more) == 461
    assert all(strict[image] - rohrbach[image] == {"bus"} and "bus" in opera[image] for image in more)
    bare = chair.images_without_instances()
    assert len(bare) == 1_069
    assert bare <= rohrbach.keys()
    assert len(bare & chair.coco_truth("rohrbach", "val").keys()) == 367
    with pytest.raises(ValueError, match="'test' is no split"):
        chair.coco_truth("opera", "test")


def test_a_truth_can_not_be_changed():
    truth = chair.coco_truth("rohrbach", "val")
    with pytest.raises(TypeError):
        truth[42] = frozenset()
    with pytest.raises(AttributeError):
        truth.variant = "opera"


def coco_files(folder, records):
    names = sorted({name for record in records for name in record["instance_categories"]})
    images = [{"id": record["image_id"]} for record in records]
    boxes = [(r["image_id"], names.index(name)) for r in records for name in r["instance_categories"]]
    sentences = [(r["image_id"], sentence) for r in records for sentence in r["captions"]]
    contents = {
        "instances": [{"id": at, "image_id": i, "category_id": c} for at, (i, c) in enumerate(boxes)],
        "captions": [{"id": at, "image_id": i, "caption": text} for at, (i, text) in enumerate(sentences)],
    }
    categories = [{"id": at, "name": name} for at, name in enumerate(names)]
    for name, entries in contents.items():
        content = {"images": images, "annotations": entries} | (
            {"categories": categories} if name == "instances" else {}
        )
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder / "instances.json", folder / "captions.json"


def test_build_fixture(tmp_path):
    files = coco_files(tmp_path, BUILD_FIXTURE)
    built = chair.ground_truth(*files, variant="opera_approx")
    assert built.variant == "opera_approx"
    assert built == {record["image_id"]: frozenset(record["gt_opera"]) for record in BUILD_FIXTURE}
    assert chair.ground_truth(*files).variant == "rohrbach"
    assert chair.ground_truth(files[0]).variant is None
    strict = chair.ground_truth(*files, variant="strict")
    other = [image for image, objects in strict.items() if objects != chair.coco_truth("strict")[image]]
    assert len(other) == 5  # human captions that only seem to name an object
    assert all(strict[image] < chair.coco_truth("strict")[image] for image in other)


# Anything

PIECES = [
    *(
        "toilet",
        "seat",
        " ",
        "hot",
        "Dogs",
        "wine glasses",
        "orange",
        "male",
        "baby",
        "cat",
        "and",
        "white",
        "bus-stop",
    ),
    *("'", '"', "''", "``", "n't", ".", "..", "/", "-", "--", "’", "“", "İ", "Σ", "\ud800", "\u2028", "\n", "car.And"),
]
ANY_TEXT = st.text(st.characters()) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_TEXT, st.sampled_from(variants.VARIANTS))
def test_any_text(caption, variant):
    (score,) = chair.score_captions([(1, caption)], {1: frozenset({"dog", "toilet"})}, variant=variant)
    edges = [edge for mention in score.mentions for edge in (mention.start, mention.end)]
    assert edges == sorted(edges)
    assert all(0 <= mention.start < mention.end <= len(caption) for mention in score.mentions)
    assert [m.index for m in score.mentions] == sorted(m.index for m in score.mentions)
    assert {mention.node for mention in score.mentions} <= set(chair.Vocabulary.load().nodes)
    assert chair.mentions(caption, variant=variant) == list(score.mentions)
    explained = json.loads(json.dumps(chair.explain(score)))
    assert [entry["text"] for entry in explained["mentions"]] == [caption[m.start : m.end] for m in score.mentions]
    verdicts = {entry["node"]: entry["verdict"] for entry in explained["mentions"]}
    named = {node for node, verdict in verdicts.items() if verdict == "present"}
    assert named | set(explained["missed"]) == {"dog", "toilet"}
    assert {node for node, verdict in verdicts.items() if verdict == "invented"}.isdisjoint({"dog", "toilet"})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_TEXT, st.sampled_from(sorted(variants.NORMALISERS)))
def test_words_keep_their_place(caption, variant):
    words = variants.NORMALISERS[variant](caption)
    assert [(word.start, word.end) for word in words] == [(t.start, t.end) for t in tokenize(caption)]
