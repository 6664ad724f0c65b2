"""Lookback-guided decoding: sample several chunks of a few tokens, go on from the one that looks at the image most.

Chuang et al., "Lookback Lens", EMNLP 2024, arXiv 2407.07071: there for text, with a trained detector. Here the default
is the plain score over the image (ours). Candidates of one round stand at the same place of the answer, so that the
drift of the score with length plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from vlmfix.hooks.lookback import Lookback
from vlmfix.hooks.parts.sampling import one_by_one, proposals, round_seed
from vlmfix.method.kinds import Range

if TYPE_CHECKING:
    from vlmfix.asking.batch import Batch
    from vlmfix.method.intervention import Intervention


@dataclass(frozen=True)
class Chunks(Lookback):
    """Lookback-guided chunks. Decodes in its own way, with the score of `Lookback`, whose settings it has."""

    name: ClassVar[str] = "chunks"
    summary: ClassVar[str] = "samples several next chunks, keeps what looks at the image most"
    paper: ClassVar[str] = "Chuang et al., EMNLP 2024, arXiv 2407.07071; on images: ours"
    cost: ClassVar[str] = "k times the decoding and a prefill per chunk"
    expect: ClassVar[str] = "captions: a little better than sampling, and worse than greedy: longer, more inventions"

    c: Annotated[int, Range(1)] = 8
    """Tokens of a chunk (paper)."""
    k: Annotated[int, Range(1)] = 8
    """Candidates per chunk (paper)."""
    temperature: Annotated[float, Range(above=0)] = 0.9
    """Of sampling (code)."""
    top_p: Annotated[float, Range(above=0, most=1)] = 0.95
    """Of sampling (code)."""
    top_k: Annotated[int, Range(0)] = 0
    """Of sampling; 0: off (code)."""

    def controls(self) -> tuple[Intervention, ...]:
        """Sampling without a choice."""
        return (replace(self, k=1),)

    def idle_hint(self) -> str:
        """The first suspect is the temperature."""
        return (
            f"the candidates of every chunk were the same, so none was chosen; raise temperature={self.temperature:g}."
        )

    def decode(self, run: Batch) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """One question after the other."""
        return one_by_one(run, self._answer)

    def _answer(self, run: Batch) -> tuple[list[int], dict[str, Any]]:
        """Tokens of one answer, and what to record of it. The last chunk is shorter where the limit is no multiple."""
        index = run.index(self)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        accepted: list[int] = []
        rounds: list[dict[str, Any]] = []
        n_left = run.settings["max_new_tokens"]
        while run.end(accepted) is None and n_left > 0:
            seed = round_seed(run, len(rounds))
            candidates = proposals(run, accepted, self.k, min(self.c, n_left), seed, **sampling)
            best = 0
            scores: list[Any] = [None] * len(candidates)
            if any(candidate.tokens != candidates[0].tokens for candidate in candidates):
                r = self.ratios(candidates[0].source[0].memos[index])[:, len(accepted) :]
                for row, candidate in enumerate(candidates):
                    scores[row] = float(self.score(r[row, : len(candidate.tokens)]))
                best = scores.index(max(scores))  # the first of equals
            facts = []
            for candidate, score in zip(candidates, scores, strict=True):
                facts.append({"text": run.text(candidate.tokens), "tokens": len(candidate.tokens), "score": score})
            rounds.append({"candidates": facts, "chosen": best})
            accepted += candidates[best].tokens
            run.sources[0] = candidates[best].source
            n_left = run.settings["max_new_tokens"] - len(accepted)
        n_sampled = sum(fact["tokens"] for each in rounds for fact in each["candidates"])
        chose = any(fact["score"] is not None for each in rounds for fact in each["candidates"])
        return accepted, {
            "acted": chose or self.k == 1,
            "tokens_sampled": n_sampled,
            "tokens_kept": len(accepted),
            "rounds": rounds,
        }
