"""CHAIR: one detailed description a picture, and which of the objects in it are made up.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156. The scorer is
`vlmfix.eval.scorers.chair`; the ground truth comes with the data of a run, and for files from `FileOptions.truth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.eval.benchmarks.benchmark import Benchmark, Figure, FileAnswers, FileOptions, Group, Item
from vlmfix.eval.pictures.data import Data, Elsewhere
from vlmfix.eval.scorers import chair, reading
from vlmfix.eval.scorers.chair import METRICS, CaptionScore, GroundTruth, Vocabulary, variants
from vlmfix.eval.scorers.reading import NamedCaption, about_file, printable
from vlmfix.eval.scorers.stats import ratio
from vlmfix.eval.scorers.truncation import Against

PROMPT = "Please describe this image in detail."


class Chair(Benchmark):
    """CHAIR on one detailed description per picture."""

    name = "chair"
    figures: ClassVar[Mapping[str, Figure]] = {
        "CHAIR_S": Figure(METRICS["CHAIR_S"], "captions that name anything that is not there", "less"),
        "CHAIR_I": Figure(METRICS["CHAIR_I"], "mentions of objects that are not there", "less"),
        "CHAIR_I_unique": Figure(METRICS["CHAIR_I_unique"], "the same, each object once a caption", "less"),
        "recall": Figure(METRICS["recall"], "objects in the pictures that are named", "more"),
        "precision": Figure(METRICS["precision"], "objects named that are there", "more", shown=False),
        "F1": Figure(METRICS["F1"], "harmonic mean of precision and recall", "more"),
        "objects": Figure(lambda n: ratio(n["unique_mentions"], n["captions"]), "different objects a caption", unit=""),
        "mentions": Figure(
            lambda n: ratio(n["mentions"], n["captions"]), "mentions of objects a caption", unit="", shown=False
        ),
        "invented": Figure(
            lambda n: 100 * ratio(n["hallucinated_mentions"], n["words"]),
            "mentions of absent objects per 100 words: the rate of a Poisson process with the length as its exposure",
            "less",
            unit="",
            shown=False,
        ),
        "words": Figure(METRICS["words"], "words a caption", unit=""),
        "repetition": Figure(
            METRICS["repetition"], "captions that repeat themselves: over a fifth of their 4-grams", "less"
        ),
    }
    headline = ("CHAIR_S", "recall", "F1", "repetition")
    max_new_tokens = 512
    describes = True
    running = "CHAIR_S"
    scoring_option = "variant"
    file_options = ("variant", "truth", "synonyms", "key", "image_key")

    def __init__(self, scoring: str = "rohrbach", prompt: str = PROMPT) -> None:
        variants.check_variant(scoring)
        stand_in = ""
        if scoring == "opera":
            scoring, stand_in = variants.best_opera()
        super().__init__(scoring, prompt)
        if stand_in:
            self.notes.append(stand_in)
        self.file_truth = GroundTruth({}, None, "")
        """Ground truth of files of captions."""
        self.file_vocabulary: Vocabulary | None = None
        """Objects and synonyms of files of captions; COCO's if None."""

    @property
    def label(self) -> str:
        """The variant, as it stands in titles: it also tells which ground truth it was used with."""
        return chair.label(self.scoring) if self.options is None else chair.label(self.scoring, self.file_truth)

    @property
    def title(self) -> str:
        """CHAIR and the variant."""
        return f"CHAIR ({self.label})"

    @property
    def facts(self) -> dict[str, Any]:
        """The variant, and for files the ground truth."""
        origin = {} if self.options is None else {"truth": printable(self.file_truth.source)}
        return {"variant": self.label, **origin}

    def items(self, data: Data) -> list[Item]:
        """One description per picture."""
        return [Item(str(key), str(path), self.prompt) for key, path in data.images.items()]

    def check(self, data: Data) -> None:
        """Every picture has its objects, and all of them are in the vocabulary."""
        truth = data.truth_for(self.scoring)
        chair.label(self.scoring, truth)  # raises where the variant does not go with this ground truth
        unknown = [key for key in data.images if key not in truth]
        if unknown:
            raise ValueError(f"{len(unknown)} of {len(data.images)} pictures, such as {unknown[0]}, are not annotated")

    def score(self, data: Data, answers: Mapping[str, str]) -> list[Group]:
        """Counts per caption."""
        truth = data.truth_for(self.scoring)
        scores = chair.score_captions(list(answers.items()), truth, data.vocabulary, self.scoring)
        return [_group(scores)]

    def explain(self, score: CaptionScore) -> dict[str, Any]:
        """Every mention of an object, and whether the object is there."""
        return chair.explain(score)

    def against(self, data: Data, base: Sequence[Group]) -> Against | None:
        """The baseline's captions, to be cut to the recall of others; None if no picture of theirs has an object."""
        captions = base[0].scores
        if not any(score.truth for score in captions) or len(chair.clusters(captions)) < len(captions):
            return None
        if isinstance(data, Elsewhere):
            return Against(captions, self.file_vocabulary, self.scoring)
        return Against(captions, data.vocabulary, self.scoring)

    def prepare_files(self, options: FileOptions) -> None:
        """Find the ground truth, and read the synonyms."""
        super().prepare_files(options)
        if options.synonyms is not None:
            with about_file(options.synonyms):
                self.file_vocabulary = Vocabulary.load(options.synonyms)
        place = "coco" if options.truth is None else options.truth
        with about_file(place):
            self.file_truth = reading.find_truth(place, self.scoring, self.file_vocabulary)
        chair.label(self.scoring, self.file_truth)  # raises where the variant does not go with this ground truth
        if self.file_truth.variant is None:
            origin = printable(self.file_truth.source)
            self.notes.append(f"{origin}: objects as annotated, no human captions were read")

    def read(self, path: Path) -> FileAnswers:
        """Captions by image, in the formats of `reading.read_captions`."""
        options = self.options or FileOptions()
        captions = reading.named_captions(path, options.key, options.image_key)
        self._check_names(captions)
        pairs = [(caption.image, caption.text) for caption in captions]
        scores = chair.score_captions(pairs, self.file_truth, self.file_vocabulary, self.scoring, several=True)
        n_empty = sum(not score.words for score in scores)
        remarks = [f"{n_empty} of {len(scores)} captions are empty"] if n_empty else []
        n_images = len(chair.clusters(scores))
        if n_images < len(scores):
            remarks.append(
                f"{len(scores)} captions of {n_images} images: figures are means over all captions, intervals draw "
                "images with all of theirs, and there is no truncation control"
            )
        records = [{"id": str(score.image_id), "text": score.caption} for score in scores]
        return FileAnswers(records, [_group(scores)], remarks)

    def _check_names(self, captions: Sequence[NamedCaption]) -> None:
        """`ValueError` where an image's name is not the one that the ground truth knows its number by."""
        name_of = self.file_truth.names
        for caption in captions:
            name = name_of.get(caption.image)
            if name is not None and not reading.same_name(name, caption.name):
                raise ValueError(
                    f"a caption is of {reading.shown(caption.name)}, the objects under its number are of "
                    f"{reading.shown(name)}; give images the same names in both, or name another key with --image-key."
                )
            if not name_of and not reading.names_coco_image(caption.name):
                raise ValueError(
                    f"{reading.shown(caption.name)} may be image {caption.image} or another; give the number, or a "
                    "file name with one number, or name another key with --image-key."
                )


def _group(scores: Sequence[CaptionScore]) -> Group:
    return Group("", chair.clusters(scores), chair.counts(scores), scores)
