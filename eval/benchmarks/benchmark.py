"""Benchmarks: what is asked, and how the answers are scored. No torch.

| name | asks | scored by | pictures |
|---|---|---|---|
| `chair` | one description a picture | `chair` | scenes, photos, your folder, coco |
| `pope` | is there a ... in the image? | `pope` | the same, and those of its published questions |
| `amber`, `amber_captions` | questions; one description a picture | `amber`, `amber_captions` | yours |
| `mme`, `hallusionbench`, `dashb` | questions | `mme`, `hallusion`, `dash` | yours |
| `yesno` | questions of your own | `yesno` | yours |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from vlmfix.eval.benchmarks import amber, amber_captions, dash, hallusion, mme, pope
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import chair, yesno
from vlmfix.eval.scorers.chair import variants
from vlmfix.eval.scorers.stats import Metric, ratio
from vlmfix.method.settings import did_you_mean


@dataclass(frozen=True)
class Item:
    """One question to a model."""

    id: str
    image: str
    """Path of the picture."""
    prompt: str


@dataclass(frozen=True)
class Group:
    """Answers that are scored together, as counts per image."""

    name: str
    images: list[Any]
    counts: dict[str, np.ndarray]
    scores: Sequence[Any] = ()
    """Each answer, as it was read and judged."""


Columns = Mapping[str, tuple[str, float]]
"""Metrics that a table shows: name -> unit printed behind it, and factor."""


def _percent(*names: str) -> dict[str, tuple[str, float]]:
    return {name: ("%", 100.0) for name in names}


class Benchmark:
    """A set of questions, with its scorer."""

    name: ClassVar[str]
    columns: ClassVar[Columns]
    """Metrics that the table shows: name -> unit printed behind it, and factor."""
    metrics: ClassVar[Mapping[str, Metric]]
    max_new_tokens: ClassVar[int]
    running: ClassVar[str] = ""
    """The metric that is shown while answers come in."""
    where: ClassVar[str] = ""
    """Where pictures can be had that may not come with the package."""

    def __init__(self, scoring: str, prompt: str) -> None:
        self.scoring = scoring
        """How answers are judged: CHAIR's variant, a parser. Chosen anew whenever answers are scored."""
        self.prompt = prompt
        """What is asked; `{question}` stands for the question where each picture has its own."""
        self.notes: list[str] = []
        """What a reader must know about the scoring."""

    @property
    def title(self) -> str:
        """As printed; names the variant of the metric."""
        raise NotImplementedError

    @property
    def asking(self) -> dict[str, Any]:
        """What fixes the questions: prompt, seed ... Part of a run's identity."""
        return {"prompt": self.prompt}

    def items(self, data: Data) -> list[Item]:
        """All questions, none twice."""
        raise NotImplementedError

    def said(self, record: Mapping[str, Any]) -> Any:
        """What is scored of a record: its text."""
        return record["text"]

    def score(self, data: Data, answers: Mapping[str, Any]) -> list[Group]:
        """Score the answers given (item id -> what `said` gives); questions without an answer are left out."""
        raise NotImplementedError


