"""In the place of the model's own `generate`: it knows where the prompt ends, and says what it cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList

from vlmfix.engine.decoding import Decoding, resolve
from vlmfix.engine.hooks import LogitsStage
from vlmfix.engine.passes import image_tokens
from vlmfix.engine.refusals import check_decoding
from vlmfix.engine.running import Running, names_of
from vlmfix.engine.state import Generation, Scope
from vlmfix.model.anatomy import Anatomy

LOSES_PROCESSORS = ("janus",)
"""Models whose own `generate` drops logits processors when it writes text; what it calls then does not."""


class Generate:
    """The model's own `generate`, around which the interventions in force are looked after."""

    def __init__(self, running: Running, parts: Anatomy, model: Any):
        self.running, self.parts, self.model = running, parts, model
        self.warned: set[int] = set()
        """Interventions of which something was said already."""

    def put_on(self) -> None:
        """In the model's place of it."""
        self.own = self.model.__dict__.get("generate")
        self.original: Callable[..., Any] = self.model.generate
        self.model.__dict__["generate"] = self.generate

    def remove(self) -> None:
        """As it was found."""
        if self.model.__dict__.get("generate") != self.generate:
            return
        del self.model.__dict__["generate"]
        if self.own is not None:
            self.model.__dict__["generate"] = self.own

    def generate(
        self, *args: Any, image_mask: Tensor | None = None, prompt_end: int | None = None, **kwargs: Any
    ) -> Any:
        """The model's own `generate`; knows where the prompt ends, and warns if a method never acted."""
        decoding = self.decoding(args, kwargs)
        named = dict(decoding.arguments)
        if isinstance(named.get("inputs"), Tensor):
            named["input_ids"] = named.pop("inputs")
        check_decoding(self.running.in_force(), decoding)
        self.running.warn_of_ask(stacklevel=4)
        run = self.original
        stages = self._logits_stages()
        if stages:
            processors = with_stages(named.get("logits_processor"), stages)
            args, kwargs = (), {**decoding.arguments, "logits_processor": processors}
            if self.parts.model_type in LOSES_PROCESSORS and kwargs.pop("generation_mode", "text") == "text":
                run = partial(GenerationMixin.generate, self.model)
        inputs = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if image_mask is None and self.parts.generator is not self.model:  # whose inputs are embeddings
            image_mask = image_tokens(self.parts, named, inputs.get("input_ids"))
        end = _prompt_end(named) if prompt_end is None else prompt_end
        thread = self.running.thread
        outer, thread.scope = thread.scope, Scope(inputs, end, image_mask, decoding.n_beams)
        try:
            output = run(*args, **kwargs)
            if thread.scope.position >= (end or 0):
                self._warn_of_idle(thread.scope.generation)
                self._warn_of_processors(stages, thread.scope.generation)
            return output
        finally:
            thread.scope, thread.current = outer, None

    def decoding(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Decoding:
        """What the model's own `generate` will do with these arguments."""
        return resolve(self.parts.generator, self.original, args, kwargs)

    def _logits_stages(self) -> list[LogitsStage]:
        """The `logits` stage of the interventions in force: first of those that come before the penalties."""
        guides = [(i, one) for i, one in self.running.in_force() if one.acts_at("logits")]
        stages = []
        for before in (True, False):
            own = [(i, one) for i, one in guides if one.traits.before_penalties == before]
            if own:
                stages.append(LogitsStage(self.running, self.parts, own, before))
        return stages

    def _warn_of_processors(self, stages: list[LogitsStage], generation: Generation | None) -> None:
        """Say of methods that act on the choice of tokens that nobody asked them."""
        unheard = []
        for stage in stages if generation is not None else ():
            unheard += [(i, one) for i, one in stage.edits if stage.start is None and i not in self.warned]
        if unheard:
            self.warned.update(i for i, _ in unheard)
            warnings.warn(
                f"{names_of(unheard)} did not act on the choice of tokens: the way to decode called no logits "
                f"processors",
                stacklevel=4,
            )

    def _warn_of_idle(self, generation: Generation | None) -> None:
        """Say of methods that they never acted."""
        for i, one in self.running.active:
            if generation is None or i in self.warned or i not in generation.force:
                continue
            samples = one.effects(generation.memos[i])
            if samples and not any(sample["acted"] for sample in samples):
                self.warned.add(i)
                warnings.warn(f"{one.name} did nothing in a whole generation: {one.idle_hint()}", stacklevel=4)


def with_stages(others: Any, stages: Sequence[LogitsStage]) -> LogitsProcessorList:
    """Logits processors with the `logits` stages after those of the caller, before those that only listen."""
    processors = [*(others or []), *stages]
    return LogitsProcessorList(sorted(processors, key=lambda processor: getattr(processor, "listens", False)))


def _prompt_end(named: dict[str, Any]) -> int | None:
    """The number of columns that are prompt, from the arguments of `generate`."""
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1]
    rows = named.get("inputs_embeds", named.get("input_ids"))
    return rows.shape[1] if isinstance(rows, Tensor) else None
