"""Files as they are released: what they hold is scored, and what is ambiguous is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.eval.api import compare
from vlmfix.eval.benchmarks import pope_questions
from vlmfix.eval.benchmarks.benchmark import FileOptions, Group
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.benchmarks.pope import METRICS_OF_PARSERS, Pope, mean_of_splits
from vlmfix.eval.scorers import reading
from vlmfix.eval.scorers.chair import clusters, counts, score_captions


def written(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, entries)), "utf-8")
    return path


def chair_rows(*paths, **options):
    return compare(paths, benchmark="chair", options=FileOptions(**options), n_resamples=50)[0].rows


TRUTH = [{"image": "a/0001.jpg", "objects": ["dog"]}, {"image": "a/0002.jpg", "objects": ["cat"]}]


def test_images_are_joined_by_what_names_them(tmp_path):
    truth = str(written(tmp_path / "truth.jsonl", TRUTH))
    same = written(tmp_path / "same.jsonl", [{"image": "a/0001.jpg", "caption": "A dog."}])
    assert chair_rows(same, truth=truth)[0].estimates["CHAIR_S"].value == 0
    other = written(tmp_path / "other.jsonl", [{"image": "b/0001.jpg", "caption": "A dog."}])
    with pytest.raises(
        ValueError, match=r"caption is of 'b/0001.jpg', the objects under its number are of 'a/0001.jpg'"
    ):
        chair_rows(other, truth=truth)


@pytest.mark.parametrize("name", ["COCO_val2014_000000226988_9.jpg", "run2_9.jpg"])
def test_a_name_with_several_numbers_is_no_image_of_coco(tmp_path, name):
    path = written(tmp_path / "a.jsonl", [{"image": name, "caption": "A dog."}])
    with pytest.raises(ValueError, match="may be image 9 or another"):
        chair_rows(path)


def test_the_file_name_goes_before_the_number_of_the_line(tmp_path):
    entry = {"id": 42, "file_name": "COCO_val2014_000000226988.jpg", "caption": "A dog."}
    path = written(tmp_path / "a.jsonl", [entry])
    assert reading.read_captions(path) == [(226988, "A dog.")]
    assert reading.read_captions(path, image_under="id") == [(42, "A dog.")]
    path = written(tmp_path / "b.jsonl", [{**entry, "image_id": 42}])
    with pytest.raises(ValueError, match=r"names two images, image_id 42 and file_name 226988; say .* --image-key"):
        reading.read_captions(path)


def test_numbers_as_pandas_writes_them_and_what_chair_writes(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"image_id": 226988.0, "caption": "A dog."}])
    assert reading.read_captions(path) == [(226988, "A dog.")]
    sentences = [{"image_id": 42, "caption": "A dog.", "metrics": {"CHAIRs": 0}}, {"image_id": 73, "caption": "A cat."}]
    path = written(tmp_path / "b.json", [{"overall_metrics": {"CHAIRs": 0.1}, "sentences": sentences}])
    assert reading.read_captions(path) == [(42, "A dog."), (73, "A cat.")]


def test_several_captions_of_each_image(tmp_path):
    several = [(1, "A dog."), (2, "A dog."), (1, "A cat."), (2, "A cat.")]
    truth = str(written(tmp_path / "truth.jsonl", TRUTH))
    path = written(tmp_path / "a.jsonl", [{"image_id": image, "caption": text} for image, text in several])
    single = written(tmp_path / "b.jsonl", [{"image_id": image, "caption": text} for image, text in several[:2]])
    row, other = chair_rows(path, single, truth=truth)
    assert (row.n, row.answers, row.estimates["CHAIR_S"].value) == (2, 4, 0.5)
    assert (other.n, other.control) == (2, None)
    scores = score_captions(several, {1: frozenset({"dog"}), 2: frozenset({"cat"})}, several=True)
    assert clusters(scores) == [1, 2]
    assert counts(scores)["captions"].tolist() == [2, 2]
    uneven = written(tmp_path / "c.jsonl", [{"image_id": image, "caption": text} for image, text in several[:3]])
    with pytest.raises(ValueError, match=r"line 3 is of image 1, as is .*line 1; keep one entry per image"):
        reading.read_captions(uneven)


def test_pope_as_llava_lays_it_out(tmp_path):
    published = {split: pope_questions.load("coco", split)[:6] for split in pope_questions.SPLITS}
    asked = []
    for split, questions in published.items():
        annotations = [{"question_id": q.id, "image": q.image, "text": q.text, "label": q.label} for q in questions]
        written(tmp_path / "coco" / f"coco_pope_{split}.json", annotations)
        for q in questions:
            text = f"{q.text}\nAnswer the question using a single word or phrase."
            asked.append({"question_id": len(asked), "image": q.image, "text": text, "category": split})
    path = written(tmp_path / "llava_pope_test.jsonl", asked)
    labels = [q.label for questions in published.values() for q in questions]
    assert [q.label for q in pope_questions.read_questions(path)] == labels
    alone = written(tmp_path / "alone" / "llava_pope_test.jsonl", asked)  # the published labels
    assert [q.label for q in pope_questions.read_questions(alone)] == labels
    answers = [{"question_id": str(n), "text": label.title()} for n, label in enumerate(labels)]
    answers_path = written(tmp_path / "answers.jsonl", answers)
    comparison = compare([answers_path], benchmark="pope", options=FileOptions(questions=str(path)), n_resamples=50)[0]
    assert [(row.group, row.estimates["accuracy"].value) for row in comparison.rows] == [
        (split, 1.0) for split in (*pope_questions.SPLITS, "mean")
    ]
    written(tmp_path / "alone" / "llava_pope_test.jsonl", [{**asked[0], "image": "other.jpg"}])
    with pytest.raises(ValueError, match="no annotation of 'random' has its picture and object"):
        pope_questions.read_questions(alone)


def test_lmms_eval_passes_over_answers_that_are_neither():
    sums = {"tp": 3.0, "fn": 1.0, "unknown_yes": 4.0, "fp": 1.0, "tn": 2.0, "unknown": 6.0}
    metrics = METRICS_OF_PARSERS["lmms_eval"]
    assert metrics["recall"](sums) == metrics["F1"](sums) == 0.75
    assert metrics["yes_ratio"](sums) == pytest.approx(8 / 13)


def test_the_mean_of_popes_splits_is_that_of_their_figures():
    """F1 of .5 and 1 and 0 have the mean .5, whatever F1 all answers together have; images are joined by name."""
    groups = []
    for split, hits, named, images in (("random", 1, 2, "ab"), ("popular", 2, 2, "bc"), ("adversarial", 0, 2, "a")):
        one = {"tp": hits, "fp": named - hits, "fn": 2 - hits, "unknown_yes": 0}
        columns = {name: np.array([float(count), *[0.0] * (len(images) - 1)]) for name, count in one.items()}
        groups.append(Group(split, list(images), columns, scores=["an answer"]))
    *same, mean = mean_of_splits(groups)
    assert same == groups and (mean.name, mean.images) == ("mean", ["a", "b", "c"])
    f1 = Pope().metrics["F1"]
    assert [float(f1({n: c.sum() for n, c in group.counts.items()})) for group in groups] == [0.5, 1, 0]
    assert float(f1({n: c.sum() for n, c in mean.counts.items()})) == 0.5
    assert mean_of_splits(groups[:2]) == groups[:2]


def test_icd_drops_answers_that_are_neither_but_from_its_yes_ratio(tmp_path):
    """Two yes, one no, one that is neither: right are two of three, and yes are two of four."""
    asked = pope_questions.load("coco", "random")[:4]
    said = ["Yes", "Yes, it is", "No", "maybe"]
    records = [{"question_id": q.id, "answer": text} for q, text in zip(asked, said, strict=True)]
    keys = ("id", "image", "text", "label")
    lines = [dict(zip(("question_id", *keys[1:]), (q.id, q.image, q.text, q.label), strict=True)) for q in asked]
    options = FileOptions(questions=str(written(tmp_path / "q.jsonl", lines)), parser="icd")
    (comparison,) = compare([written(tmp_path / "a.jsonl", records)], benchmark="pope", options=options, n_resamples=50)
    estimates = comparison.rows[0].estimates
    right = sum(text.lower().startswith(q.label) for q, text in zip(asked, said, strict=True))
    assert estimates["accuracy"].value == pytest.approx(right / 3)
    assert estimates["yes_ratio"].value == 2 / 4


def test_an_empty_answer_is_counted_as_unparsed(tmp_path):
    questions = [{"id": n, "image": "a.jpg", "question": "Is there a dog?", "label": "yes"} for n in range(2)]
    asked = str(written(tmp_path / "questions.jsonl", questions))
    answers = written(tmp_path / "a.jsonl", [{"id": 0, "text": "Yes"}, {"id": 1, "text": " "}])
    options = FileOptions(questions=asked, parser="pope")
    assert compare([answers], benchmark="yesno", options=options, n_resamples=50)[0].rows[0].unparsed == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"id": 1, "text": "A dog."}, {"id": 1, "text": "A cat."}], r"1 pictures are described more than once.*'1'"),
        (
            [{"id": 1, "text": "A dog."}, {"id": 99999, "text": "A cat."}],
            r"1 entries belong to nothing in AMBER.*99999",
        ),
        ([{"id": 1, "margin": 0.5}], r"1 pictures have no description"),
    ],
)
def test_amber_descriptions_do_not_vanish(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        compare([written(tmp_path / "a.jsonl", entries)], benchmark="amber_captions", n_resamples=50)


def test_a_part_of_hallusionbench_is_scored_and_says_so(tmp_path):
    from vlmfix.eval.benchmarks.hallusionbench import load

    questions = load("with_image_951")[:40]
    path = written(tmp_path / "a.jsonl", [{"id": q.id, "text": q.label} for q in questions])
    comparison = compare([path], benchmark="hallusionbench", n_resamples=50)[0]
    assert comparison.rows[0].estimates["aAcc"].value == 1
    assert any("partial: 40 of 951 questions are answered" in note for note in comparison.notes)


def test_mme_as_llava_logs_it(tmp_path):
    from vlmfix.eval.benchmarks import mme

    lines = [f"{n}.jpg\tIs there a {name}? Please answer yes or no.\t{label}" for n in range(2) for name, label in
             (("dog", "Yes"), ("cat", "No"))]  # fmt: skip
    for task in mme.TASKS:
        (tmp_path / f"{task}.txt").write_text("\n".join(lines), "utf-8")
    log = [{"question_id": "OCR/1.jpg", "prompt": "Is it x?", "text": "Yes"}]
    for question in mme.load(tmp_path):
        prompt = question.text.replace(" Please answer yes or no.", "\nAnswer with a single word.")
        name = f"{question.group}/{question.image}"
        log.append({"question_id": name, "prompt": prompt, "text": question.label.title()})
    path = written(tmp_path / "log" / "llava.jsonl", log)
    comparison = compare([path], benchmark="mme", options=FileOptions(questions=str(tmp_path)), n_resamples=50)[0]
    assert [row.estimates["score"].value for row in comparison.rows] == [200] * 4
    assert any("1 answers to other tasks of MME left out" in note for note in comparison.notes)


def test_invented_mentions_per_100_words_by_hand():
    """One of two mentions is invented, in 4 + 16 words."""
    figure = Chair.figures["invented"].formula
    assert float(figure({"hallucinated_mentions": 1.0, "words": 20.0})) == 5.0


def test_calibrating_and_testing_on_the_same_pictures_is_refused(tmp_path):
    header = {"label": "none", "identity": {"benchmark": "pope", "data": "organism", "data_digest": "x", "method": []}}
    for name in ("a", "b"):
        written(tmp_path / name / "records.jsonl", [])
        (tmp_path / name / "run.json").write_text(json.dumps(header))
    done = CliRunner().invoke(app, ["calibrate", "yesno", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 1 and "both runs are about the same pictures" in done.output
