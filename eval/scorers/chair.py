"""CHAIR: which objects a caption names, and which of them are not in the picture.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156. The literature holds several
CHAIRs, which differ in how words are brought to one form (`variants.py`). Captions and ground truth must go
through the same variant, and its `label` stands beside every figure. `rohrbach` reproduces LisaAnne/Hallucination and
Maxlinn/CHAIR-metric-standalone, `opera` shikiw/OPERA, known defects included (under `rohrbach`, "bus" becomes "bu" and
never counts).

    truth = coco_truth("rohrbach")  # or ground_truth("instances_val2014.json", "captions_val2014.json")
    scores = score_captions([("COCO_val2014_000000000042.jpg", "A dog on a couch.")], truth, variant="rohrbach")
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["CHAIR_S"](sums), METRICS["CHAIR_I"](sums)
    explain(scores[0])
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO

from vlmfix.eval.scorers.variants import NORMALISERS, Mention, Token, check_variant, singularize, strict, version

_TABLES = files("vlmfix.assets") / "chair"


@dataclass(frozen=True)
class Vocabulary:
    """The objects that count and the words that name them. `Vocabulary.load()` gives the 80 objects of COCO."""

    node_of: Mapping[str, str]
    """Word or pair of words -> its node, the name of the object. Nodes are among the words."""
    double_words: Mapping[str, str]
    """Two normalised words that are read as one, and what they are read as: "wine glas" -> "wine glass"."""

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Vocabulary:
        """Read a synonyms file: one object a line, entries separated by a comma and one blank, the first is the node.

        Without a path, the list of Rohrbach et al. for COCO. Their pairs of words ("hot dog", "train track") hold for
        every file; a file's own entries of two words are added to them. Captions are lower-cased and made singular
        before they are looked up, so an entry that `singularize` alters ("bus" -> "bu") needs that form as a synonym.

        Raises:
            ValueError: the file holds no entry, or a word stands for two objects.
        """
        return _coco_vocabulary() if path is None else _parse_vocabulary(Path(path).read_text("utf-8"), str(path))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the objects, in the order of the file."""
        return tuple(dict.fromkeys(self.node_of.values()))

    def node(self, name: str) -> str:
        """The object that a name or synonym stands for; ValueError, with the nearest names, for any other."""
        if name in self.node_of:
            return self.node_of[name]
        near = difflib.get_close_matches(name, self.node_of, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "add it to the synonyms file."
        raise ValueError(f"{name!r} is neither an object nor a synonym in this vocabulary: {hint}")


@cache
def _coco_vocabulary() -> Vocabulary:
    return _parse_vocabulary((_TABLES / "synonyms.txt").read_text("utf-8"), "synonyms.txt")


def _parse_vocabulary(text: str, source: str) -> Vocabulary:
    node_of: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        node, *_ = entries = line.split(", ")
        for entry in entries:
            if node_of.setdefault(entry, node) != node:
                raise ValueError(
                    f"{source}: {entry!r} stands for both {node_of[entry]!r} and {node!r}; keep it in one of the lines."
                )
    if not node_of:
        raise ValueError(f"{source} holds no synonyms; expected one object per line: name, synonym, synonym.")
    double_words = json.loads((_TABLES / "double_words.json").read_text("utf-8"))
    for entry, node in node_of.items():
        first, _, second = entry.partition(" ")
        # A pair whose second word names the same object ("dining table") counts the same without being joined.
        if first and second and " " not in second and entry not in double_words and node_of.get(second) != node:
            double_words[entry] = double_words[f"{singularize(first)} {singularize(second)}"] = entry
    return Vocabulary(node_of, double_words)


_COCO_ONLY = ("opera_approx", "strict")  # variants made of tables for the words of COCO


def mentions(caption: str, vocabulary: Vocabulary | None = None, variant: str = "rohrbach") -> list[Mention]:
    """Every object that a caption names, in order, one entry per naming (`utils/chair.py` of LisaAnne/Hallucination).

    Spans point into the caption as given. They are right also after "toilet seat", where the reference's indices slip.

    Raises:
        ValueError: the variant is unknown, lacks what it needs, or does not know the words of this vocabulary.
    """
    check_variant(variant)
    if variant in _COCO_ONLY and vocabulary not in (None, _coco_vocabulary()):
        raise ValueError(f"the variant {variant} knows the words of COCO only; use rohrbach with other vocabularies.")
    if variant == "strict":
        return strict(caption)
    vocabulary = vocabulary or _coco_vocabulary()
    return _objects(NORMALISERS[variant](caption), vocabulary)


def _objects(tokens: Sequence[Token], vocabulary: Vocabulary) -> list[Mention]:
    items = list(_join_pairs([token.text for token in tokens], vocabulary.double_words))
    words = {word for word, _, _ in items}
    skip = "seat" if "toilet" in words else None  # the seat of a toilet is no chair, and no other seat is either
    return [
        Mention(word, vocabulary.node_of[word], first, tokens[first].start, tokens[last].end)
        for word, first, last in items
        if word in vocabulary.node_of and word != skip
    ]


def prefix_objects(
    words: Sequence[str], lengths: Sequence[int], vocabulary: Vocabulary | None = None, variant: str = "rohrbach"
) -> list[frozenset[str]]:
    """The objects that the first so many of a caption's white-space separated words name, for each of the lengths.

    As `mentions` of these words joined by blanks, in one pass where a word's form does not depend on those after it.
    """
    vocabulary = vocabulary or _coco_vocabulary()
    caption = " ".join(words)
    if variant in _IN_CONTEXT or len(caption.lower()) != len(caption):
        return [_named(" ".join(words[:n]), vocabulary, variant) for n in lengths]
    tokens = NORMALISERS[variant](caption)
    items = list(_join_pairs([token.text for token in tokens], vocabulary.double_words))
    ends = list(accumulate(map(len, words), lambda end, length: end + 1 + length))  # of each word in the caption
    found, named, toilet, at = {}, set[str](), False, 0
    for n in sorted(set(lengths)):
        end = ends[min(n, len(words)) - 1] if n and words else 0
        if n and words and _STOP_INSIDE.search(words[min(n, len(words)) - 1]):  # the final stop would be parted from it
            found[n] = _named(" ".join(words[:n]), vocabulary, variant)
            continue
        while at < len(items) and tokens[items[at][2]].end <= end:
            word = items[at][0]
            toilet = toilet or word == "toilet"
            if word in vocabulary.node_of:
                named.add(word)
            at += 1
        alone = tokens[items[at][1]] if at < len(items) else None  # half of a pair that was cut apart
        halves = {alone.text} if alone is not None and alone.end <= end and alone.text in vocabulary.node_of else set()
        skip = {"seat"} if toilet or "toilet" in halves else set()
        found[n] = frozenset(vocabulary.node_of[word] for word in (named | halves) - skip)
    return [found[n] for n in lengths]


_IN_CONTEXT = ("opera", "strict")  # variants in which what follows a word may change it
_STOP_INSIDE = re.compile(r"""[.!?][\])}>"'»”’]+$""")


def _named(caption: str, vocabulary: Vocabulary, variant: str) -> frozenset[str]:
    return frozenset(mention.node for mention in mentions(caption, vocabulary, variant))


def _join_pairs(words: Sequence[str], double_words: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """Yield word, first and last token, with known pairs joined greedily from the left."""
    at = 0
    while at < len(words):
        pair = double_words.get(f"{words[at]} {words[at + 1]}") if at + 1 < len(words) else None
        last = at if pair is None else at + 1
        yield words[at] if pair is None else pair, at, last
        at = last + 1


def image_key(image: int | str | os.PathLike[str]) -> int:
    """The number of an image: 42, "42", "COCO_val2014_000000000042.jpg" and any path to such a file give 42.

    The number is the last group of digits of the file name without its ending. Raises ValueError if there is none.
    """
    if isinstance(image, str) and len(image) <= 18 and image.isascii() and image.isdecimal():
        return int(image)
    if isinstance(image, (str, os.PathLike)):
        digits = re.findall(r"[0-9]+", PureWindowsPath(os.fsdecode(image)).stem)  # knows both kinds of slashes
        if digits and len(digits[-1]) <= 18:
            return int(digits[-1])
    else:
        with contextlib.suppress(TypeError):
            if not isinstance(image, bool) and (key := operator.index(image)) >= 0:
                return key
    raise ValueError(
        f"{image!r} names no image; expected a number of up to 18 digits, or a file name that ends in one."
    )


def read_coco(path: str | os.PathLike[str]) -> COCO:
    """Read annotations in COCO format, plain or gzipped, without the messages that pycocotools prints.

    Raises:
        ValueError: the file is no JSON, or not in COCO format.
    """
    path = Path(path)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    coco = COCO()
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            coco.dataset = json.load(file)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON file in COCO format ({type(error).__name__}: {error}).") from error
    if not coco.imgs:
        raise ValueError(f"{path} lists no images; expected COCO format with the keys images and annotations.")
    return coco


def instance_categories(path: str | os.PathLike[str]) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Images of an instances file in COCO format (`id`, `file_name`, ...), each with the categories annotated on it.

    Crowd annotations count. Category names stand in the order of the image's annotations, each once.

    Raises:
        ValueError: an annotation refers to an image or a category that the file does not list.
    """
    coco = read_coco(path)
    if not coco.anns:
        raise ValueError(f"{path} holds no annotations; give an instances file.")
    if lost := coco.imgToAnns.keys() - coco.imgs.keys():
        raise ValueError(f"{path} annotates {len(lost)} images that it does not list, such as {min(map(str, lost))}.")
    try:
        names = {key: category["name"] for key, category in coco.cats.items()}
        return [
            (
                image,
                tuple(dict.fromkeys(names[annotation["category_id"]] for annotation in coco.imgToAnns.get(key, ()))),
            )
            for key, image in coco.imgs.items()
        ]
    except KeyError as error:
        raise ValueError(f"{path} lacks the category or category name {error}; give an instances file.") from error


@dataclass(frozen=True, eq=False, repr=False)
class GroundTruth(Mapping[int, frozenset[str]]):
    """Objects in each image, by `image_key`, with the variant that read them out of human captions."""

    objects: Mapping[int, frozenset[str]]
    variant: str | None = None
    """None where no caption was read: such a truth suits every variant."""
    source: str = "ground truth"
    """What it is, in a few words."""

    def __getitem__(self, image: int) -> frozenset[str]:
        return self.objects[image]

    def __iter__(self) -> Iterator[int]:
        return iter(self.objects)

    def __len__(self) -> int:
        return len(self.objects)

    def __repr__(self) -> str:
        return f"<{self.source}, {self.variant or 'any variant'}: {len(self)} images>"


_TRUTHS = {
    "rohrbach": ("rohrbach",),
    "opera": ("opera",),
    "opera_approx": ("opera_approx", "opera"),  # an approximation of the exact one, so the exact truth is its truth
    "inflect": ("inflect", "rohrbach"),  # its own truth needs the captions of COCO; `label` tells the two apart
    "strict": ("strict",),
}
"""Variant of the captions -> variants of the ground truth that go with it, the first is its own."""


def label(variant: str, truth: Mapping[int, frozenset[str]] | None = None) -> str:
    """The name under which figures of a variant are recorded: `opera (nltk 3.10.4)`, `inflect (gt rohrbach)`.

    Raises:
        ValueError: the ground truth was made with another variant, or the variant is unknown or lacks what it needs.
    """
    check_variant(variant)
    made_with = truth.variant if isinstance(truth, GroundTruth) else None
    if made_with not in (None, *_TRUTHS[variant]):
        raise ValueError(
            f"{truth!r} does not go with captions read as {variant}; "
            f"give ground truth made with {' or '.join(_TRUTHS[variant])}, or score as {made_with}."
        )
    if variant == "inflect" and made_with == "rohrbach":
        return "inflect (gt rohrbach)"
    return f"{variant} ({used})" if (used := version(variant)) else variant


def ground_truth(
    instances: str | os.PathLike[str],
    captions: str | os.PathLike[str] | None = None,
    vocabulary: Vocabulary | None = None,
    variant: str = "rohrbach",
) -> GroundTruth:
    """Objects in each image: its annotated instances, and what human captions name, by `image_key` of the image's id.

    Files are in COCO format, plain or gzipped. CHAIR's own ground truth uses both; captions are read by the variant
    that will read the captions to score. Captions of other images are passed over.

    Raises:
        ValueError: a category is not in the vocabulary, an image has no caption, or two images share a number: the same
            in their ids, or one in its file name and the other in its id.
    """
    check_variant(variant)
    vocabulary = vocabulary or _coco_vocabulary()
    images = instance_categories(instances)
    truth = {image_key(image["id"]): {vocabulary.node(name) for name in names} for image, names in images}
    if len(truth) < len(images):
        raise ValueError(f"{instances}: {len(images)} image ids hold only {len(truth)} different numbers; number them.")
    for image, _ in images:
        _check_file_name(image, truth.keys(), instances)
    if captions is not None:
        _add_captions(truth, captions, vocabulary, variant)
    return GroundTruth(
        {key: frozenset(objects) for key, objects in truth.items()},
        variant=None if captions is None else variant,
        source=f"ground truth of {Path(instances).name}",
    )


def _check_file_name(image: dict[str, Any], keys: Collection[int], path: str | os.PathLike[str]) -> None:
    try:
        named = image_key(image["file_name"])
    except (KeyError, ValueError):
        return
    if named != image_key(image["id"]) and named in keys:
        raise ValueError(
            f"{path}: the file of image {image['id']} is {image['file_name']!r}, the number of another image; "
            "give images the ids that their file names bear."
        )


def _add_captions(
    truth: dict[int, set[str]], path: str | os.PathLike[str], vocabulary: Vocabulary, variant: str
) -> None:
    bare = set(truth)
    for annotation in read_coco(path).anns.values():
        if not isinstance(annotation.get("caption"), str):
            raise ValueError(f"{path}: annotation {annotation['id']} has no caption; give a captions file.")
        key = image_key(annotation["image_id"])
        if key in truth:
            truth[key].update(mention.node for mention in mentions(annotation["caption"], vocabulary, variant))
            bare.discard(key)
    if bare:
        raise ValueError(
            f"{path} holds no caption for {len(bare)} of {len(truth)} images ({_first(sorted(bare))}); "
            "give the captions of the same images, or none."
        )


def coco_truth(variant: str = "rohrbach", split: Literal["val", "train"] | None = None) -> GroundTruth:
    """The ground truth of COCO 2014 that goes with a variant: 40,504 val images and 82,783 train, 2017 has the same.

    It comes from the caches of Maxlinn/CHAIR-metric-standalone and shikiw/OPERA. `inflect` gets the truth of
    `rohrbach`, and a `label` that says so; `strict` that of `rohrbach`, and a bus wherever `opera` has one. Without a
    split, both.

    Raises:
        ValueError: the variant or the split is unknown.
    """
    check_variant(variant)
    if split not in ("val", "train", None):
        raise ValueError(f"{split!r} is no split of COCO 2014; choose val or train, or None for both.")
    return _coco_truth({"opera_approx": "opera", "inflect": "rohrbach"}.get(variant, variant), split)


@cache
def _coco_truth(variant: str, split: str | None) -> GroundTruth:
    if split is None:
        objects = {**_coco_truth(variant, "val"), **_coco_truth(variant, "train")}
    elif variant == "strict":
        bus, buses = frozenset({"bus"}), _coco_truth("opera", split)
        objects = {image: named | bus & buses[image] for image, named in _coco_truth("rohrbach", split).items()}
    else:
        objects = dict(load_masks(str(_TABLES / "gt" / f"coco2014_{split}_{variant}.json.gz")))
    return GroundTruth(objects, variant, f"COCO 2014 {split or 'val and train'}")


def images_without_instances() -> frozenset[int]:
    """The 1,069 images of COCO 2014 that nobody annotated: their ground truth is what human captions name."""
    return frozenset(json.loads((_TABLES / "gt" / "images_without_instances.json").read_text("utf-8")))


def load_masks(path: str | os.PathLike[str], variant: str | None = None) -> GroundTruth:
    """Read a packed ground truth: JSON, plain or gzipped, `{"objects": [name, ...], "images": {"42": "10000", ...}}`.

    Each image has a hexadecimal mask; bit k stands for objects[k]. The file does not tell its variant: name the one
    that read its captions, or none if it was made without captions.

    Raises:
        ValueError: the file is in another format, or the variant is unknown.
    """
    if variant is not None:
        check_variant(variant)
    path = Path(path)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            packed = json.load(file)
        objects = packed["objects"]
        masks = {image_key(image): int(mask, 16) for image, mask in packed["images"].items()}
        if any(mask < 0 or mask >> len(objects) for mask in masks.values()):
            raise ValueError(f"a mask has a bit beyond the {len(objects)} objects")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a packed ground truth ({type(error).__name__}: {error}).") from error
    sets = {
        mask: frozenset(name for bit, name in enumerate(objects) if mask >> bit & 1) for mask in set(masks.values())
    }
    return GroundTruth({image: sets[mask] for image, mask in masks.items()}, variant, path.name)


@dataclass(frozen=True)
class CaptionScore:
    """One caption against the objects of its image. Figures of a single caption are 0 where they are undefined."""

    image_id: int
    caption: str
    mentions: tuple[Mention, ...]
    truth: frozenset[str]
    variant: str = "rohrbach"
    """How the caption was read, as `label` puts it."""

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        """The mentions of objects that are not in the image."""
        return tuple(mention for mention in self.mentions if mention.node not in self.truth)

    @property
    def objects(self) -> frozenset[str]:
        """The objects named, each once."""
        return frozenset(mention.node for mention in self.mentions)

    @property
    def missed(self) -> frozenset[str]:
        """The image's objects that are not named."""
        return self.truth - self.objects

    @property
    def words(self) -> int:
        """Length of the caption in white-space separated words."""
        return len(self.caption.split())

    @property
    def repeated(self) -> bool:
        """Whether more than a fifth of the caption's 4-grams of lower-case words are repeats of others."""
        words = self.caption.lower().split()
        grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
        return bool(grams) and 1 - len(set(grams)) / len(grams) > 0.2

    @property
    def chair_s(self) -> int:
        """1 if any mention is hallucinated, else 0."""
        return int(bool(self.hallucinated))

    @property
    def chair_i(self) -> float:
        """Share of the mentions that are hallucinated."""
        return len(self.hallucinated) / max(len(self.mentions), 1)

    @property
    def recall(self) -> float:
        """Share of the image's objects that are named."""
        return len(self.objects & self.truth) / max(len(self.truth), 1)

    @property
    def precision(self) -> float:
        """Share of the objects named that are in the image."""
        return len(self.objects & self.truth) / max(len(self.objects), 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * len(self.objects & self.truth) / max(len(self.objects) + len(self.truth), 1)


def score_captions(
    captions: Iterable[tuple[int | str | os.PathLike[str], str]],
    truth: Mapping[int, frozenset[str]],
    vocabulary: Vocabulary | None = None,
    variant: str = "rohrbach",
) -> list[CaptionScore]:
    """Score captions, given with their images (anything `image_key` takes), in order. An empty caption counts.

    Raises:
        ValueError: a caption is no text, an image comes twice, or the ground truth does not cover it, was made with
            another variant, or names objects outside the vocabulary.
    """
    name = label(variant, truth)
    vocabulary = vocabulary or _coco_vocabulary()
    pairs = [(image_key(image), caption) for image, caption in captions]
    for key, caption in pairs:
        if not isinstance(caption, str):
            raise ValueError(f"the caption of image {key} is {type(caption).__name__}; expected text.")
    keys = [key for key, _ in pairs]
    if doubled := [key for key, n in Counter(keys).items() if n > 1]:
        raise ValueError(f"{len(doubled)} images have more than one caption ({_first(doubled)}); give one each.")
    if unknown := [key for key in keys if key not in truth]:
        covered = f"{len(truth)} images, {min(truth)} to {max(truth)}" if truth else "no image"
        covered += f" ({truth.source})" if isinstance(truth, GroundTruth) else ""
        raise ValueError(
            f"{len(unknown)} of {len(keys)} images have no ground truth ({_first(unknown)}); it covers {covered}. "
            "Load the split that holds them, or make theirs with ground_truth(instances, captions)."
        )
    if foreign := sorted(frozenset().union(*(truth[key] for key in keys)).difference(vocabulary.nodes)):
        raise ValueError(
            f"the ground truth names {len(foreign)} objects that are not in the vocabulary ({_first(foreign)}); "
            "give the vocabulary that it was made with."
        )
    return [
        CaptionScore(key, caption, tuple(mentions(caption, vocabulary, variant)), truth[key], name)
        for key, caption in pairs
    ]


def explain(score: CaptionScore) -> dict[str, Any]:
    """Every verdict on one caption, ready for JSON: each mention and where it stands, and the objects left unnamed.

    `start` and `end` count characters of the caption (end excluded), `token` the tokens before the mention.
    """
    return {
        "image_id": score.image_id,
        "variant": score.variant,
        "caption": score.caption,
        "mentions": [
            {
                "text": score.caption[mention.start : mention.end],
                "start": mention.start,
                "end": mention.end,
                "token": mention.index,
                "synonym": mention.word,
                "node": mention.node,
                "verdict": "present" if mention.node in score.truth else "invented",
            }
            for mention in score.mentions
        ],
        "missed": sorted(score.missed),
    }


def _first(keys: Sequence[object], most: int = 3) -> str:
    return ", ".join(map(str, keys[:most])) + (", ..." if len(keys) > most else "")


def clusters(scores: Sequence[CaptionScore]) -> list[int]:
    """The image of each entry of `counts`: the unit of resampling."""
    return [score.image_id for score in scores]


def counts(scores: Sequence[CaptionScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per caption, in order.

    Raises:
        ValueError: the captions were read by different variants.
    """
    if len(variants := {score.variant for score in scores}) > 1:
        raise ValueError(
            f"scores of different variants do not add up ({', '.join(sorted(variants))}); keep them apart."
        )
    columns: dict[str, Callable[[CaptionScore], float]] = {
        "captions": lambda score: 1,
        "hallucinated_captions": lambda score: score.chair_s,
        "mentions": lambda score: len(score.mentions),
        "hallucinated_mentions": lambda score: len(score.hallucinated),
        "unique_mentions": lambda score: len(score.objects),
        "true_unique": lambda score: len(score.objects & score.truth),
        "truth": lambda score: len(score.truth),
        "words": lambda score: score.words,
        "repeated": lambda score: score.repeated,
    }
    return {name: np.array([count(score) for score in scores], dtype=float) for name, count in columns.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, nan where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def f1(hits: np.ndarray, named: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision hits/named and recall hits/present, nan where one of them is."""
    return ratio(2 * np.asarray(hits, float), np.where(np.multiply(named, present) == 0, 0, np.add(named, present)))


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "CHAIR_S": lambda n: ratio(n["hallucinated_captions"], n["captions"]),
    "CHAIR_I": lambda n: ratio(n["hallucinated_mentions"], n["mentions"]),
    "recall": lambda n: ratio(n["true_unique"], n["truth"]),
    "precision": lambda n: ratio(n["true_unique"], n["unique_mentions"]),
    "F1": lambda n: f1(n["true_unique"], n["unique_mentions"], n["truth"]),
    "CHAIR_I_unique": lambda n: ratio(n["unique_mentions"] - n["true_unique"], n["unique_mentions"]),
    "words": lambda n: ratio(n["words"], n["captions"]),
    "repetition": lambda n: ratio(n["repeated"], n["captions"]),
}
"""Metric -> its value from *summed* counts (arrays of any shape): a share, for `words` a mean; nan where undefined.

Shares of mentions (CHAIR_I) and of captions (CHAIR_S, repetition) follow Rohrbach et al.; recall, precision, F1 and
CHAIR_I_unique count each object once per caption (LALBJ/PAI, `eval_script`).
"""
