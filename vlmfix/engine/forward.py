"""Around each forward pass of the model: which pass this is, a new generation if it begins one, and streams that go
along."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from transformers import Cache

from vlmfix.engine import prefill
from vlmfix.engine.attention import between_compiled_pieces
from vlmfix.engine.door import Door
from vlmfix.engine.passes import Pass, Seen, answer_begins, image_columns, image_tokens, valid_columns, which_pass
from vlmfix.engine.plan import Plan, lay
from vlmfix.engine.refusals import PACKED, check_pass, check_pieces, check_scoring
from vlmfix.engine.running import Running, names_of
from vlmfix.engine.state import Generation, Scope
from vlmfix.engine.streams import JointCache, join
from vlmfix.model.anatomy import PICTURE_ARGUMENTS, Anatomy

BESIDE = frozenset({"image_mask", "prompt_end", "labels", *PACKED})
"""Arguments of a forward pass that say more than `generate` does of a new token."""


class ForwardDoor(Door):
    """Stands in the place of a module's `forward`: whoever calls it, by the module or directly as PEFT does, comes
    through here. The module is the model, its part without the head, or the language model that makes the answers."""

    def __init__(self, running: Running, parts: Anatomy, model: nn.Module, module: nn.Module):
        super().__init__(running, module, "forward")
        self.parts, self.model = parts, model

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the original: transformers asks a model what its forward pass takes."""
        return inspect.signature(self.original)

    def put_on(self) -> None:
        """In the place of the module's own."""
        super().put_on()
        self.parameters = list(inspect.signature(self.original).parameters)

    @skip  # what is found out here stays outside of what torch.compile makes; the original is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, as the pass that it is."""
        run, args, kwargs = self.before(args, kwargs)
        thread = self.running.thread
        thread.inside = True
        try:
            output = run(*args, **kwargs)
        except BaseException:
            thread.current = None
            raise
        finally:
            thread.inside = False
        if thread.current is not None and thread.current.goes_on:
            thread.current = None
        else:
            self.after(output)
        return output

    # `torch.compile(model.forward)` would see an object without a frame, and break its graph there. These two names, by
    # which it finds its way through wrappers, lead it to a function. A torch that knows them no more breaks once.
    @property
    def _torchdynamo_orig_callable(self) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        forward.__signature__ = self.__signature__  # type: ignore[attr-defined]
        return skip(forward)

    @property
    def _torchdynamo_wrapper_id(self) -> int:
        return id(self)

    @between_compiled_pieces
    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
        """Make ready for a pass: what to run, and with which arguments."""
        if not self.is_on or self._goes_on(args, kwargs):
            return self.original, args, kwargs
        args, kwargs = self._begun(args, kwargs)
        this_pass = self.running.thread.current
        if this_pass is None or not self.running.plans(this_pass.generation.force):
            return self.original, args, kwargs
        if this_pass.plan is not None and this_pass.plan.begun:
            return self.original, args, kwargs
        # A plan is being laid, over the prompt and the first new token: by Python that is not to be compiled.
        return partial(_run_uncompiled, torch.compiler.disable(self.original)), args, kwargs

    def _goes_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this is but the next token of a call of `generate` whose passes go by plan. Then all is known, and
        nothing is asked again: at every token this is what the Python of a pass costs."""
        thread = self.running.thread
        scope = thread.scope
        generation = None if scope is None else scope.generation
        plan = None if generation is None else generation.plan
        if scope is None or generation is None or plan is None or not plan.begun or args or generation.streams:
            return False
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None or ids.shape[1] != 1 or kwargs.get("inputs_embeds") is not None or cache is not scope.cache:
            return False
        if not BESIDE.isdisjoint(kwargs) or thread.capture is not None or thread.only is not None:
            return False
        if len(ids) != len(generation.geometry.image) or _cached(cache, scope) != scope.position:
            return False
        if torch.is_grad_enabled():
            return False
        plan.advance(scope.position)
        thread.current = Pass(generation, scope.position, 1, 0, cache=cache, plan=plan, goes_on=True)
        scope.position += 1
        return True

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Find out what this forward pass is, and start a generation if it is a prefill."""
        thread = self.running.thread
        thread.current = None
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        image_mask, prompt_end = kwargs.pop("image_mask", None), kwargs.pop("prompt_end", None)
        if thread.capture is not None or not self.running.force():
            return args, kwargs
        check_pass(self.running.in_force(), self.parts, kwargs)
        embeds, ids = named.get("inputs_embeds"), named.get("input_ids")
        rows = embeds if embeds is not None else ids
        if rows is None:
            raise ValueError("the forward pass got neither input_ids nor inputs_embeds")
        if thread.scope is None:
            self._warn_of_guides()
            prompt_end = self._told_end(prompt_end, named, rows.shape[1])
            self._warn_of_loops(named, prompt_end)
        this_pass = self._this_pass(named.get("past_key_values"), rows, prompt_end)
        self._learn_prompt(this_pass, named, rows, image_mask)
        this_pass.plan = self._plan(this_pass)
        if this_pass.begins:
            self._begin(this_pass, self.module, {**named, "labels": None})
        if thread.scope is not None:
            thread.scope.generation = this_pass.generation
            thread.scope.position = this_pass.start + this_pass.n_rows
            thread.scope.cache = named.get("past_key_values")
            args, kwargs = self._with_streams(this_pass, thread.scope, named, args, kwargs)
        thread.current = this_pass  # passes of `begin` may have come between
        return args, kwargs

    @between_compiled_pieces
    def after(self, output: Any) -> None:
        """The pass is over."""
        thread = self.running.thread
        this_pass, thread.current = thread.current, None
        if this_pass is None:
            return
        if this_pass.plan is not None:
            this_pass.plan.begun = True
        if isinstance(this_pass.cache, JointCache):
            this_pass.cache.part(output)
        self.running.ended(this_pass.generation, _cache_of(output))

    def _this_pass(self, cache: Any, rows: Tensor, prompt_end: int | None) -> Pass:
        scope = self.running.thread.scope
        cached = None if cache is None else _cached(cache, scope)
        # Outside of `generate` nobody holds more of a prompt than goes in.
        columns = (cached or 0) + rows.shape[1] if scope is None else scope.columns
        seen = Seen(
            n_rows=rows.shape[1],
            cached=cached,
            prompt_end=prompt_end if scope is None else scope.prompt_end,
            columns=columns,
            under_way=None if scope is None else scope.generation,
            of_cache=None if cache is None else self.running.generation_of(cache),
        )
        this_pass = which_pass(seen, begun=lambda: self.running.begun(rows.shape[0], rows.device))
        this_pass.cache = cache
        self._check_columns(this_pass, rows)
        return this_pass

    def _plan(self, this_pass: Pass) -> Plan | None:
        """The generation's plan, for a pass over one new token; laid down before the first of them."""
        generation = this_pass.generation
        one_new = this_pass.n_rows == 1 and this_pass.n_prompt == 0 and this_pass.cache is not None
        if not one_new or torch.is_grad_enabled():
            return None
        if not generation.laid:
            generation.laid = True
            if self.running.plans(generation.force):
                edits, n_layers = self.running.in_force(), len(self.parts.layers)
                windows = windows_of(this_pass.cache, self.parts)
                generation.plan = lay(edits, generation.geometry, generation.memos, n_layers, windows)
        if generation.plan is not None:
            generation.plan.advance(this_pass.start)
        return generation.plan

    def _check_columns(self, this_pass: Pass, rows: Tensor) -> None:
        """Raise a `ValueError` where a pass has other rows or columns than its generation knows."""
        scope, known = self.running.thread.scope, len(this_pass.generation.geometry.image)
        if known != rows.shape[0]:
            raise ValueError(
                f"the cache holds {known} sequences, and this pass has {rows.shape[0]}; {self.running.names()} could "
                f"not tell which goes on from which"
            )
        if scope is None or not this_pass.begins or scope.columns is None or scope.prompt_end is None:
            return
        if rows.dim() == 2:  # ids; those of an assistant's proposals may come with the prompt
            return
        if this_pass.start + this_pass.n_rows > max(scope.columns, scope.prompt_end):
            raise ValueError(
                f"the pass over the prompt has {this_pass.n_rows} columns, and generate was given {scope.columns}: "
                f"virtual tokens come before it, as in prompt tuning, so {self.running.names()} could not tell where "
                f"the image is; unwrap the model, or give image_mask and prompt_end with these tokens counted"
            )

    def _told_end(self, prompt_end: int | None, named: dict[str, Any], n_rows: int) -> int | None:
        """The number of columns that are prompt, as the caller of a forward pass says it, or else its labels: what has
        a label is answer. `None` where nothing is said. Raises `ValueError` for an end that cannot be one, and for
        methods that cannot act on an answer in one pass."""
        labels = named.get("labels")
        if prompt_end is None and labels is None:
            return None
        cache = named.get("past_key_values")
        start = 0 if cache is None else _cached(cache, None)
        if prompt_end is None:
            check_scoring(self.running.in_force())
            prompt_end = start + answer_begins(cast(Tensor, labels))
        elif isinstance(prompt_end, bool) or not isinstance(prompt_end, int) or prompt_end < 1:
            raise ValueError(
                f"prompt_end: expected the number of columns that are prompt, 1 or more, got {prompt_end!r}"
            )
        elif prompt_end < start + n_rows and n_rows > 1:
            check_scoring(self.running.in_force())
        ids = named.get("input_ids")
        answer = None if ids is None else ids[:, max(prompt_end - start, 0) :]
        image = image_tokens(self.parts, {}, answer)
        if image is not None and bool(image.any()):
            raise ValueError(
                "the labels or prompt_end say that the answer begins before the picture ends, so no method could be in "
                "force as in generate; set the labels of the prompt to -100, or give prompt_end"
            )
        return prompt_end

    def _warn_of_guides(self) -> None:
        """Say once of methods that act on the choice of tokens that a forward pass alone does not show them."""
        guides = [one for one in self.running.in_force() if one[1].acts_at("logits")]
        if guides and not self.running.warned_of_guides:
            self.running.warned_of_guides = True
            warnings.warn(
                f"{names_of(guides)} acts where generate chooses a token; the logits of a forward pass by itself are "
                f"without it",
                stacklevel=4,
            )

    def _warn_of_loops(self, named: dict[str, Any], prompt_end: int | None) -> None:
        """Say once of a loop by hand that it does not tell where its prompt ends, where that cannot be seen: without a
        cache, where nothing ties its passes together but that each has the tokens of the last one and one more; and
        where several tokens go on from a cache, a further turn or a further piece of the prompt."""
        thread, ids, cache = self.running.thread, named.get("input_ids"), named.get("past_key_values")
        before, thread.last_ids = thread.last_ids, None
        if not isinstance(ids, Tensor) or prompt_end is not None or self.running.warned_of_loops:
            return
        if cache is None:
            thread.last_ids = ids
            repeats = before is not None and ids.shape[1] == before.shape[1] + 1 and torch.equal(ids[:, :-1], before)
            reading = "reads this pass, the tokens of the last one and one more without a cache, as a new prompt"
        else:
            repeats = ids.shape[1] > 1 and _cached(cache, None) > 0
            reading = "reads this pass, several tokens on a cache, as a further turn, whose last token ends a prompt"
        if repeats:
            self.running.warned_of_loops = True
            warnings.warn(
                f"{self.running.names()} {reading}; where it is none, give prompt_end, the number of columns that are "
                f"prompt, those in the cache counted",
                stacklevel=5,
            )

    def _learn_prompt(self, this_pass: Pass, named: dict[str, Any], rows: Tensor, image_mask: Tensor | None) -> None:
        """Add what goes in of the prompt, or all of it where `generate` sends it in pieces, to the geometry."""
        generation, start = this_pass.generation, this_pass.start
        if this_pass.n_prompt == 0 or generation.geometry.n >= start + this_pass.n_prompt:
            return
        scope, mask = self.running.thread.scope, named.get("attention_mask")
        if scope is not None and scope.prompt_end is not None and image_mask is None:
            image_mask = scope.image_mask
        if scope is not None and this_pass.n_known > this_pass.n_prompt:
            mask = scope.inputs.get("attention_mask")
            if mask is not None:
                mask = mask.repeat_interleave(rows.shape[0] // mask.shape[0], dim=0)
            if image_mask is None:
                image_mask = image_tokens(self.parts, scope.inputs, scope.inputs.get("input_ids"))
        image = image_columns(self.parts, named, rows, start, this_pass.n_known, image_mask)
        valid = valid_columns(mask, image, start)
        generation.geometry = generation.geometry.extended(start, image, valid)

    def _begin(self, this_pass: Pass, module: nn.Module, named: dict[str, Any]) -> None:
        self.parts.must_be_as_found()
        if not this_pass.ends:
            check_pieces(self.running.in_force())
        prefill.begin(this_pass, self.model, module, self.parts, self.running, named)

    def _with_streams(
        self, this_pass: Pass, scope: Scope, named: dict[str, Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The arguments of the pass, with the second streams' rows where these may go along."""
        generation = this_pass.generation
        if not generation.streams or not self._may_join(generation, this_pass, scope):
            return args, kwargs
        joined = join({**named, **kwargs}, generation.streams)
        if joined is None:
            return args, kwargs
        this_pass.cache, generation.ahead = joined["past_key_values"], True
        return (), joined

    def _may_join(self, generation: Generation, this_pass: Pass, scope: Scope) -> bool:
        """Whether second streams may go along in a pass: over one new token, no beams, in a model whose attention gets
        keys and values as the cache gives them."""
        if (this_pass.n_rows, this_pass.n_prompt, scope.n_beams) != (1, 0, 1):
            return False
        if len(generation.joinable) < len(self.parts.layers):
            return False
        return not any(one.acts_at("tokens") for _, one in self.running.in_force())


@skip
def _run_uncompiled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pass out of reach of torch.compile; but with fullgraph=True that wants to find something in every call."""
    _something(torch.zeros(()))
    return original(*args, **kwargs)


def _something(x: Tensor) -> Tensor:
    return x + 1


class PartDoor(ForwardDoor):
    """Of a part of the model: within a pass of the model it lets everything through."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by itself, it is a pass of its own."""
        if not self.running.thread.inside:
            return super().__call__(*args, **kwargs)
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def windows_of(cache: Any, parts: Anatomy) -> dict[int, int]:
    """Layer -> number of keys that a cache keeps of it, for layers of which it keeps a window only."""
    windows = {}
    for number, layer in enumerate(parts.layers):
        index = number if layer.cache_index is None else layer.cache_index
        kept = cache.layers[index] if index < len(getattr(cache, "layers", ())) else None
        if kept is not None and getattr(kept, "is_sliding", False):
            # A static one has no more room than its window, and less where the whole is shorter.
            room = getattr(kept, "max_cache_len", None)
            windows[number] = kept.sliding_window if room is None or room < 0 else room
    return windows


def doors(model: nn.Module, parts: Anatomy) -> list[nn.Module]:
    """Modules of a model that may be called by themselves, since ids or pictures that they get tell where the image is:
    the model, its part without the head, and the language model inside that makes the answers."""
    headless = getattr(model, "base_model", None)
    modules = [model]
    if isinstance(headless, nn.Module):
        parameters = inspect.signature(headless.forward).parameters
        if "input_ids" in parameters and any(argument in parameters for argument in PICTURE_ARGUMENTS):
            modules.append(headless)
    modules.append(parts.generator)
    return list(dict.fromkeys(modules))


def _cache_of(output: Any) -> Any:
    """The cache that a pass has filled; `None` if there is none."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return getattr(output, "past_key_values", None)


def _cached(cache: Any, scope: Scope | None) -> int:
    """Tokens in a cache."""
    length = cache.get_seq_length()
    if isinstance(length, Tensor):  # a static cache: asking it would wait for the device at every token
        return scope.position if scope is not None and scope.generation is not None else int(length)
    return length
