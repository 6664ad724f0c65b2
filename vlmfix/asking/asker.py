"""`Asker`: this model, its processor and these methods, ready to be asked. Everything above the engine stands on it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from vlmfix.asking.batch import MAX_NEW_TOKENS, Batch, model_inputs, quiet
from vlmfix.asking.identity import methods_digest, model_identity, processor_identity
from vlmfix.asking.look import Look
from vlmfix.asking.meter import Meter
from vlmfix.asking.pictures import Picture, Question, naming_pictures, read_questions
from vlmfix.asking.prefix import ContinuedBatch, can_share, prefixed_for_all
from vlmfix.asking.record import Record
from vlmfix.asking.words import FirstWords, p_yes, yes_no_tokens
from vlmfix.engine.attachment import Attachment, attached, describe
from vlmfix.engine.decoding import as_keywords, decoding_of
from vlmfix.engine.refusals import check_decoding
from vlmfix.engine.wrap import in_force
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import Interventions, as_interventions
from vlmfix.method.stages import ASK_STAGES

Asked = tuple[Picture | Sequence[Picture], str]
"""A question as users give it: a picture, or several, and a prompt."""
Facts = list[dict[int, dict[str, Any]]]
"""Per question: place of an intervention -> what it has to say of its own work, for the record."""


class Asker:
    """A model, its processor and methods, ready to be asked.

    Methods are resolved once, on the untouched model, and are in force while the asker asks (or inside
    `with asker.applied():`); before and after, the model is as it was found, also if it is wrapped otherwise. Several
    askers may stand on one model and take turns. Threads may share an asker inside `applied`.

    Raises `ValueError` for unknown methods and unfit settings, `TypeError` for a model that cannot be wrapped.
    """

    def __init__(self, model: Any, processor: Any, methods: Interventions = None) -> None:
        """`methods` as for `vlmfix.wrap`; none of them, or "none": the untouched model."""
        self.model, self.processor = model, processor
        self._attachment: Attachment | None = None
        self._effects: list[dict[str, Any]] = []
        requested = as_interventions(methods)
        if requested:
            with in_force(model, None):
                self._attachment = Attachment(model, requested, processor)

    @classmethod
    def of_wrapped(cls, model: Any, processor: Any) -> Asker:
        """An asker for what is in force on a model at this moment, by `vlmfix.wrap` or not at all."""
        asker = cls(model, processor)
        asker._attachment = attached(model)
        return asker

    # ---- who is asked ------------------------------------------------------------------------------------------------

    @property
    def interventions(self) -> tuple[Intervention | None, ...]:
        """The methods as resolved on this model, in the order given; `None` for one that is idle on it."""
        return () if self._attachment is None else tuple(entry.active for entry in self._attachment.entries)

    @property
    def methods(self) -> list[dict[str, Any]]:
        """The methods as `Record.method` has them: name, settings as resolved on this model, facts found."""
        return [] if self._attachment is None else [describe(entry) for entry in self._attachment.entries]

    @property
    def methods_digest(self) -> str | None:
        """A hash of the code of the methods, and of the files that their settings name; `None` without a method."""
        return methods_digest(
            [] if self._attachment is None else [entry.requested for entry in self._attachment.entries]
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Who answers, JSON-ready: all about model, processor and methods that could change an answer."""
        methods = {"method": self.methods, "method_digest": self.methods_digest}
        return {**model_identity(self.model), **processor_identity(self.processor), **methods}

    # ---- asking ------------------------------------------------------------------------------------------------------

    def ask(
        self,
        image: Picture | Sequence[Picture],
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        **generate: Any,
    ) -> Record:
        """Ask about one picture (or several, given as a list). Greedy and up to 256 tokens unless told otherwise, by
        keywords or by a `generation_config`.

        `generate` goes to the model's own `generate` (`do_sample`, `num_beams` ...); `seed` is set before sampling.
        Raises `ValueError` for a missing or unreadable picture and for an empty prompt.
        """
        return self.ask_batch([(image, prompt)], max_new_tokens=max_new_tokens, seed=seed, **generate)[0]

    def ask_batch(
        self,
        questions: Sequence[Asked],
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        first_token: Mapping[str, Sequence[int]] | None = None,
        share: bool = True,
        **generate: Any,
    ) -> list[Record]:
        """`ask` for several (image, prompt) pairs at once, padded on the left; records come in the order of the
        questions.

        `first_token` names words by the tokens that begin them (`words.spellings`); records hold their probability.
        Questions about the same path or picture object share the pass over it, where model, methods and decoding allow
        it; `share=False` does without.
        """
        settings = ask_settings(max_new_tokens, generate)
        return self._answer(read_questions(questions), settings, seed, first_token, share)

    def p_yes(self, questions: Sequence[Asked]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of each answer's first word, after all interventions; spellings count together.

        `ValueError` for methods that decode in a way of their own, which leave the first token's probabilities as they
        are, and where the tokenizer has no token for these words.
        """
        for intervention in self.interventions:
            if intervention is not None and intervention.acts_at("decode"):
                raise ValueError(
                    f"{intervention.name} works on whole answers; it leaves the first token's probabilities as they "
                    f"are."
                )
        words = yes_no_tokens(self.processor)
        records = self.ask_batch(questions, max_new_tokens=1, first_token=words, num_beams=1)
        return [p_yes(record.first_token or {}) for record in records]

    def can_share(self, settings: dict[str, Any]) -> bool:
        """Whether questions about one picture can share the pass over it, with these settings of `generate`."""
        return can_share(self.model, self._attachment, settings)

    # ---- looking inside ----------------------------------------------------------------------------------------------

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """The model with the methods in force, for the length of a `with` block, over as many questions as are asked
        in it. What methods keep from one question to the next, they keep until its end."""
        with in_force(self.model, self._attachment):
            yield self.model

    def effects(self) -> list[dict[str, Any]]:
        """What each method did in the last batch that was asked; see `vlmfix.effects`."""
        return self._effects

    def memos(self) -> list[dict[str, Any]]:
        """What each method's stages left in `site.memo` during the last generation or pass, in the order of the
        methods. Inside `applied` only: memos go when methods come off. `ValueError` where there is nothing yet."""
        on_now = self._attachment is not None and attached(self.model) is self._attachment
        generation = self._attachment.last() if on_now and self._attachment is not None else None
        if generation is None:
            raise ValueError("no memos: expected a question asked inside `with asker.applied():`")
        return generation.memos

    def inputs(self, questions: Sequence[Asked]) -> dict[str, Any]:
        """What the processor makes of questions: padded on the left, on the model's device."""
        pairs = [(question.images, question.prompt) for question in read_questions(questions)]
        return model_inputs(self.model, self.processor, pairs)

    def batch(self, questions: Sequence[Asked], **generate: Any) -> Batch:
        """Questions about to be answered, for callers that generate step by step inside `applied`."""
        pairs = [(question.images, question.prompt) for question in read_questions(questions)]
        return Batch.of(self.model, self.processor, pairs, generate)

    def forward(self, inputs: Mapping[str, Any], **options: Any) -> tuple[Any, list[dict[str, Any]]]:
        """One forward pass over inputs, without a cache and without gradients, the methods in force: the model's own
        output, and the memo of each method."""
        with torch.no_grad(), self.applied():
            output = self.model(**inputs, **{"use_cache": False, **options})
            return output, [] if self._attachment is None else self.memos()

    # ---- inside ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _answer(
        self,
        questions: list[Question],
        settings: dict[str, Any],
        seed: int | None,
        first_token: Mapping[str, Sequence[int]] | None,
        share: bool,
        prefixed: ContinuedBatch | None = None,
    ) -> list[Record]:
        """Records of questions; with `prefixed`, a batch of these questions after the pass over their pictures."""
        self._refuse(settings)
        if seed is not None:
            torch.manual_seed(seed)
        first = FirstWords(first_token or {})
        listening = {"logits_processor": [*(settings.get("logits_processor") or ()), first]} if first_token else {}
        if not questions:
            return []
        n, attachment = len(questions), self._attachment
        with naming_pictures(questions), self.applied():
            began = time.perf_counter()
            with Meter(self.model) as meter, nullcontext() if attachment is None else attachment.asking():
                refined, facts = self._refine(questions)
                if prefixed is not None:
                    batch: Batch = replace(prefixed, settings={**settings, **listening}, seed=seed)
                else:
                    build = ContinuedBatch.of_pictures if share else Batch.of
                    batch = build(self.model, self.processor, refined, {**settings, **listening}, seed)
                answers = self._decode(batch, facts)
            seconds, passes, tokens = time.perf_counter() - began, meter.passes, meter.tokens
            effects = self._effects_on(batch, answers, facts)
        if prefixed is not None and prefixed.prefix is not None and prefixed.prefix_inputs is not None:
            ids = prefixed.prefix_inputs["input_ids"]  # each method bears the common pass in full
            seconds, passes, tokens = seconds + prefixed.prefix.seconds, passes + len(ids), tokens + ids.numel()
        self._warn_of_idle(effects)
        resolved = dict(batch.decoding.settings)
        if seed is not None:
            resolved["seed"] = seed
        methods = self.methods
        return [
            Record(
                model=self.model.config._name_or_path,
                image=[picture.name for picture in question.pictures],
                image_sha256=[picture.sha256 for picture in question.pictures],
                prompt=question.prompt,
                method=methods,
                text=batch.text(answers[i]),
                token_ids=answers[i],
                finish="length" if batch.end(answers[i]) is None else "stop",
                seconds=seconds / n,
                batch_size=n,
                generation=resolved,
                effects=effects[i],
                passes=passes / n,
                tokens=tokens / n,
                first_token=first.of(i, n),
            )
            for i, question in enumerate(questions)
        ]

    def _refuse(self, settings: dict[str, Any]) -> None:
        """`ValueError` for settings that leave no room for one answer to each question, or for the question."""
        made_here = [name for name in settings if name in ("inputs", "inputs_embeds", "input_ids", "pixel_values")]
        if made_here:
            raise ValueError(f"{', '.join(made_here)}: is made from pictures and prompt here; call generate for others")
        n_answers = decoding_of(self.model, quiet(settings)).config.num_return_sequences or 1
        if n_answers > 1:
            raise ValueError(
                f"num_return_sequences: expected 1, since a record holds one answer, got {n_answers}; ask again with "
                f"another seed for another answer"
            )

    def _active(self, stage: str) -> list[tuple[int, Intervention]]:
        """Interventions that act at a stage, with their places."""
        active = [] if self._attachment is None else self._attachment.active()
        return [(i, intervention) for i, intervention in active if intervention.acts_at(stage)]

    def _refine(self, questions: list[Question]) -> tuple[list[tuple[list[Any], str]], Facts]:
        """Pictures and prompts to answer from, after the interventions that refine, and what these say of it."""
        refined, facts = [], []
        for question in questions:
            images, prompt = question.images, question.prompt
            own_facts = {}
            for i, intervention in self._active("refine"):
                look = Look(self.model, self.processor, i)
                images, prompt, own_facts[i] = intervention.refine(look, images, prompt)
            refined.append((images, prompt))
            facts.append(own_facts)
        return refined, facts

    def _decode(self, batch: Batch, facts: Facts) -> list[list[int]]:
        """The answers, by `generate` or by the intervention that decodes in its own way, which adds to the facts."""
        for i, intervention in self._active("decode"):
            check_decoding([(i, intervention)], batch.decoding)  # before it changes settings that nobody typed
            answers, decoding_facts = intervention.decode(batch)
            for own_facts, further in zip(facts, decoding_facts, strict=True):
                own_facts[i] = {**own_facts.get(i, {}), **further}
            return answers
        return batch.generate()

    def _warn_of_idle(self, effects: list[list[dict[str, Any]]]) -> None:
        """Say once of methods that act in `ask` that they did nothing to any question; `generate` says it of others."""
        attachment = self._attachment
        for stage in ASK_STAGES:
            for i, intervention in self._active(stage):
                if attachment is None or i in attachment.wrapper.warned or any(each[i]["acted"] for each in effects):
                    continue
                attachment.wrapper.warned.add(i)
                warnings.warn(
                    f"{intervention.name} did nothing in a whole answer: {intervention.idle_hint()}", stacklevel=5
                )

    def _effects_on(self, batch: Batch, answers: list[list[int]], facts: Facts) -> list[list[dict[str, Any]]]:
        """What each intervention did to each answer, without the detail per layer."""
        attachment = self._attachment
        if attachment is None:
            return [[] for _ in answers]
        newest = attachment.last()
        by_generation = {id(newest): attachment.effects(newest)}
        self._effects = by_generation[id(newest)]
        effects = []
        for i, tokens in enumerate(answers):
            generation, row = batch.sources.get(i, (newest, i))
            if id(generation) not in by_generation:
                by_generation[id(generation)] = attachment.effects(generation)
            of_answer = []
            for k, effect in enumerate(by_generation[id(generation)]):
                samples, active = effect["samples"], attachment.entries[k].active
                brief = {"acted": False}
                if row < len(samples):
                    brief = {key: value for key, value in samples[row].items() if key != "layers"}
                if active is not None and generation is not None and active.overrides("answered"):
                    brief |= active.answered(generation.memos[k], row, batch, tokens)
                of_answer.append({**brief, **facts[i].get(k, {})})
            effects.append(of_answer)
        return effects


