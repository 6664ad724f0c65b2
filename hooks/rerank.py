"""Re-ranking by sentences: sample several, keep one that names no object which a verifier misses in the picture.

Peng et al., "Mitigating Object Hallucinations via Sentence-Level Early Intervention", ICCV 2025, arXiv 2507.12455,
appendix A.2: the variant at decoding time (the paper's main method trains). Early, because a wrong sentence makes more
of them follow. The paper verifies with open-vocabulary detectors; the default here asks the untouched model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from vlmfix.hooks.lookback import Lookback
from vlmfix.hooks.parts import verifiers
from vlmfix.hooks.parts.detector import Detector
from vlmfix.hooks.parts.sampling import Candidate, end_token, one_by_one, proposals, round_seed
from vlmfix.hooks.parts.sentences import sentence_end
from vlmfix.hooks.parts.verifiers import Verdict
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.kinds import Range
from vlmfix.method.settings import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmfix.asking.batch import Batch
    from vlmfix.model.anatomy import Anatomy

VERIFIERS = ("self", "lookback", "oracle")
_YES_NO = re.compile(r"(is|are|was|were|do|does|did|has|have|can|could)\b[^?]*\?\s*$|.*\byes or no\b", re.I | re.S)


@dataclass(frozen=True)
class Rerank(Lookback):
    """Sentence-level early intervention. Decodes in its own way: one sentence after the other, each the best of `n`.

    With the verifier `lookback` it reads attention too; the settings of `Lookback` belong to that verifier alone.
    """

    name: ClassVar[str] = "rerank"
    summary: ClassVar[str] = "samples next sentences, keeps one whose objects a verifier finds"
    paper: ClassVar[str] = "Peng et al., ICCV 2025, arXiv 2507.12455, appendix A.2; verifiers self and lookback: ours"
    cost: ClassVar[str] = "n times the decoding, a prefill per sentence, and with self one per new object"
    expect: ClassVar[str] = (
        "captions: far fewer inventions where the model answers yes/no well; with greedy_first recall is kept, too, at "
        "a third of the cost"
    )
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"n": (5,), "greedy_first": (True,)}

    n: Annotated[int, Range(1)] = 5
    """Candidates per sentence (paper)."""
    temperature: Annotated[float, Range(above=0)] = 0.9
    """Of sampling; not stated in the paper (ours)."""
    top_p: Annotated[float, Range(above=0, most=1)] = 0.95
    """Of sampling; not stated in the paper (ours)."""
    greedy_first: bool = False
    """Try the greedy sentence first, and sample only where the verifier objects to it (ours)."""
    verifier: str = "self"
    """`self`: the untouched model's own yes or no; `lookback`: the monitor's score at the object's first token;
    `oracle`: the annotations of `truth`, an upper bound; or `package.module:function`, called as (images, prompt,
    context, sentence, objects) and giving (object, present/absent/unsure, score) for each."""
    hi: float | None = None
    """Score from which an object is present. `None`: 0.5, or the lookback detector's calibrated threshold."""
    lo: float | None = None
    """Score up to which an object is absent. `None`: as `hi`."""
    truth: str = "organism"
    """`oracle`: annotated pictures, as --data of `vlmfix eval`."""
    extract: Literal["coco"] = "coco"
    """Objects of a sentence: CHAIR's 80 with their synonyms. CHAIR then shares its blind spots with the method."""
    choose: Literal["first", "likely", "objects"] = "first"
    """Among clean candidates: the first, the likeliest, or the one with most verified objects (ours)."""
    all_bad: Literal["least", "drop", "stop"] = "least"
    """Without a clean candidate (ours): the fewest absent objects, then the likeliest; or sample once more, then stop;
    or stop."""
    max_sentences: Annotated[int, Range(1)] = 32
    """Limit of an answer."""

    @property
    def traits(self) -> Traits:
        """Candidates are written one after another; the verifier `oracle` knows the right answers."""
        return Traits(sequential=True, uses_answers=self.verifier == "oracle")

    def __post_init__(self) -> None:
        """Check settings."""
        given: Any = self.verifier
        if callable(given):
            object.__setattr__(self, "verifier", f"{given.__module__}:{given.__qualname__}")
        super().__post_init__()
        if self.verifier not in VERIFIERS:
            if ":" not in self.verifier:
                hint = did_you_mean(self.verifier, VERIFIERS)
                raise ValueError(f"verifier: unknown {self.verifier!r}; {hint} Or name package.module:function")
            verifiers.verifier_function(self.verifier)
        lo, hi = self._limits
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= 1, got {lo!r} and {hi!r}")

    def controls(self) -> tuple[Intervention, ...]:
        """Sampling without a choice."""
        return (replace(self, n=1, greedy_first=False),)

    def idle_hint(self) -> str:
        """The first suspect is the verifier."""
        return f"the verifier {self.verifier} found no object absent, so every first sentence was kept."

    @property
    def _limits(self) -> tuple[float, float]:
        """Up to which score an object is absent, and from which it is present."""
        hi = 0.5 if self.hi is None else self.hi
        return hi if self.lo is None else self.lo, hi

    def acts_at(self, stage: str) -> bool:
        """Attention is read for the verifier `lookback` only."""
        return super().acts_at(stage) and (stage == "decode" or self.verifier == "lookback")

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[Intervention, dict[str, Any]]:
        """The lookback verifier needs a threshold that belongs to this model."""
        if self.verifier != "lookback":
            return self, {}
        resolved, facts = super().resolve(model, anatomy, processor)
        if self.hi is None and self.detector is None:
            raise ValueError(
                "verifier lookback needs a calibrated threshold: detector=FILE, made by vlmfix calibrate lookback, or "
                "hi=..., a score of the monitor on this model"
            )
        if self.hi is None:
            threshold = Detector.read(str(self.detector)).threshold
            resolved = replace(resolved, hi=threshold)  # type: ignore[call-arg]
        return resolved, facts

    def decode(self, run: Batch) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """One question after the other."""
        for _, prompt in run.questions:
            if _YES_NO.match(prompt.strip()):
                raise ValueError(
                    f"{self.name}: an answer to {prompt!r} has nothing to re-rank; use it for descriptions "
                    f"(vlmfix eval --benchmark chair)"
                )
        return one_by_one(run, self._answer)

    def _answer(self, run: Batch) -> tuple[list[int], dict[str, Any]]:
        """Tokens of one answer, and what to record of it."""
        accepted: list[int] = []
        rounds: list[dict[str, Any]] = []
        earlier_sentences: set[str] = set()
        for _ in range(self.max_sentences):
            for _ in range(2 if self.all_bad == "drop" else 1):
                candidates, facts = self._round(run, accepted, len(rounds), earlier_sentences)
                chosen = self._best(candidates, facts)
                all_bad = not any(fact["clean"] for fact in facts)
                rounds.append({"candidates": facts, "chosen": chosen, "all_bad": all_bad})
                if chosen is not None:
                    break
            if chosen is None:
                accepted += end_token(run)
                break
            sentence = facts[chosen]["text"]
            accepted += candidates[chosen].tokens
            run.sources[0] = candidates[chosen].source
            earlier_sentences.add(sentence)
            is_full = len(accepted) >= run.settings["max_new_tokens"]
            if is_full or not sentence or run.end(accepted) is not None:
                break
        return accepted, self._effect(rounds, len(accepted))

    def _effect(self, rounds: list[dict[str, Any]], n_kept: int) -> dict[str, Any]:
        """What a record says of one answer."""
        every: list[dict[str, Any]] = []
        for each in rounds:
            every += each["candidates"]
        return {
            "acted": not self.greedy_first or any(each["chosen"] != 0 for each in rounds),
            "tokens_sampled": sum(fact["tokens"] for fact in every),
            "tokens_kept": n_kept,
            "objects_verified": sum(len(fact["verdicts"]) for fact in every),
            "rounds": rounds,
        }

    def _round(
        self, run: Batch, accepted: list[int], index: int, earlier_sentences: set[str]
    ) -> tuple[list[Candidate], list[dict[str, Any]]]:
        """Next sentences, and what there is to say of each."""
        import torch

        candidates: list[Candidate] = []
        facts: list[dict[str, Any]] = []
        length, seed = run.settings["max_new_tokens"] - len(accepted), round_seed(run, index)

        def stop(new: Tensor) -> Tensor:
            ended = [sentence_end(_raw_text(run, row)) is not None for row in new]
            return new.new_tensor(ended, dtype=torch.bool)

        def sample(n: int, **sampling: Any) -> None:
            for proposal in proposals(run, accepted, n, length, seed, stop, **sampling):
                candidate = _first_sentence(run, proposal)
                candidates.append(candidate)
                facts.append(self._judge(run, accepted, candidate, earlier_sentences))

        if self.greedy_first:
            sample(1)
        n_more = self.n - len(candidates)
        if n_more and not any(fact["clean"] for fact in facts):
            sample(n_more, temperature=self.temperature, top_p=self.top_p, top_k=0)
        return candidates, facts

    def _judge(
        self, run: Batch, accepted: list[int], candidate: Candidate, earlier_sentences: set[str]
    ) -> dict[str, Any]:
        """What a record says of a candidate. It is clean if no object is absent, and if it is no repetition: text that
        loops would always be clean else."""
        sentence = run.text(candidate.tokens)
        verdicts = self._verify(run, accepted, sentence, candidate)
        repeat = sentence in earlier_sentences
        return {
            "text": sentence,
            "tokens": len(candidate.tokens),
            "verdicts": [list(verdict) for verdict in verdicts],
            "likelihood": candidate.likelihood,
            "repeat": repeat,
            "clean": not repeat and all(word != "absent" for _, word, _ in verdicts),
        }

    def _best(self, candidates: list[Candidate], facts: list[dict[str, Any]]) -> int | None:
        """Index of the candidate to go on from; `None` where none is good enough."""

        def count(i: int, wanted: str) -> int:
            return sum(word == wanted for _, word, _ in facts[i]["verdicts"])

        clean = [i for i, fact in enumerate(facts) if fact["clean"]]
        if clean and self.choose == "likely":
            return max(clean, key=lambda i: candidates[i].likelihood)
        if clean and self.choose == "objects":
            return max(clean, key=lambda i: count(i, "present"))
        if clean:
            return clean[0]
        if self.all_bad != "least":
            return None
        return min(range(len(facts)), key=lambda i: (facts[i]["repeat"], count(i, "absent"), -candidates[i].likelihood))

    def _verify(self, run: Batch, accepted: list[int], sentence: str, candidate: Candidate) -> list[Verdict]:
        """Verdicts on the objects that a sentence names, in the order of their first mention."""
        from vlmfix.eval.scorers import chair

        mentions = {mention.node: mention for mention in reversed(chair.mentions(sentence))}
        lo, hi = self._limits
        if self.verifier == "lookback":
            generation, row = candidate.source
            ratios, written = self.ratios(generation.memos[run.index(self)])[row], run.written(candidate.tokens)
            verdicts = []
            for name, mention in mentions.items():
                step = len(accepted) + written.tokens_of(mention.start, mention.end)[0]
                verdicts.append(verifiers.verdict(name, float(self.score(ratios[step : step + 1])), lo, hi))
            return verdicts
        images, prompt = run.questions[0]
        shelf = run.kept(self)
        known: dict[str, Verdict] = shelf.setdefault(tuple(map(verifiers.picture_key, images)), {})
        new = [name for name in mentions if name not in known]
        if new and self.verifier == "self":
            for name, p_yes in zip(new, verifiers.says_yes(run, new), strict=True):
                known[name] = verifiers.verdict(name, p_yes, lo, hi)
        elif new and self.verifier == "oracle":
            objects = verifiers.annotated_objects(self.truth, images, shelf)
            for name in new:
                known[name] = verifiers.verdict(name, float(name in objects), lo, hi)
        elif new:
            for verdict in verifiers.by_function(self.verifier, images, prompt, run.text(accepted), sentence, new):
                known[verdict[0]] = verdict
        return [known[name] for name in mentions]


def _raw_text(run: Batch, tokens: Any) -> str:
    """With the white space at its ends."""
    return run.processor.decode(tokens, skip_special_tokens=True)


def _first_sentence(run: Batch, candidate: Candidate) -> Candidate:
    """Up to the end of the first sentence, if something comes after it."""
    end = sentence_end(_raw_text(run, candidate.tokens))
    if end is None:
        return candidate
    for n in range(1, len(candidate.tokens) + 1):
        if len(_raw_text(run, candidate.tokens[:n])) >= end:
            return candidate.cut(n)
    return candidate