class Chair(Benchmark):
    """CHAIR on one detailed description per picture."""

    name = "chair"
    columns: ClassVar[Columns] = {
        **_percent("CHAIR_S", "CHAIR_I", "CHAIR_I_unique", "recall", "F1"),
        **{"objects": ("", 1.0), "words": ("", 1.0), "repetition": ("%", 100.0)},
    }
    metrics: ClassVar[Mapping[str, Metric]] = {
        **{name: chair.METRICS[name] for name in ("CHAIR_S", "CHAIR_I", "CHAIR_I_unique", "recall", "precision", "F1")},
        "objects": lambda n: ratio(n["unique_mentions"], n["captions"]),
        "mentions": lambda n: ratio(n["mentions"], n["captions"]),
        **{name: chair.METRICS[name] for name in ("words", "repetition")},
    }
    max_new_tokens = 512
    running = "CHAIR_S"
    PROMPT = "Please describe this image in detail."

    def __init__(self, variant: str = "rohrbach", prompt: str = PROMPT) -> None:
        variants.check_variant(variant)
        variant, line = variants.best_opera() if variant == "opera" else (variant, "")
        super().__init__(variant, prompt)
        self.notes += [line] if line else []

    @property
    def title(self) -> str:
        """CHAIR and the variant."""
        return f"CHAIR ({chair.label(self.scoring)})"

    def items(self, data: Data) -> list[Item]:
        """One description per picture."""
        return [Item(str(key), str(path), self.prompt) for key, path in data.images.items()]

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Counts per caption."""
        truth = data.truth_for(self.scoring)
        scores = chair.score_captions(list(answers.items()), truth, data.vocabulary, self.scoring)
        return [Group("", chair.clusters(scores), chair.counts(scores), scores)]


class YesNo(Benchmark):
    """Questions with the answer yes or no. A parser reads the answers, or `margin` the first token's probabilities."""

    heading: ClassVar[str]
    columns: ClassVar[Columns] = {
        **_percent("accuracy", "precision", "recall", "F1", "yes_ratio"),
        "MCC": ("", 1.0),
    }
    metrics: ClassVar[Mapping[str, Metric]] = yesno.METRICS
    max_new_tokens = 8
    running = "accuracy"
    parser: ClassVar[str]
    """The default."""
    counting: ClassVar[Any] = yesno
    """Module with the `clusters` and `counts` of its scores."""

    def __init__(self, parser: str = "", prompt: str = "{question}") -> None:
        parser = parser or self.parser
        if parser not in (*yesno.PARSERS, yesno.MARGIN):
            raise ValueError(f"unknown parser {parser!r}; {did_you_mean(parser, (*yesno.PARSERS, yesno.MARGIN))}")
        if "{question}" not in prompt:
            raise ValueError(f"prompt: expected {{question}} in it, where the question goes, got {prompt!r}")
        super().__init__(parser, prompt)
        self._known: dict[Data, Sequence[Any]] = {}
        self._places: dict[Data, dict[str, list[int]]] = {}
        if parser != self.parser:
            self.notes.append(f"parser {parser}: {yesno.rule(parser)}")

    @property
    def title(self) -> str:
        """The benchmark, and the parser if it is not the default."""
        return self.heading if self.scoring == self.parser else f"{self.heading} (parser {self.scoring})"

    def questions(self, data: Data) -> Sequence[Any]:
        """All questions, in order."""
        if data not in self._known:
            self._known[data] = self.load(data)
        return self._known[data]

    def load(self, data: Data) -> Sequence[Any]:
        """Find the questions."""
        raise NotImplementedError

    @staticmethod
    def item_id(question: yesno.Question) -> str:
        """The item that asks a question."""
        return str(question.id)

    @staticmethod
    def file(question: yesno.Question) -> str:
        """The question's picture, below the folder of pictures."""
        return question.image

    def items(self, data: Data) -> list[Item]:
        """Each different question once."""
        found: dict[str, Item] = {}
        for question in self.questions(data):
            key = self.item_id(question)
            if key not in found:
                asked = self.prompt.replace("{question}", question.text)
                found[key] = Item(key, str(data.picture(self.file(question))), asked)
        return list(found.values())

    def said(self, record: Mapping[str, Any]) -> Any:
        """The text, or how much likelier yes was than no as the first token."""
        if self.scoring != yesno.MARGIN:
            return record["text"]
        first = record.get("first_token")
        if not first or not {"yes", "no"} <= first.keys():
            raise ValueError(
                f"answer {record.get('id')!r} has no first_token probabilities; ask again, or take a parser"
            )
        return first["yes"] - first["no"]

    def score(self, data: Data, answers: Mapping[str, Any]) -> list[Group]:
        """Counts per picture, for each group of questions."""
        questions = self.questions(data)
        if data not in self._places:
            places = self._places[data] = {}
            for at, question in enumerate(questions):
                places.setdefault(self.item_id(question), []).append(at)
        asked = [questions[at] for at in sorted(at for key in answers for at in self._places[data].get(key, ()))]
        said = {question.id: answers[self.item_id(question)] for question in asked}
        scores = self.judge(asked, said)
        return [
            Group(name, self.counting.clusters(part), self.counting.counts(part), part)
            for name, part in self.parts(scores).items()
        ]

    def judge(self, asked: Sequence[Any], said: Mapping[Any, Any]) -> Sequence[Any]:
        """Read the answers to these questions, given by their ids."""
        if self.scoring == yesno.MARGIN:
            return yesno.score_margins(asked, said)
        return yesno.score_answers(asked, said, self.scoring)

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """Scores that have figures of their own, by name."""
        return yesno.by_group(scores)


