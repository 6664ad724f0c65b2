"""Words and tokens: which tokens spell a word, which tokens wrote it, and how likely an answer begins with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

LEAST_LOG_PROBABILITY = -1e4
"""Stands for the logarithm of nothing, which JSON does not know."""


def spellings(processor: Any, word: str) -> tuple[int, ...]:
    """Tokens that spell a word, in any case and with or without a blank before it. `ValueError` if there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ids = []
    for i, token in enumerate(tokens):
        letters = (token or "").lstrip("\u2581\u0120 ")  # marks of a blank: SentencePiece's, and byte-level BPE's
        if letters.lower() == word.lower():
            ids.append(i)
    if not ids:
        raise ValueError(f"no single token of the tokenizer spells {word!r}, so the first token cannot tell it")
    return tuple(ids)


def yes_no_tokens(processor: Any) -> dict[str, tuple[int, ...]]:
    """The tokens that spell `yes` and those that spell `no`. `ValueError` if there are none."""
    return {word: spellings(processor, word) for word in ("yes", "no")}


def word_log_probs(logits: torch.Tensor, words: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Log-probability of each word as the next token: `logits` (..., V) gives (...) per word, in nats. The spellings of
    a word count together. Log-probabilities may stand in for logits."""
    log_probs = logits.log_softmax(-1)
    return {word: log_probs[..., list(ids)].logsumexp(-1) for word, ids in words.items()}


def p_yes(log_probs: Mapping[str, float]) -> float:
    """P(yes) / (P(yes) + P(no)), from the log-probabilities of the two words."""
    margin = log_probs["no"] - log_probs["yes"]
    return 1 / (1 + math.exp(min(margin, 700.0)))  # exp(710) is more than a float holds


class FirstWords(LogitsProcessor):
    """Notes how likely each of some words is as the first token, after all interventions; changes nothing."""

    listens = True
    """Comes after the processors that edit."""

    def __init__(self, words: Mapping[str, Sequence[int]]) -> None:
        self.words = words
        self.log_probs: dict[str, list[float]] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor of `generate`."""
        if not self.log_probs:
            noted = word_log_probs(scores.float(), self.words)
            self.log_probs = {word: values.tolist() for word, values in noted.items()}
        return scores

    def of(self, i: int, n: int) -> dict[str, float] | None:
        """Log-probabilities for the i-th of n questions; `None` where they cannot be told apart."""
        if not self.log_probs or any(len(values) % n for values in self.log_probs.values()):
            return None
        # with beams there are several rows per question, which are alike at the first token
        first_row = {word: values[i * (len(values) // n)] for word, values in self.log_probs.items()}
        return {word: max(value, LEAST_LOG_PROBABILITY) for word, value in first_row.items()}


@dataclass(frozen=True)
class Written:
    """The text of an answer, and which of its tokens wrote which characters."""

    text: str
    """Special tokens and white space at both ends removed."""
    ends: tuple[int, ...]
    """Characters of the text up to and with each token."""

    @classmethod
    def by(cls, processor: Any, tokens: Sequence[int]) -> Written:
        """What the tokens of an answer wrote."""
        beginnings = [_text(processor, tokens[: k + 1]) for k in range(len(tokens))]
        return cls(beginnings[-1] if beginnings else "", tuple(len(text) for text in beginnings))

    def tokens_of(self, start: int, end: int) -> list[int]:
        """The tokens, by their place in the answer, that wrote characters `start` up to `end`. `ValueError` outside the
        text."""
        length = self.ends[-1] if self.ends else 0
        if not 0 <= start < end <= length:
            raise ValueError(f"span: expected characters within 0..{length}, got {start}..{end}")
        begins = (0, *self.ends)
        return [k for k, token_end in enumerate(self.ends) if token_end > start and begins[k] < end]

    def words(self) -> list[tuple[str, list[int]]]:
        """Each word (characters without white space) and the tokens that wrote it, by their place in the answer."""
        matches = re.finditer(r"\S+", self.text)
        return [(match[0], self.tokens_of(match.start(), match.end())) for match in matches]


def _text(processor: Any, tokens: Sequence[int]) -> str:
    return processor.decode(tokens, skip_special_tokens=True).strip()
