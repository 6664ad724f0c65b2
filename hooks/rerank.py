"""Re-ranking by sentences: sample several, keep one that names no object which a verifier misses in the picture.

Peng et al., "Mitigating Object Hallucinations via Sentence-Level Early Intervention", ICCV 2025, arXiv 2507.12455,
appendix A.2: the variant at decoding time (the paper's main method trains). Early, because a wrong sentence makes more
of them follow. The paper verifies with open-vocabulary detectors; the default here asks the untouched model.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmfix.hooks.lookback import Detector, Lookback, steps_of, token_ends
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.settings import did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from vlmfix.asking.asking import Answering
    from vlmfix.model.anatomy import Anatomy

VERIFIERS = ("self", "lookback", "oracle")
Verdict = tuple[str, Literal["present", "absent", "unsure"], float]
"""Object, verdict, P(present)."""
ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "e.g", "i.e", "approx"])
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)|\n\s*\n")
_YES_NO = re.compile(r"(is|are|was|were|do|does|did|has|have|can|could)\b[^?]*\?\s*$|.*\byes or no\b", re.I | re.S)


@dataclass(frozen=True)
class Candidate:
    """One way to go on."""

    tokens: list[int]
    """The end token included."""
    logp: list[float]
    """Log-probability of each token, natural logarithm, before temperature and the like."""
    source: tuple[Any, int]
    """Generation and row that it came from."""

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(self.logp) / len(self.logp)

    def cut(self, n: int | None) -> Candidate:
        """Its first tokens; all for `None`."""
        return replace(self, tokens=self.tokens[:n], logp=self.logp[:n])


def proposals(
    run: Answering, accepted: Sequence[int], n: int, length: int, seed: int, stop: Any = None, **sampling: Any
) -> list[Candidate]:
    """`n` continuations of an answer to one question, of up to `length` tokens; greedy without `sampling`."""
    import torch
    from transformers import StoppingCriteriaList

    from vlmfix.engine.attachment import attached

    inputs, device = run.after(accepted), run.model.device
    start = inputs["input_ids"].shape[1]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = run.model.generate(
            **inputs,
            **{
                **run.settings,
                **(sampling or {"temperature": None, "top_p": None, "top_k": None}),
                "do_sample": bool(sampling),
                "num_return_sequences": n,
                "max_new_tokens": length,
                "return_dict_in_generate": True,
                "output_logits": True,
                "stopping_criteria": None
                if stop is None
                else StoppingCriteriaList([lambda ids, _: stop(ids[:, start:])]),
            },
            prompt_end=run.inputs["input_ids"].shape[1],
        )
    new = out.sequences[:, start:]
    logp = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, new[..., None])[..., 0]  # (n, T)
    generation, found = attached(run.model).last(), []  # type: ignore[union-attr]
    for row, (tokens, values) in enumerate(zip(new.tolist(), logp.tolist(), strict=True)):
        found.append(Candidate(tokens, values, (generation, row)).cut(run.end(tokens)))
    return found


def round_seed(run: Answering, n: int) -> int:
    """Seed of round `n`: belongs to the question, so that neither its batch nor what was asked before matters."""
    (images, prompt), h = run.questions[0], hashlib.sha256()
    for image in images:
        h.update(image.tobytes())
    h.update(f"{prompt}|{run.seed or 0}|{n}".encode())
    return int.from_bytes(h.digest()[:7], "big")


def sentence_end(text: str) -> int | None:
    """Characters up to the end of the first sentence, its closing mark included; `None` if none has ended yet.

    A full stop, ! or ? before white space (more of a number may follow else), or a blank line; not after an
    abbreviation or initial.
    """
    for m in _END.finditer(text):
        word = text[: m.start()].rsplit(None, 1)[-1:] or [""]
        stops = m[0].startswith(".") and (
            word[0].strip("(\"'").lower() in ABBREVIATIONS or re.fullmatch(r"[A-Z]", word[0])
        )
        if not stops and text[: m.start()].strip():
            return m.end() if m[0].strip() else m.start()
    return None


@dataclass(frozen=True)
class Rerank(Lookback):
    """Sentence-level early intervention. Decodes in its own way: one sentence after the other, each the best of `n`.

    With the verifier `lookback` it reads attention too; the settings of `Lookback` belong to that verifier alone.
    """

    name: ClassVar[str] = "rerank"
    summary: ClassVar[str] = "samples several next sentences, keeps one whose objects a verifier finds in the picture"
    paper: ClassVar[str] = "Peng et al., ICCV 2025, arXiv 2507.12455, appendix A.2; verifiers self and lookback: ours"
    cost: ClassVar[str] = "n times the decoding, a prefill per sentence, and with self one per new object"
    expect: ClassVar[str] = (
        "captions: far fewer inventions where the model answers yes/no well, as the embedded one does; with "
        "greedy_first recall is kept, too, at a third of the cost"
    )

    n: int = 5
    """Candidates per sentence (paper)."""
    temperature: float = 0.9
    """Of sampling; not stated in the paper (ours)."""
    top_p: float = 0.95
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
    truth: str = "scenes"
    """`oracle`: annotated pictures, as --data of `vlmfix eval`."""
    extract: Literal["coco"] = "coco"
    """Objects of a sentence: CHAIR's 80 with their synonyms. CHAIR then shares its blind spots with the method."""
    choose: Literal["first", "likely", "objects"] = "first"
    """Among clean candidates: the first, the likeliest, or the one with most verified objects (ours)."""
    all_bad: Literal["least", "drop", "stop"] = "least"
    """Without a clean candidate (ours): the fewest absent objects, then the likeliest; or sample once more, then stop;
    or stop."""
    max_sentences: int = 32
    """Limit of an answer."""

    @property
    def traits(self) -> Traits:
        """Candidates are written one after another; the verifier `oracle` knows the right answers."""
        return Traits(sequential=True, uses_answers=self.verifier == "oracle")

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        given: Any = self.verifier
        if callable(given):
            object.__setattr__(self, "verifier", f"{given.__module__}:{given.__qualname__}")
        if self.verifier not in VERIFIERS:
            if ":" not in self.verifier:
                hint = did_you_mean(self.verifier, VERIFIERS)
                raise ValueError(f"verifier: unknown {self.verifier!r}; {hint} Or name package.module:function")
            self._function()
        for key, least in (("n", 1), ("max_sentences", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: expected {least} or more, got {getattr(self, key)!r}")
        check_sampling(self.temperature, self.top_p)
        for key, known in (
            ("extract", ("coco",)),
            ("choose", ("first", "likely", "objects")),
            ("all_bad", ("least", "drop", "stop")),
        ):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}: expected {', '.join(known)}, got {getattr(self, key)!r}")
        lo, hi = self._limits
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= 1, got {lo!r} and {hi!r}")

    def controls(self) -> tuple[Intervention, ...]:
        """Sampling without a choice."""
        return (replace(self, n=1, greedy_first=False),)

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
        found, facts = super().resolve(model, anatomy, processor)
        if self.hi is None and self.detector is None:
            raise ValueError(
                "verifier lookback needs a calibrated threshold: detector=FILE, made by vlmfix calibrate lookback, or "
                "hi=..., a score of the monitor on this model"
            )
        if self.hi is None:
            at = Detector.read(self.detector).threshold  # type: ignore[arg-type]
            found = replace(found, hi=at)  # type: ignore[call-arg]
        return found, facts

    def decode(self, run: Answering) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """One question after the other."""
        for _, prompt in run.questions:
            if _YES_NO.match(prompt.strip()):
                raise ValueError(
                    f"{self.name}: an answer to {prompt!r} has nothing to re-rank; use it for descriptions "
                    f"(vlmfix eval --benchmark chair)"
                )
        return one_by_one(run, self._answer)

    def _answer(self, run: Answering) -> tuple[list[int], dict[str, Any]]:
        """Tokens of one answer, and what to record of it."""
        accepted: list[int] = []
        rounds: list[dict[str, Any]] = []
        earlier: set[str] = set()
        for _ in range(self.max_sentences):
            for _ in range(1 + (self.all_bad == "drop")):
                candidates, facts = self._round(run, accepted, len(rounds), earlier)
                chosen = self._best(candidates, facts)
                rounds.append({"candidates": facts, "chosen": chosen, "all_bad": not any(f["clean"] for f in facts)})
                if chosen is not None:
                    break
            if chosen is None:
                accepted += end_token(run)
                break
            accepted += candidates[chosen].tokens
            run.sources[0] = candidates[chosen].source
            earlier.add(facts[chosen]["text"])
            full = len(accepted) >= run.settings["max_new_tokens"]
            if full or not facts[chosen]["text"] or run.end(accepted) is not None:
                break
        counts = {
            "tokens_sampled": sum(f["tokens"] for r in rounds for f in r["candidates"]),
            "tokens_kept": len(accepted),
            "objects_verified": sum(len(f["verdicts"]) for r in rounds for f in r["candidates"]),
        }
        acted = not self.greedy_first or any(r["chosen"] != 0 for r in rounds)
        return accepted, {"acted": acted, **counts, "rounds": rounds}

    def _round(
        self, run: Answering, accepted: list[int], index: int, earlier: set[str]
    ) -> tuple[list[Candidate], list[dict[str, Any]]]:
        """Next sentences, and what there is to say of each."""
        import torch

        left = run.settings["max_new_tokens"] - len(accepted)
        raw = lambda tokens: run.processor.decode(tokens, skip_special_tokens=True)  # noqa: E731

        def stop(new: Tensor) -> Tensor:
            return new.new_tensor([sentence_end(raw(row)) is not None for row in new], dtype=torch.bool)

        def judged(n: int, **sampling: Any) -> list[tuple[Candidate, dict[str, Any]]]:
            found = proposals(run, accepted, n, left, round_seed(run, index), stop, **sampling) if n else []
            return [(cut := _cut(c, raw), self._judge(run, accepted, cut, earlier)) for c in found]

        pairs = judged(1) if self.greedy_first else []
        if not any(facts["clean"] for _, facts in pairs):
            pairs += judged(self.n - len(pairs), temperature=self.temperature, top_p=self.top_p, top_k=0)
        return [c for c, _ in pairs], [facts for _, facts in pairs]

    def _judge(self, run: Answering, accepted: list[int], one: Candidate, earlier: set[str]) -> dict[str, Any]:
        sentence = run.text(one.tokens)
        verdicts = self._verify(run, accepted, sentence, one)
        repeat = sentence in earlier  # else text that loops would always be clean
        clean = not repeat and all(verdict != "absent" for _, verdict, _ in verdicts)
        facts = {"text": sentence, "tokens": len(one.tokens), "verdicts": [list(v) for v in verdicts]}
        return {**facts, "likelihood": one.likelihood, "repeat": repeat, "clean": clean}

    def _best(self, candidates: list[Candidate], facts: list[dict[str, Any]]) -> int | None:
        """Index of the candidate to go on from; `None` where none is good enough."""
        count = lambda i, kind: sum(verdict == kind for _, verdict, _ in facts[i]["verdicts"])  # noqa: E731
        clean = [i for i, f in enumerate(facts) if f["clean"]]
        if clean:
            keys = {
                "first": lambda i: 0,
                "likely": lambda i: candidates[i].likelihood,
                "objects": lambda i: count(i, "present"),
            }
            return max(clean, key=keys[self.choose])
        if self.all_bad != "least":
            return None
        everyone = range(len(facts))
        return min(everyone, key=lambda i: (facts[i]["repeat"], count(i, "absent"), -candidates[i].likelihood))

    def _verify(self, run: Answering, accepted: list[int], sentence: str, one: Candidate) -> list[Verdict]:
        """Verdicts on the objects that a sentence names."""
        from vlmfix.engine.attachment import attached
        from vlmfix.eval.scorers import chair

        first = {m.node: m for m in reversed(chair.mentions(sentence))}
        index, (images, prompt) = own_index(run, self), run.questions[0]
        if self.verifier == "lookback":
            generation, row = one.source
            r, ends = self.ratios(generation.memos[index])[row], token_ends(one.tokens, run.text)
            at = {o: len(accepted) + steps_of(ends, m.start, m.end)[0] for o, m in first.items()}
            return [self._verdict(o, float(self.score(r[step : step + 1]))) for o, step in at.items()]
        kept: dict[Any, Any] = attached(run.model).kept[index]  # type: ignore[union-attr]
        known: dict[str, Verdict] = kept.setdefault(tuple(_sha(image) for image in images), {})
        new = [o for o in first if o not in known]
        if new and self.verifier == "self":
            known.update({o: self._verdict(o, p) for o, p in zip(new, says_yes(run, new), strict=True)})
        elif new and self.verifier == "oracle":
            known.update({o: self._verdict(o, float(o in self._objects(images, kept))) for o in new})
        elif new:
            told = list(self._function()(images, prompt, run.text(accepted), sentence, new))
            if [o for o, *_ in told] != new or any(v not in ("present", "absent", "unsure") for _, v, _ in told):
                raise ValueError(
                    f"verifier {self.verifier}: expected (object, present/absent/unsure, score) for each of {new}, "
                    f"got {told}"
                )
            known.update({o: (o, verdict, float(score)) for o, verdict, score in told})
        return [known[o] for o in first]

    def _verdict(self, name: str, score: float) -> Verdict:
        lo, hi = self._limits
        return name, "present" if score >= hi else "absent" if score <= lo else "unsure", score

    def _function(self) -> Callable[..., Any]:
        module, _, name = self.verifier.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"verifier {self.verifier!r} cannot be imported: {error}") from error
        if not callable(found):
            raise ValueError(f"verifier {self.verifier!r} is no function")
        return found

    def _objects(self, images: Sequence[Image], kept: dict[Any, Any]) -> frozenset[str]:
        """Annotated objects in any of the pictures."""
        from vlmfix.asking.asking import open_picture
        from vlmfix.eval.pictures.data import Data

        if "oracle" not in kept:
            data = Data.load(self.truth)
            kept["oracle"] = {_sha(open_picture(path)): data.truth[key] for key, path in data.images.items()}
        if any(_sha(image) not in kept["oracle"] for image in images):
            raise ValueError(
                f"{self.name}: the oracle knows the pictures of {self.truth!r} only; set truth to their folder"
            )
        return frozenset().union(*(kept["oracle"][_sha(image)] for image in images))