class Pope(YesNo):
    """POPE: is there a ... in the image? Three splits, published or built by the reference's samplers."""

    name, heading, parser = "pope", "POPE", "pope"

    @property
    def asking(self) -> dict[str, Any]:
        """How questions are built where they are not published."""
        return {"prompt": self.prompt, "seed": 0, "positives_per_image": 3}

    def load(self, data: Data) -> Sequence[Any]:
        """All questions of the three splits, from pictures with enough objects."""
        return data.questions(self.asking["positives_per_image"], self.asking["seed"])

    @staticmethod
    def item_id(question: yesno.Question) -> str:
        """Positives are the same in all splits, and asked once."""
        return f"{question.image}|{question.text}"

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """The three splits."""
        found = yesno.by_group(scores)
        return {split: found.get(split, []) for split in pope.SPLITS}


class _Original(YesNo):
    """Questions that come with the package or in the original files; the pictures lie in the data's folder."""

    def load(self, data: Data) -> Sequence[Any]:
        """All questions, on the first pictures if there is a limit."""
        found = self.read(data)
        if data.limit is None:
            return found
        kept = set(list(dict.fromkeys(self.file(question) for question in found))[: data.limit])
        return [question for question in found if self.file(question) in kept]

    def read(self, data: Data) -> Sequence[Any]:
        """All questions."""
        raise NotImplementedError


class Amber(_Original):
    """AMBER, questions on existence, attributes and relations; "no" is the positive class."""

    name, heading, parser = "amber", "AMBER", "strict"
    metrics = amber.METRICS
    where = "the pictures of AMBER are linked at https://github.com/junyangwang0410/AMBER"

    def read(self, data: Data) -> Sequence[Any]:
        """The 14,216 questions."""
        return amber.load()

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All, and each kind of question that was asked."""
        return {name: part for name, part in amber.groups(scores).items() if part}


class Mme(_Original):
    """MME: existence, count, position and color, two questions a picture."""

    name, heading, parser = "mme", "MME", "mme"
    columns: ClassVar[Columns] = {
        **{"score": ("", 1.0)},
        **_percent("accuracy", "accuracy_plus", "precision", "recall", "yes_ratio"),
        **{"MCC": ("", 1.0)},
    }
    metrics = mme.METRICS
    where = (
        "pictures and questions of MME are given out by its authors: "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation"
    )

    def read(self, data: Data) -> Sequence[Any]:
        """The questions in the folder of the data."""
        return mme.load(data.asked or data.folder)

    @staticmethod
    def file(question: yesno.Question) -> str:
        """Pictures lie in the folder of their task."""
        return f"{question.group}/{question.image}"


class HallusionBench(_Original):
    """HallusionBench by string matching: its 951 questions on figures."""

    name, heading, parser = "hallusionbench", "HallusionBench with_image_951 by string matching", "sentence"
    columns: ClassVar[Columns] = _percent("aAcc", "fAcc", "qAcc", "easy", "hard", "consistency")
    metrics = hallusion.METRICS
    max_new_tokens = 64
    running = "aAcc"
    counting: ClassVar[Any] = hallusion
    where = "the figures of HallusionBench are linked at https://github.com/tianyi-lab/HallusionBench"

    def read(self, data: Data) -> Sequence[Any]:
        """Those that come with the package."""
        return hallusion.load()

    def judge(self, asked: Sequence[Any], said: Mapping[Any, Any]) -> Sequence[Any]:
        """By the official counting."""
        if self.scoring == yesno.MARGIN:
            raise ValueError("HallusionBench is counted from texts; give a parser, not the margin.")
        return hallusion.score(asked, said, self.scoring)

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All, VD and VS."""
        return all_and_groups(scores)


