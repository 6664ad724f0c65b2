"""Whether the objects of a sentence are in the picture, by one of several verifiers. For re-ranking.

A verifier gives each object a verdict. Verdicts on a picture are kept for as long as the method is in force, since
candidates name the same objects over and over.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmfix.asking.batch import Batch

Verdict = tuple[str, Literal["present", "absent", "unsure"], float]
"""Object, verdict, P(present)."""


def verdict(name: str, score: float, lo: float, hi: float) -> Verdict:
    """From a score: present from `hi` on, absent up to `lo`, unsure between."""
    if score >= hi:
        return name, "present", score
    return name, "absent" if score <= lo else "unsure", score


def says_yes(run: Batch, objects: Sequence[str]) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of the untouched model's first token, on POPE's question for each object."""
    from vlmfix.eval.benchmarks.pope_building import question_text

    images, _ = run.questions[0]
    try:
        return run.untouched_p_yes([(images, question_text(name)) for name in objects])
    except ValueError as error:
        raise ValueError(f"{error}; the model cannot verify itself: name a verifier") from None


def annotated_objects(truth: str, images: Sequence[Image], shelf: dict[Any, Any]) -> frozenset[str]:
    """Objects that the annotations of `truth` (as --data of `vlmfix eval`) have in any of the pictures; read once, and
    kept on the method's `shelf`. `ValueError` for pictures that are none of its own."""
    from vlmfix.asking.pictures import open_picture
    from vlmfix.eval.pictures.data import Data

    if "oracle" not in shelf:
        data = Data.load(truth)
        shelf["oracle"] = {picture_key(open_picture(path)): data.truth[key] for key, path in data.images.items()}
    objects: frozenset[str] = frozenset()
    for image in images:
        if picture_key(image) not in shelf["oracle"]:
            raise ValueError(f"rerank: the oracle knows the pictures of {truth!r} only; set truth to their folder")
        objects |= shelf["oracle"][picture_key(image)]
    return objects


def verifier_function(path: str) -> Callable[..., Any]:
    """The function behind `package.module:function`. `ValueError` if there is none."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"verifier {path!r} is no function")
    return function


def by_function(
    path: str, images: Sequence[Image], prompt: str, context: str, sentence: str, objects: list[str]
) -> list[Verdict]:
    """Verdicts of somebody else's function, checked."""
    answers = list(verifier_function(path)(images, prompt, context, sentence, objects))
    named = [name for name, *_ in answers]
    known_words = all(word in ("present", "absent", "unsure") for _, word, _ in answers)
    if named != objects or not known_words:
        raise ValueError(
            f"verifier {path}: expected (object, present/absent/unsure, score) for each of {objects}, got {answers}"
        )
    return [(name, word, float(score)) for name, word, score in answers]


def picture_key(image: Image) -> str:
    """Tells pictures apart by their pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()
