"""Questions about one picture share the pass over it, once a batch has shown that answers stay the same."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vlmfix.asking.asker import Asker, ask_in_turns
from vlmfix.asking.record import Record
from vlmfix.asking.words import yes_no_tokens
from vlmfix.eval.benchmarks.benchmark import Benchmark, Item
from vlmfix.eval.benchmarks.questions import YesNo
from vlmfix.eval.scorers.yesno import MARGIN


class CheckedSharing:
    """Asks batches of a benchmark's items under each of several methods. Answers to yes/no questions also tell the
    first token's probabilities.

    Questions about one picture share the pass over it, those of several methods, too. The first batch in which some do
    is asked without sharing, too: should an answer differ, the model cannot share, and all are asked plainly.
    """

    def __init__(self, askers: Sequence[Asker], bench: Benchmark, settings: dict[str, Any], seed: int) -> None:
        self.askers, self.settings, self.seed = askers, settings, seed
        self.first_token = _first_words(bench, askers[0].processor)
        self.shares = None if all(asker.can_share(settings) for asker in askers) else False
        """Whether questions may share; `None` as long as no batch has shown it."""

    def __call__(self, batch: Sequence[Item], pictures: Mapping[str, Image.Image]) -> list[list[Record]]:
        """Records of each method."""
        answers = self._ask(batch, pictures, share=self.shares is not False)
        some_share = len({item.image for item in batch}) < len(batch)
        if self.shares is None and some_share:
            plain = self._ask(batch, pictures, share=False)
            self.shares = _token_ids(answers) == _token_ids(plain)
            if not self.shares:
                warnings.warn("questions about one picture cannot share the pass over it on this model", stacklevel=2)
                return plain
        return answers

    def _ask(self, batch: Sequence[Item], pictures: Mapping[str, Image.Image], share: bool) -> list[list[Record]]:
        questions = [(pictures[item.image], item.prompt) for item in batch]
        seed = seed_of(self.seed, batch[0].id) if self.settings["do_sample"] else None
        return ask_in_turns(
            self.askers, questions, seed=seed, first_token=self.first_token, share=share, **self.settings
        )


def seed_of(seed: int, item: str) -> int:
    """The seed of a sampled answer: it depends on the run's seed and the question's name alone."""
    digest = hashlib.sha256(f"{seed} {item}".encode("utf-8", "surrogatepass"))
    return int(digest.hexdigest()[:8], 16)


def _first_words(bench: Benchmark, processor: Any) -> dict[str, tuple[int, ...]] | None:
    """The words whose probabilities a benchmark's records hold; `None` for captions, and for tokenizers that cannot
    tell them, unless the benchmark is scored by them."""
    if not isinstance(bench, YesNo):
        return None
    try:
        return yes_no_tokens(processor)
    except ValueError as error:
        if bench.scoring == MARGIN:
            raise
        warnings.warn(str(error), stacklevel=2)
        return None


def _token_ids(answers: Sequence[Sequence[Record]]) -> list[list[list[int]]]:
    return [[record.token_ids for record in records] for records in answers]