class DashB(_Original):
    """DASH-B: pictures in which models see an object that is not there."""

    name, heading, parser = "dashb", "DASH-B", "dashb"
    columns: ClassVar[Columns] = {
        **_percent("accuracy", "TPR", "TNR", "harmonic_mean", "yes_ratio"),
        "MCC": ("", 1.0),
    }
    metrics = dash.METRICS
    where = "lists and pictures of DASH-B are linked at https://github.com/YanNeu/DASH-B"

    def read(self, data: Data) -> Sequence[Any]:
        """Those of the authors' list."""
        return dash.load(data.question_file("the authors' list of DASH-B"))

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All objects together."""
        return {"": scores}


class Own(_Original):
    """Questions of one's own: `{"id", "image", "question", "label", "group"?, "pair"?}`."""

    name, heading, parser = "yesno", "yes/no", "strict"
    metrics = yesno.PAIR_METRICS
    columns: ClassVar[Columns] = {**YesNo.columns, **_percent("pair_accuracy")}

    def read(self, data: Data) -> Sequence[Any]:
        """Those of the file."""
        return yesno.read_questions(data.question_file("a file with id, image, question and label"))

    def parts(self, scores: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All, and each group."""
        return all_and_groups(scores)


def all_and_groups(scores: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """All scores together, and each group of them if there are several."""
    groups = yesno.by_group(scores)
    return {**({"all": scores} if len(groups) != 1 else {}), **groups}


class AmberCaptions(Benchmark):
    """AMBER, one description a picture, with the objects that the tagger of NLTK finds in it."""

    name = "amber_captions"
    columns: ClassVar[Columns] = _percent("CHAIR", "Cover", "Hal", "Cog")
    metrics = amber_captions.METRICS
    max_new_tokens = 512
    where = Amber.where

    def __init__(self, similarity: str = "off", prompt: str = "{question}") -> None:
        if similarity != "off" and not similarity.startswith("spacy:"):
            raise ValueError(
                f"similarity: expected off or spacy:<model>, such as spacy:en_core_web_lg, got {similarity!r}"
            )
        super().__init__(similarity, prompt)
        if similarity == "off":
            self.notes.append("only equal words match (similarity off), so these are not the figures of AMBER's paper")

    @property
    def title(self) -> str:
        """The benchmark, and what its figures depend on."""
        return f"AMBER captions (nouns nltk, similarity {self.scoring})"

    def items(self, data: Data) -> list[Item]:
        """One description a picture."""
        return [
            Item(str(item.id), str(data.picture(item.image)), self.prompt.replace("{question}", item.prompt))
            for item in _amber_pictures()[: data.limit]
        ]

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Counts per picture. `ValueError` without NLTK and its data."""
        items = [item for item in _amber_pictures()[: data.limit] if str(item.id) in answers]
        nouns = amber_captions.nltk_nouns({item.id: answers[str(item.id)] for item in items})
        scores = amber_captions.score(items, nouns, self.scoring)
        return [Group("", amber_captions.clusters(scores), amber_captions.counts(scores), scores)]


@cache
def _amber_pictures() -> list[amber_captions.Item]:
    return amber_captions.load()


_ALL: Iterable[type[Any]] = (Chair, Pope, Amber, AmberCaptions, Mme, HallusionBench, DashB, Own)
BENCHMARKS: dict[str, Callable[..., Benchmark]] = {cls.name: cls for cls in _ALL}


def benchmark(name: str, scoring: str | None = None, prompt: str | None = None) -> Benchmark:
    """A benchmark by name, asked and scored in its default way or as told. `ValueError` if there is none.

    `scoring` is CHAIR's variant, a parser of yes and no, or AMBER's similarity; `prompt` what is asked.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; {did_you_mean(name, BENCHMARKS)}")
    given = ([] if scoring is None else [scoring], {} if prompt is None else {"prompt": prompt})
    return BENCHMARKS[name](*given[0], **given[1])
