"""POPE: is there a ... in the image? No torch.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355. Questions
are the published ones (`pope_questions`) or built from annotations as the authors do (`pope_building`). Evaluators in
use read the same answers in different ways, so the parser is part of every figure's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmfix.eval.benchmarks.benchmark import FileAnswers, FileOptions, Group
from vlmfix.eval.benchmarks.pope_building import build_questions
from vlmfix.eval.benchmarks.pope_questions import SOURCES, SPLITS, edition, load, read_questions, relabel
from vlmfix.eval.benchmarks.questions import YesNo
from vlmfix.eval.pictures import hub
from vlmfix.eval.pictures.data import Data, OriginalFolder, PublishedPictures
from vlmfix.eval.pictures.lists import image_list
from vlmfix.eval.scorers import chair, yesno
from vlmfix.eval.scorers.reading import about_file
from vlmfix.eval.scorers.stats import Metric, f1, ratio
from vlmfix.eval.scorers.yesno import Question, labelled_no


def _labelled_yes(n: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(n["tp"], dtype=float) + n["fn"] + n["unknown_yes"]


METRICS_OF_PARSERS: Mapping[str, Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]]] = {
    "lmms_eval": {
        "recall": lambda n: ratio(n["tp"], n["tp"] + n["fn"]),
        "F1": lambda n: f1(n["tp"], n["tp"] + n["fp"], n["tp"] + n["fn"]),
        "yes_ratio": lambda n: ratio(_labelled_yes(n), _labelled_yes(n) + labelled_no(n)),
    },
    "icd": {"yes_ratio": lambda n: ratio(n["yes_predictions"], n["questions"])},
}
"""Figures that an evaluator computes in another way than all others. lmms-eval 0.7.3: its recall passes over wrong
answers that say neither yes nor no, and its yes ratio is that of the labels. ICD: answers that say neither leave every
figure but the yes ratio."""


MEAN = "mean"
"""In tables: the mean of the splits' figures, which papers print as POPE's."""


def mean_of_splits(groups: Sequence[Group]) -> list[Group]:
    """The splits, and their mean if all three are there. Its counts stand under `split/name`."""
    splits = {group.name: group for group in groups if group.scores}
    if set(splits) != set(SPLITS):
        return list(groups)
    images = list(dict.fromkeys(image for group in splits.values() for image in group.images))
    place_of = {image: place for place, image in enumerate(images)}
    counts: dict[str, np.ndarray] = {}
    scores: list[Any] = []
    for split, group in splits.items():
        places = [place_of[image] for image in group.images]
        scores += group.scores
        for name, column in group.counts.items():
            counts[f"{split}/{name}"] = yesno.add_up(places, column.tolist(), len(images))
    return [*groups, Group(MEAN, images, counts, scores, is_summary=True)]


def _over_splits(metric: Metric) -> Metric:
    """A figure of one split, or the mean of the splits' figures where counts are of several."""

    def figure(counts: Mapping[str, np.ndarray]) -> np.ndarray:
        splits = dict.fromkeys(name.partition("/")[0] for name in counts if "/" in name)
        if not splits:
            return metric(counts)
        of_split = []
        for split in splits:
            start = f"{split}/"
            of_split.append(metric({n.removeprefix(start): c for n, c in counts.items() if n.startswith(start)}))
        return np.mean(of_split, axis=0)

    return figure


