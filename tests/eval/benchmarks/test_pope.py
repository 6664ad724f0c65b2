"""POPE: the builder bit for bit, every parser on odd answers, every evaluator's figures, and joining by id."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfix.eval.benchmarks import pope_building, pope_questions
from vlmfix.eval.scorers import yesno

DATA = Path(__file__).parents[2] / "data" / "pope"
CASES = json.loads((DATA / "parser_cases.json").read_text("utf-8"))
FILES = sorted(path.name.removesuffix(".json.gz") for path in DATA.glob("reference/*.gz"))
ODD = ("synthetic-missing-answer", "synthetic-shuffled", "synthetic-duplicate-answer")
PLAIN = [name for name in FILES if name not in ODD]
REAL = [name for name in FILES if not name.startswith("synthetic")]


def read_lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def questions(name):
    return tuple(
        yesno.Question(line["question_id"], line["image"], line["text"], "", line["label"], "random")
        for line in read_lines(DATA / f"answers/{name}.questions.jsonl.gz")
    )


@cache
def answers(name):
    return tuple(
        (line["question_id"], line["answer"]) for line in read_lines(DATA / f"answers/{name}.answers.jsonl.gz")
    )


def reference(name):
    return json.loads(gzip.decompress((DATA / f"reference/{name}.json.gz").read_bytes()))


def scored(name, parser="pope"):
    return yesno.score_answers(questions(name), answers(name), parser)


def summed(scores):
    return {name: column.sum() for name, column in yesno.counts(scores).items()}


def values(scores):
    sums = summed(scores)
    return {name: float(metric(sums)) for name, metric in yesno.METRICS.items()}


def same(value, expected):
    return np.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-12)


# Builder


def images(path):
    return [(line["image"], line["objects"]) for line in json.loads((DATA / "builder" / path).read_text("utf-8"))]


def as_lines(built):
    return "".join(
        json.dumps({"question_id": q.id, "image": q.image, "text": q.text, "label": q.label}) + "\n" for q in built
    )


@pytest.mark.parametrize("split", pope_questions.SPLITS)
@pytest.mark.parametrize(("folder", "k"), [("n60", 3), ("n5", 3), ("k2", 2)])
def test_builder_is_bit_equal_to_the_official_one(folder, k, split):
    built = pope_building.build_questions(
        images(f"{folder}/selected.json"), k=k, seed=0, splits=(split,), article="official"
    )
    assert as_lines(built) == (DATA / f"builder/{folder}/toy_pope_{split}.json").read_text("utf-8")


def test_images_are_drawn_as_by_the_official_script():
    built = pope_building.build_questions(images("segmentation_all400.json"), n_images=60, seed=0, splits=("random",))
    expected = json.loads((DATA / "builder/main_py_random_sample_seed0_60.json").read_text("utf-8"))
    assert list(dict.fromkeys(question.image for question in built)) == expected


def test_all_splits_together():
    built = pope_building.build_questions(images("n60/selected.json"), seed=0)
    assert [question.id for question in built] == list(range(1, 1081))
    for place, split in enumerate(pope_questions.SPLITS):
        alone = pope_building.build_questions(images("n60/selected.json"), seed=0, splits=(split,))
        part = [question for question in built if question.split == split]
        assert [(q.text, q.label, q.image, q.object) for q in part] == [
            (q.text, q.label, q.image, q.object) for q in alone
        ]
        assert part[0].id == 360 * place + 1


def test_article():
    assert pope_building.question_text("dog") == "Is there a dog in the image?"
    assert pope_building.question_text("orange") == "Is there an orange in the image?"
    assert pope_building.question_text("orange", "official") == "Is there an orange in the imange?"
    built = pope_building.build_questions(images("n60/selected.json"), seed=0)
    assert all("imange" not in question.text for question in built)
    assert all(question.text == pope_building.question_text(question.object) for question in built)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("popluar",)}, "did you mean 'popular'"),
        ({"article": "the"}, "article is 'the'"),
        ({"k": 0}, "k is 0"),
        ({"k": 4}, "0 of 2 images"),
        ({"n_images": 3}, "2 of 2 images have at least 3 objects, but 3"),
        ({"n_images": 0}, "wanted"),
        ({}, "a.jpg holds 3 of the 5 objects.*fewer than k = 3"),
    ],
)
def test_builder_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        pope_building.build_questions(
            [("a.jpg", ["a", "b", "c"]), ("b.jpg", ["c", "d", "e"])], **{"seed": 0, **options}
        )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5), max_size=6), st.integers(1, 3), st.integers(0, 9))
def test_builder_ends_and_asks_rightly(objects, k, seed):
    holding = {f"{number}.jpg": row for number, row in enumerate(objects)}
    try:
        built = pope_building.build_questions(list(holding.items()), k=k, seed=seed)
    except ValueError:
        rows = [set(row) for row in objects if len(set(row)) >= k]
        assert not rows or any(len(set().union(*rows) - row) < k for row in rows)
        return
    assert [question.label for question in built] == ["yes", "no"] * (len(built) // 2)
    assert all((question.object in holding[question.image]) == (question.label == "yes") for question in built)
    assert len({(q.split, q.image, q.object) for q in built}) == len(built)


def test_ordered_objects(tmp_path):
    path = tmp_path / "instances.json"
    content = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
        "annotations": [
            {"id": number, "image_id": 7, "category_id": category, "iscrowd": 0}
            for number, category in enumerate((2, 1, 2, 3))
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "unicorn"}, {"id": 3, "name": "cat"}],
    }
    path.write_text(json.dumps(content))
    assert pope_building.ordered_objects(path) == [("b.jpg", ("unicorn", "dog", "cat")), ("a.jpg", ())]
    path.write_text(json.dumps(content).replace('"file_name": "a.jpg"', '"name": "a.jpg"'))
    with pytest.raises(ValueError, match="image 3 has no file_name"):
        pope_building.ordered_objects(path)


# Parsers


def test_there_are_65_cases():
    assert len(CASES) == 65


@pytest.mark.parametrize("parser", [name for name in yesno.PARSERS if name in (*CASES[0], "pope")])
@pytest.mark.parametrize("label", ["yes", "no"])
def test_parser_cases(parser, label):
    key = "llava" if parser == "pope" else parser
    read = {case["answer"]: yesno.PARSERS[parser](case["answer"], label) for case in CASES}
    assert read == {case["answer"]: case[key] for case in CASES}


@pytest.mark.parametrize("label", ["yes", "no"])
def test_parser_that_knows_the_label(label):
    right = {case["answer"]: yesno.PARSERS["vcd"](case["answer"], label) == label for case in CASES}
    assert right == {case["answer"]: case[f"vcd_correct_if_label_{label}"] for case in CASES}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yep", "yes"),
        ("It is not known.", None),
        ("I can't tell", None),
        ("One may say yes", "yes"),
        ("One cannot say yes", None),
        ("Nothing", "no"),
        ("NO!", "no"),
        ("It isn't", "no"),
        ("A knot", None),
    ],
)
def test_sentences(answer, expected):
    assert yesno.PARSERS["sentence"](answer, "yes") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("no-one", "no"), ("no-one - nobody", None), ("1,000 no-one", None), ("1, 000 no-one", "no")],
)
def test_vlmevalkit_deletes_signs_that_touch_a_blank_or_all_beside_a_grouped_number(answer, expected):
    assert yesno.PARSERS["vlmevalkit"](answer, "yes") == expected


def test_vlmevalkit_deletes_at_most_32_full_stops():
    assert yesno.PARSERS["vlmevalkit"]("." * 32 + "no", "yes") == "no"
    assert yesno.PARSERS["vlmevalkit"]("." * 33 + "no", "yes") is None


def test_parser_names_and_treatment():
    assert {name: parser.unparsed for name, parser in yesno.PARSERS.items()} == {
        **dict.fromkeys(("pope", "negword", "vcd", "vaf"), "never"),
        **dict.fromkeys(("lmms_eval", "vlmevalkit", "dashb", "amber", "mme", "mme_lmms_eval"), "wrong"),
        **dict.fromkeys(("strict", "sentence"), "wrong"),
        **dict.fromkeys(("repope", "icd"), "dropped"),
    }
    with pytest.raises(ValueError, match=r"did you mean 'strict'\?"):
        yesno.score_answers([], {}, "strct")


# Figures of the evaluators in use


def test_all_answer_files_are_there():
    assert len(FILES) == 12
    assert len(REAL) == 4


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("parser", "evaluator"),
    [("pope", "pope_evaluate_py"), ("negword", "opera_pai"), ("vcd", "vcd"), ("repope", "repope")],
)
def test_figures_as_in_the_reference(name, parser, evaluator):
    expected = reference(name)["metrics"][evaluator]
    scores = scored(name, parser)
    ours, sums = values(scores), summed(scores)
    if "error" in expected:  # the reference divides by zero; the same answers do not harm us
        assert np.isnan(ours["F1"])
        return
    assert [sums[key] for key in ("tp", "fp", "tn", "fn")] == [expected[key] for key in ("TP", "FP", "TN", "FN")]
    assert sums["dropped"] == expected.get("unparsed", 0)
    for metric in ("accuracy", "precision", "recall", "F1", "yes_ratio"):
        assert same(ours[metric], expected[metric.lower()]), metric


@pytest.mark.parametrize("name", PLAIN)
def test_figures_of_vlmevalkit(name):
    expected = reference(name)["metrics"]["vlmevalkit_exact_matching"]
    scores = scored(name, "vlmevalkit")
    ours = {metric: np.nan_to_num(value) for metric, value in values(scores).items()}  # 0 stands for undefined there
    for metric, key in (("accuracy", "acc"), ("precision", "precision"), ("recall", "recall"), ("F1", "Overall(F1)")):
        assert same(100 * ours[metric], expected[key]), metric
    assert summed(scores)["unknown"] == expected["unknown"]


@pytest.mark.parametrize("name", PLAIN)
def test_figures_of_lmms_eval(name):
    expected = reference(name)["metrics"]["lmms_eval_0.7.3"]
    scores = scored(name, "lmms_eval")
    ours, sums = values(scores), summed(scores)
    assert same(ours["accuracy"], expected["accuracy"])
    assert same(np.nan_to_num(ours["precision"]), expected["precision"])
    # its recall passes over answers that are neither; ours counts them as missed
    assert same(sums["tp"] / max(sums["tp"] + sums["fn"], 1), expected["recall"])


@pytest.mark.parametrize("name", PLAIN)
def test_every_prediction_as_in_the_reference(name):
    expected = reference(name)["pred"]
    for parser, key in (
        *(("pope", "pope_evaluate_py"), ("negword", "opera_pai"), ("vlmevalkit", "vlmevalkit")),
        *(("repope", "repope"), ("lmms_eval", "lmms_eval")),
    ):
        read = [score.prediction for score in scored(name, parser)]
        assert read == [p.lower() if p and p.lower() in ("yes", "no") else None for p in expected[key]], parser


@pytest.mark.parametrize("name", REAL)
def test_most_parsers_agree_on_real_answers(name):
    read = {parser: tuple(score.prediction for score in scored(name, parser)) for parser in yesno.PARSERS}
    agreeing = [read[parser] for parser in ("pope", "negword", "vcd", "repope", "vlmevalkit", "strict", "sentence")]
    assert len(set(agreeing)) == 1


@pytest.mark.parametrize(
    ("split", "printed"),
    [("random", ".8700 .8550 .3967"), ("popular", ".8590 .8447 .4077"), ("adversarial", ".8333 .8212 .4320")],
)
def test_printed_figures(split, printed):
    ours = values(scored(f"cd_rethink-llava7b-coco-{split}-greedy"))
    assert " ".join(f"{ours[metric]:.4f}"[1:] for metric in ("accuracy", "F1", "yes_ratio")) == printed


# Joining and counting


def test_answers_are_joined_by_id():
    ours = values(scored("synthetic-shuffled"))
    for key, expected in reference("synthetic-shuffled")["by_question_id"].items():
        if key.islower():
            assert ours["F1" if key == "f1" else key] == pytest.approx(expected)
    assert [score.question.id for score in scored("synthetic-shuffled")] == [
        q.id for q in questions("synthetic-shuffled")
    ]


def test_missing_doubled_and_unknown_answers_are_named():
    with pytest.raises(ValueError, match=r"1 questions have no answer.*\(ids: 3\)"):
        scored("synthetic-missing-answer")
    with pytest.raises(ValueError, match=r"1 questions have more than one answer.*\(ids: 2\)"):
        scored("synthetic-duplicate-answer")
    asked = questions("synthetic-all-yes")
    with pytest.raises(ValueError, match=r"1 questions have more than one answer.*\(ids: 1\)"):
        yesno.score_answers(asked, {**dict(answers("synthetic-all-yes")), "1": "yes"})
    with pytest.raises(ValueError, match=r"4 questions share their id.*\(ids: 1, 2, 3, 4\)"):
        yesno.score_answers([*asked, *asked], dict(answers("synthetic-all-yes")))
    with pytest.raises(ValueError, match=r"1 answers are no text.*\(ids: 2\)"):
        yesno.score_answers(asked, {**dict(answers("synthetic-all-yes")), 2: None})


def ask(*labels, image="x.jpg"):
    return [
        yesno.Question(n, image, pope_building.question_text("dog"), "dog", label, "random")
        for n, label in enumerate(labels)
    ]


def test_counts_by_hand():
    said = ("Yes.", "No.", "yes", "no", "maybe", "maybe")
    scores = yesno.score_answers(ask("yes", "yes", "no", "no", "yes", "no"), dict(enumerate(said)), "strict")
    assert summed(scores) == {
        **{"questions": 6, "predictions": 4, "yes_predictions": 2, "tp": 1, "fp": 1, "tn": 1, "fn": 1},
        **{"unknown": 2, "unknown_yes": 1, "dropped": 0, "pairs": 0, "pairs_right": 0},
    }
    assert values(scores) == pytest.approx(
        {"accuracy": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "F1": 0.4, "TNR": 1 / 3, "yes_ratio": 1 / 2, "MCC": 0}
    )
    dropping = yesno.score_answers(ask("yes", "yes", "no", "no", "yes", "no"), dict(enumerate(said)), "repope")
    assert summed(dropping)["dropped"] == 2
    assert values(dropping) == pytest.approx(
        {
            "accuracy": 1 / 2,
            "precision": 1 / 2,
            "recall": 1 / 2,
            "F1": 1 / 2,
            "TNR": 1 / 2,
            "yes_ratio": 1 / 2,
            "MCC": 0,
        }
    )


def test_mcc():
    said = ("yes",) * 3 + ("no",) + ("yes",) + ("no",) * 5
    scores = yesno.score_answers(ask(*("yes",) * 4, *("no",) * 6), dict(enumerate(said)))
    assert values(scores)["MCC"] == pytest.approx((3 * 5 - 1 * 1) / np.sqrt(4 * 4 * 6 * 6))


def test_undefined_figures_are_nan():
    assert all(np.isnan(value) for value in values([]).values())
    ours = values(scored("synthetic-all-no"))
    assert {metric for metric, value in ours.items() if np.isnan(value)} == {"precision", "F1", "MCC"}
    assert ours["accuracy"] == 0.5
    wrong = values(yesno.score_answers(ask("yes", "no"), {0: "no", 1: "yes"}))
    assert wrong["F1"] == 0
    assert wrong["MCC"] == -1


def test_counts_are_per_image():
    scores = scored("cd_rethink-llava7b-coco-random-greedy")
    names, columns = yesno.clusters(scores), yesno.counts(scores)
    assert len(names) == 500
    assert names[:2] == ["COCO_val2014_000000310196.jpg", scores[6].question.image]
    assert all(column.shape == (500,) and column.dtype == float for column in columns.values())
    assert (columns["questions"] == 6).all()
    for at in (0, 17, 499):
        alone = summed([score for score in scores if score.question.image == names[at]])
        assert alone == {name: column[at] for name, column in columns.items()}


def test_metrics_take_counts_of_any_shape():
    columns = yesno.counts(scored("cd_rethink-llava7b-coco-random-greedy"))
    draws = np.random.default_rng(0).integers(0, 500, (7, 500))
    resampled = {name: column[draws].sum(axis=1) for name, column in columns.items()}
    assert all(metric(resampled).shape == (7,) for metric in yesno.METRICS.values())


# Anything

WORDS = [
    "yes",
    "No",
    "not",
    "n't",
    " ",
    ".",
    ",",
    "!",
    "1,2",
    "\n",
    "'",
    "unsure",
    "\ud800",
    "İ",
    "`",
    "\\",
    "cannot tell",
]
ANY_TEXT = st.text(st.characters()) | st.lists(st.sampled_from(WORDS), max_size=20).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=6), st.sampled_from(list(yesno.PARSERS)))
def test_any_answers(said, parser):
    labels = [("yes", "no")[number % 2] for number in range(len(said))]
    scores = yesno.score_answers(ask(*labels), dict(enumerate(said)), parser)
    sums = summed(scores)
    assert all(score.prediction in ("yes", "no", None) for score in scores)
    assert sums["questions"] == sums["predictions"] + sums["unknown"] + sums["dropped"] == len(said)
    assert sums["predictions"] == sums["tp"] + sums["fp"] + sums["tn"] + sums["fn"]
    if yesno.PARSERS[parser].unparsed == "never":
        assert sums["predictions"] == len(said)
    assert all(np.isnan(value) or -1 <= value <= 1 for value in values(scores).values())
