"""Figures of read answers: groups, units of resampling, counts and metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

from vlmfix.eval.scorers.stats import f1, ratio
from vlmfix.eval.scorers.yesno.scores import AnswerScore


def by_group(scores: Iterable[AnswerScore]) -> dict[str, list[AnswerScore]]:
    """Scores of each group, groups in order of first appearance."""
    groups: defaultdict[str, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        groups[score.question.group].append(score)
    return dict(groups)


def clusters(scores: Sequence[AnswerScore]) -> list[str]:
    """The unit of resampling, one name per entry of `counts`: the image, in order of first appearance.

    Images that share a pair are one cluster, named by the first of them.
    """
    return _clusters(scores)[0]


def _clusters(scores: Sequence[AnswerScore]) -> tuple[list[str], dict[str, int]]:
    """Names of the clusters, and for each image the place of its cluster."""
    images = list(dict.fromkeys(score.question.image for score in scores))
    number_of = {image: number for number, image in enumerate(images)}
    first_image_of: dict[Hashable, str] = {}
    links = []  # pairs of images that share a pair of questions
    for score in scores:
        question = score.question
        if question.pair is not None:
            first_image = first_image_of.setdefault((question.group, question.pair), question.image)
            links.append((number_of[first_image], number_of[question.image]))
    component_of = _components(len(images), links)
    names: list[str] = []
    place_of_component: dict[int, int] = {}
    place_of_image = {}
    for image, component in zip(images, component_of, strict=True):
        if component not in place_of_component:
            place_of_component[component] = len(names)
            names.append(image)
        place_of_image[image] = place_of_component[component]
    return names, place_of_image


def _components(n_nodes: int, links: Sequence[tuple[int, int]]) -> list[int]:
    """The connected component of each node."""
    if not links:
        return list(range(n_nodes))
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.array(links).T
    graph = coo_array((np.ones(len(links)), (rows, columns)), shape=(n_nodes, n_nodes))
    return connected_components(graph, directed=False)[1].tolist()


def counts(scores: Sequence[AnswerScore]) -> dict[str, np.ndarray]:
    """What the metrics are made of: additive counts, one float per cluster, in the order of `clusters`.

    `tp`, `fp`, `tn`, `fn` count answers that say yes or no, `predictions` all of these, `yes_predictions` the yes among
    them; `unknown` those that say neither and are wrong, `unknown_yes` the ones among them whose label is yes;
    `dropped` those that leave every count but `questions`. `pairs` counts the pairs without dropped answers,
    `pairs_right` those of them with right answers only.
    """
    columns: dict[str, Callable[[AnswerScore], bool]] = {
        "questions": lambda score: True,
        "predictions": lambda score: score.prediction is not None,
        "yes_predictions": lambda score: score.prediction == "yes",
        "tp": lambda score: score.prediction == "yes" and score.correct,
        "fp": lambda score: score.prediction == "yes" and not score.correct,
        "tn": lambda score: score.prediction == "no" and score.correct,
        "fn": lambda score: score.prediction == "no" and not score.correct,
        "unknown": _unknown,
        "unknown_yes": lambda score: _unknown(score) and score.question.label == "yes",
        "dropped": lambda score: score.dropped,
    }
    names, place_of = _clusters(scores)
    places = [place_of[score.question.image] for score in scores]
    table = {}
    for column, is_counted in columns.items():
        table[column] = add_up(places, [is_counted(score) for score in scores], len(names))
    pairs = [members for members in _pairs(scores) if not any(score.dropped for score in members)]
    pair_places = [place_of[members[0].question.image] for members in pairs]
    pairs_right = [all(score.correct for score in members) for members in pairs]
    table["pairs"] = add_up(pair_places, [1] * len(pairs), len(names))
    table["pairs_right"] = add_up(pair_places, pairs_right, len(names))
    return table


def _unknown(score: AnswerScore) -> bool:
    return score.prediction is None and not score.dropped


def _pairs(scores: Sequence[AnswerScore]) -> list[list[AnswerScore]]:
    """Scores of each pair, in order of first appearance."""
    members: defaultdict[Hashable, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        if score.question.pair is not None:
            members[score.question.group, score.question.pair].append(score)
    return list(members.values())


def add_up(places: Sequence[int], values: Sequence[float], n: int) -> np.ndarray:
    """Sum of the values at each of the places 0 .. n - 1."""
    sums = np.bincount(np.array(places, dtype=int), weights=np.array(values, dtype=float), minlength=n)
    return sums.astype(float)  # without places they are whole numbers


def _mcc(n: Mapping[str, np.ndarray]) -> np.ndarray:
    tp, fp, tn, fn = (np.asarray(n[name], dtype=float) for name in ("tp", "fp", "tn", "fn"))
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def labelled_no(n: Mapping[str, np.ndarray]) -> np.ndarray:
    """How many questions have the label no, from `counts`, without dropped answers."""
    return np.asarray(n["tn"], dtype=float) + n["fp"] + n["unknown"] - n["unknown_yes"]


METRICS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "accuracy": lambda n: ratio(n["tp"] + n["tn"], n["questions"] - n["dropped"]),
    "precision": lambda n: ratio(n["tp"], n["tp"] + n["fp"]),
    "recall": lambda n: ratio(n["tp"], n["tp"] + n["fn"] + n["unknown_yes"]),
    "F1": lambda n: f1(n["tp"], n["tp"] + n["fp"], n["tp"] + n["fn"] + n["unknown_yes"]),
    "TNR": lambda n: ratio(n["tn"], labelled_no(n)),
    "yes_ratio": lambda n: ratio(n["yes_predictions"], n["predictions"]),
    "MCC": _mcc,
}
"""Metric -> its value from *summed* counts (arrays of any shape); "yes" is the positive class; nan if undefined.

Wrong answers that say neither yes nor no lower accuracy, recall and TNR (the recall of "no"); precision, yes_ratio and
MCC are over predictions.
"""

PAIR_METRICS = {**METRICS, "pair_accuracy": lambda n: ratio(n["pairs_right"], n["pairs"])}
"""`METRICS`, and the share of pairs with right answers only."""