def ask_settings(max_new_tokens: int | None, generate: dict[str, Any]) -> dict[str, Any]:
    """Settings of `generate` for a question, as keywords: the caller's keywords, then those of a `generation_config`
    of the caller's, then greedy decoding of up to 256 tokens."""
    if max_new_tokens is not None:
        generate = {"max_new_tokens": max_new_tokens, **generate}
    return as_keywords(generate, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)


def ask_in_turns(
    askers: Sequence[Asker],
    questions: Sequence[Asked],
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    first_token: Mapping[str, Sequence[int]] | None = None,
    share: bool = True,
    **generate: Any,
) -> list[list[Record]]:
    """The same questions to several askers of one model, as `Asker.ask_batch`: records per asker. Where all methods
    leave the pass over a picture as it is, one such pass serves them all."""
    settings = ask_settings(max_new_tokens, generate)
    opened = read_questions(questions)
    prefixed = None
    if share and len(askers) > 1:
        pairs = [(question.images, question.prompt) for question in opened]
        attachments = [asker._attachment for asker in askers]
        with naming_pictures(opened):
            prefixed = prefixed_for_all(askers[0].model, askers[0].processor, pairs, settings, attachments)
    return [asker._answer(opened, settings, seed, first_token, share, prefixed) for asker in askers]


def ask(
    model: Any,
    processor: Any,
    image: Picture | Sequence[Picture],
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    **generate: Any,
) -> Record:
    """Ask a model, wrapped or not, about one picture (or several, given as a list); see `Asker.ask`."""
    asker = Asker.of_wrapped(model, processor)
    return asker.ask(image, prompt, max_new_tokens=max_new_tokens, seed=seed, **generate)


def ask_batch(
    model: Any,
    processor: Any,
    questions: Sequence[Asked],
    *,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    first_token: Mapping[str, Sequence[int]] | None = None,
    share: bool = True,
    **generate: Any,
) -> list[Record]:
    """Ask a model, wrapped or not, several (image, prompt) pairs at once; see `Asker.ask_batch`."""
    return Asker.of_wrapped(model, processor).ask_batch(
        questions, max_new_tokens=max_new_tokens, seed=seed, first_token=first_token, share=share, **generate
    )