def one_by_one(
    run: Answering, answer: Callable[[Answering], tuple[list[int], dict[str, Any]]]
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """What a `decode` stage returns, question by question, each as a batch of its own."""
    from vlmfix.asking.asking import Answering

    answers, said = [], []
    for i, question in enumerate(run.questions):
        single = Answering.of(run.model, run.processor, [question], run.settings, run.seed)
        tokens, facts = answer(single)
        if single.sources:  # none where not even one sentence was accepted
            run.sources[i] = single.sources[0]
        answers.append(tokens)
        said.append(facts)
    return answers, said


def own_index(run: Answering, one: Intervention) -> int:
    """Place of an intervention among those that the model is wrapped with."""
    from vlmfix.engine.attachment import attached

    return next(i for i, each in attached(run.model).active() if each is one)  # type: ignore[union-attr]


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse what is no sampling."""
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in 0..1, above 0, got {top_p!r}")


def end_token(run: Answering) -> list[int]:
    """The model's end token, for answers that a method ends."""
    end = run.model.generation_config.eos_token_id
    return [] if end is None else [end[0] if isinstance(end, list) else end]


def says_yes(run: Answering, objects: Sequence[str]) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of the untouched model's first token, on POPE's question for each object."""
    import torch

    from vlmfix.asking.asking import Answering
    from vlmfix.engine.attachment import attached
    from vlmfix.eval.benchmarks.pope_building import question_text

    images, _ = run.questions[0]
    asked = Answering.of(run.model, run.processor, [(images, question_text(o)) for o in objects], {})
    with attached(run.model).only(()):  # type: ignore[union-attr]
        out = run.model.generate(
            **asked.inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    p = out.logits[0].float().softmax(-1)
    yes, no = (p[:, _spellings(run.processor, word)].sum(-1) for word in ("yes", "no"))
    return torch.nan_to_num(yes / (yes + no), nan=0.5).tolist()


def _spellings(processor: Any, word: str) -> list[int]:
    """Tokens that read as a word, whatever its case and white space."""
    tokenizer = getattr(processor, "tokenizer", processor)
    forms = [space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())]
    ids = {i for form in forms for i in tokenizer(form, add_special_tokens=False)["input_ids"]}
    found = sorted(i for i in ids if tokenizer.decode([i]).strip().lower() == word)
    if not found:
        raise ValueError(f"the tokenizer has no token for {word!r}, so the model cannot verify itself; name a verifier")
    return found


def _cut(one: Candidate, raw: Callable[[Sequence[int]], str]) -> Candidate:
    """Up to the end of the first sentence, if something comes after it."""
    end = sentence_end(raw(one.tokens))
    if end is None:
        return one
    return one.cut(next(k for k in range(1, len(one.tokens) + 1) if len(raw(one.tokens[:k])) >= end))


def _sha(image: Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()