class Pope(YesNo):
    """Three splits, which differ in how the absent objects are drawn."""

    name, heading, parser = "pope", "POPE", "pope"
    file_options = ("parser", "source", "split", "questions", "labels", "key")

    def __init__(self, scoring: str = "", prompt: str = "{question}") -> None:
        super().__init__(scoring, prompt)
        self.file_questions: Sequence[Question] = ()
        """What answers in files answer."""
        self.kept_questions: Sequence[Question] = ()
        """Those of them that are scored, with their labels."""
        self.other_labels = ""
        """The edition of the labels, where they are not those of the questions."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """Those of `METRICS_OF_PARSERS` as that evaluator computes them."""
        metrics = {**super().metrics, **METRICS_OF_PARSERS.get(self.scoring, {})}
        return {name: _over_splits(metric) for name, metric in metrics.items()}

    # A run

    @property
    def asking(self) -> dict[str, Any]:
        """How questions are built where they are not published."""
        return {"prompt": self.prompt, "seed": 0, "positives_per_image": 3}

    def load(self, data: Data) -> Sequence[Question]:
        """The questions about some data: as published, as they lie in its folder, or built from its annotations."""
        if isinstance(data, PublishedPictures):
            return _published(data)
        if isinstance(data, OriginalFolder):
            return _of_folder(data)
        return build_questions(_objects(data), k=self.asking["positives_per_image"], seed=self.asking["seed"])

    def coverage(self, data: Data) -> list[str]:
        """How many pictures have too few objects to be asked about, where questions are built; how many of a list have
        published questions."""
        n_asked = len({question.image for question in self.questions(data)})
        if isinstance(data, OriginalFolder) or (isinstance(data, PublishedPictures) and data.which is None):
            return []
        published = isinstance(data, PublishedPictures)
        n = len(data.images) if data.which is None or not published else len(image_list(data.which)[: data.limit])
        fewest = self.asking["positives_per_image"]
        why = "has published questions" if published else f"has {fewest} different objects"
        return [f"questions on {n_asked} of {n} pictures: no other one {why}"] if n_asked < n else []

    @staticmethod
    def item_id(question: Question) -> str:
        """Positives are the same in all splits, and asked once."""
        return f"{question.image}|{question.text}"

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """The three splits."""
        groups = yesno.by_group(scores)
        return {split: groups.get(split, []) for split in SPLITS}

    def score(self, data: Data, answers: Mapping[str, Any]) -> list[Group]:
        """Counts per picture of each split, and their mean."""
        return mean_of_splits(super().score(data, answers))

    # Files of answers

    @property
    def edition(self) -> str:
        """Source and split of published questions, and whose labels they have."""
        name = edition(self.file_questions)
        return f"{name}, labels {self.other_labels}" if self.other_labels else name

    @property
    def facts(self) -> dict[str, Any]:
        """The parser, and for files the edition of the questions and of the labels."""
        if self.options is None:
            return super().facts
        labels = {"labels": self.other_labels} if self.other_labels else {}
        return {**super().facts, "edition": edition(self.file_questions), **labels}

    def prepare_files(self, options: FileOptions) -> None:
        """Find the questions: published ones by source and split, or those of a file; and other labels for them."""
        super().prepare_files(options)
        both_or_neither = (options.questions is None) == (options.split is None)
        if both_or_neither or (options.questions is not None and options.source is not None):
            raise ValueError(
                f"which questions of POPE were asked? Give either --split ({', '.join(SPLITS)}), with --source "
                f"({', '.join(SOURCES)}) if it is not coco, or --questions FILE."
            )
        if options.questions is None:
            self.file_questions = load("coco" if options.source is None else options.source, options.split or "")
        else:
            with about_file(options.questions):
                self.file_questions = read_questions(options.questions)
                yesno.check_ids(self.file_questions)
        self.kept_questions = self.file_questions
        if options.labels is not None:
            with about_file(options.labels):
                labels = read_questions(options.labels)
                self.kept_questions, self.other_labels = relabel(self.file_questions, labels), edition(labels)

    def read(self, path: Path) -> FileAnswers:
        """One answer for each question; those to questions without a label are left out."""
        answers = self.read_answers(path)
        scores = self.judge(self.file_questions, answers)
        if self.other_labels:
            kept_ids = {question.id for question in self.kept_questions}
            scores = self.judge(self.kept_questions, [answer for answer in answers if answer.id in kept_ids])
        return self.file_answers(scores)

    def file_groups(self, scores: Sequence[Any]) -> list[Group]:
        """The groups that the questions of the file name, mostly one split, and the mean of all three."""
        return mean_of_splits([self.group(name, part) for name, part in yesno.by_group(scores).items()])


def _objects(data: Data) -> list[tuple[str, tuple[str, ...]]]:
    """The pictures that are asked about, by the names that the annotations give them, with their objects in order."""
    images = chair.instance_categories(data.folder / "instances.json")
    keys = data.images.keys()
    return [(image["file_name"], names) for image, names in images if chair.image_key(image["id"]) in keys]


def _published(data: Data) -> list[Question]:
    """The published questions on the pictures that are asked about, with ids that are unique over the three splits."""
    questions = []
    for split in SPLITS:
        questions += [replace(question, id=f"{split}/{question.id}") for question in load(data.name, split)]
    pictures = list(dict.fromkeys(question.image for question in questions))
    if data.which is not None:
        listed = set(image_list(data.which))
        pictures = [picture for picture in pictures if chair.image_key(picture) in listed]
    first_pictures = set(pictures[: data.limit])
    return [question for question in questions if question.image in first_pictures]


def _of_folder(data: Data) -> list[Question]:
    """The questions in a folder: the file given, or a file of each split (`coco_pope_random.json`)."""
    questions: list[Question] = []
    if data.asked is not None or (data.folder / hub.QUESTIONS).exists():
        questions = read_questions(data.asked or data.folder / hub.QUESTIONS)
    else:
        for split in SPLITS:
            for path in sorted(data.folder.glob(f"*{split}*.json*")):
                questions += read_questions(path, split=split)
    if not questions or {question.split for question in questions} - set(SPLITS):
        raise ValueError(
            f"data {data.name!r}: {data.folder / 'instances.json'} does not exist, and there are no questions of "
            f"POPE that name their split ({', '.join(SPLITS)}), in a category or in the name of their file"
        )
    pictures = dict.fromkeys(question.image for question in questions)
    first_pictures = set(list(pictures)[: data.limit])
    return [
        replace(question, id=f"{question.split}/{question.id}")
        for question in questions
        if question.image in first_pictures
    ]
