"""`wrap` and `unwrap`: interventions come on as forward hooks, in place, and go off without a trace."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList

from vlmfix.engine import attention
from vlmfix.engine.state import Call, Generation, Prompt
from vlmfix.engine.streams import JointCache, Stream, join, part
from vlmfix.method.intervention import Idle, Intervention
from vlmfix.method.registry import Interventions, as_interventions
from vlmfix.method.site import Step
from vlmfix.method.stages import ASK_STAGES, ATTENTION_STAGES
from vlmfix.model.anatomy import PICTURE_ARGUMENTS, Anatomy, anatomy
from vlmfix.model.geometry import Geometry

ATTRIBUTE = "_vlmfix"
LOSES_PROCESSORS = ("janus",)
"""Models whose own `generate` drops logits processors when it writes text; what it calls then does not."""
MISPLACES_CACHE = ("instructblipvideo",)
"""Models whose own forward pass hands the cache to their vision side, where it does not belong."""
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Settings of `generate` that let something else propose tokens."""


def attached(model: nn.Module) -> Attachment | None:
    """What is attached to a model, or `None`."""
    return model.__dict__.get(ATTRIBUTE)


def wrap(model: nn.Module, interventions: Interventions, processor: Any = None) -> nn.Module:
    """Put interventions in force on a model, in place, and return the same model.

    `interventions` is a name (`"var"`), a name with settings (`"var:p=0.4,rho=0.8"`), an `Intervention`, or a list;
    they replace those in force before, are applied in the order given, and wrapping with the same again changes
    nothing. `processor` (or a tokenizer) lets methods that calibrate themselves read real text instead of random
    tokens. The model's own `generate`, `pipeline` and `save_pretrained` go on working; `unwrap` takes everything off.
    `generate` and the forward pass accept one more argument, `image_mask` (B, T) bool, for prompts whose image tokens
    cannot be told from `input_ids`; `generate` also `prompt_end`, where the prompt already holds some of the answer:
    the number of columns that are prompt.
    What torch.compile made is compiled again after `wrap`; edits run between the compiled pieces.

    Raises `ValueError` for unknown methods and unfit settings, `TypeError` for a model that cannot be wrapped.
    """
    requested = as_interventions(interventions)
    old = attached(model)
    if old is not None and old.requested == requested:
        return model
    unwrap(model)
    try:
        if requested:
            Attachment(model, requested, processor).attach()
    except BaseException:
        if old is not None:
            old.attach()
        raise
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Take all interventions off: hooks, attributes and configs are exactly as they were found. Returns the model."""
    found = attached(model)
    if found is not None:
        found.detach()
    return model


@contextmanager
def wrapped(model: nn.Module, interventions: Interventions, processor: Any = None) -> Iterator[nn.Module]:
    """`wrap` for the length of a `with` block; what was in force before is in force again after it."""
    with in_force(model, attached(model)):
        yield wrap(model, interventions, processor)


@contextmanager
def in_force(model: nn.Module, one: Attachment | None) -> Iterator[None]:
    """Put an attachment on alone, or nothing, for the length of a `with` block; afterwards all is as before."""
    old = attached(model)
    try:
        if one is not old:
            unwrap(model)
            if one is not None:
                one.attach()
        yield
    finally:
        if attached(model) is not old:
            unwrap(model)
            if old is not None:
                old.attach()


def effects(model: nn.Module) -> list[dict[str, Any]]:
    """What each intervention in force did in the last generation (or plain forward pass) of this model.

    One dictionary per intervention: `name`, its settings as resolved, `facts` found on the model (where values came
    from, why it is idle), and `samples`, one entry per row of the batch; their keys are the method's own and stated in
    its file.
    """
    found = attached(model)
    return [] if found is None else found.effects()


@dataclass
class Entry:
    """One requested intervention: what runs (`None` if idle) and what was found out about it on this model."""

    requested: Intervention
    active: Intervention | None
    facts: dict[str, Any]


Left = tuple[list[Entry], Generation | None]
"""Interventions that saw a pass, and its state."""


class _Scope:
    """One call of `generate`."""

    def __init__(self, inputs: dict[str, Any], prompt_end: int | None, image_mask: Tensor | None, n_beams: int):
        self.inputs = inputs
        self.prompt_end = prompt_end
        self.image_mask = image_mask
        self.n_beams = n_beams
        self.generation: Generation | None = None
        self.position = 0

    def holds(self, n: int) -> bool:
        """Whether it was given `n` columns of prompt: more of it may follow in a later call."""
        ids = self.inputs.get("input_ids")
        return not isinstance(ids, Tensor) or ids.shape[1] >= n


class _Local(threading.local):
    """What this thread is doing with the model at this moment."""

    scope: _Scope | None = None
    call: Call | None = None
    owner: nn.Module | None = None
    capture: tuple[Tensor, dict[int, Tensor]] | None = None
    last: Generation | None = None
    force: frozenset[int] | None = None
    asking: bool = False


class Attachment:
    """All that `wrap` puts on one model: hooks, config views and the states of running generations."""

    def __init__(self, model: nn.Module, requested: tuple[Intervention, ...], processor: Any = None):
        self.model = model
        self.requested = requested
        self.anatomy: Anatomy = anatomy(model)
        self.entries: list[Entry] = []
        self._forget()
        for one in requested:
            try:
                one.check_layers(len(self.anatomy.layers))
                active, facts = one.resolve(model, self.anatomy, processor)
                self.entries.append(Entry(one, active, facts))
            except Idle as idle:
                warnings.warn(f"{one.name or type(one).__name__} will not act on this model: {idle}", stacklevel=4)
                self.entries.append(Entry(one, None, {"idle": str(idle)}))
        deciders = [one.name for _, one in self.active() if one.acts_at("decode")]
        if len(deciders) > 1:
            raise ValueError(f"{' and '.join(deciders)} each decode in their own way; use one of them")
        for i, one in self.active():
            self.anatomy.must_have(one)
            one.composes([other for j, other in self.active() if j != i])
        self._warned: set[int] = set()
        self._handles: list[Any] = []
        self._configs: list[tuple[nn.Module, Any]] = []
        self._generate_parameters = list(inspect.signature(type(model).generate).parameters)[1:]  # type: ignore[attr-defined]
        modules = dict.fromkeys((model, self.anatomy.generator))
        self._parameters = [list(inspect.signature(module.forward).parameters) for module in modules]

    @classmethod
    def joint(cls, several: Sequence[Attachment]) -> Attachment:
        """All that several attachments of one model put on it, for a pass in which none of them edits a row."""
        new = copy.copy(several[0])
        new.requested = tuple(one for each in several for one in each.requested)
        new.entries = [entry for each in several for entry in each.entries]
        new._handles, new._configs = [], []
        new._forget()
        return new

    def _forget(self) -> None:
        self._local = _Local()
        self._generations: WeakKeyDictionary[Any, Generation] = WeakKeyDictionary()
        self._last: Generation | None = None
        self.kept: list[dict[Any, Any]] = [{} for _ in self.requested]
        """What each intervention keeps from one question to the next, for as long as it is on."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a wrapped model stay wrapped, but take no running generation along."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_local", "_generations", "_last", "kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # ---- on and off -------------------------------------------------------------------------------------------------

    def active(self) -> list[tuple[int, Intervention]]:
        """Interventions that are not idle, by their place among those requested."""
        return [(i, e.active) for i, e in enumerate(self.entries) if e.active is not None]

    def force(self) -> frozenset[int]:
        """Interventions in force in this thread: those told by `only`, else all but those that look beforehand."""
        if self._local.force is not None:
            return self._local.force
        return frozenset(i for i, one in self.active() if not one.acts_at("refine"))

    @contextmanager
    def only(self, force: Iterable[int]) -> Iterator[None]:
        """In this thread, these interventions alone are in force for a while; none of them: the plain model."""
        before, self._local.force = self._local.force, frozenset(force)
        call, self._local.call = self._local.call, None
        try:
            yield
        finally:
            self._local.force, self._local.call = before, call

    @contextmanager
    def asking(self) -> Iterator[None]:
        """`ask` is at work in this thread and sees to the stages that are its own."""
        before, self._local.asking = self._local.asking, True
        try:
            yield
        finally:
            self._local.asking = before

    def attach(self) -> None:
        """Put hooks and config views on; nothing stays behind if that fails half-way."""
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    def _attach(self) -> None:
        n = len(self.anatomy.layers)
        by_layer: list[list[tuple[int, Intervention]]] = [[] for _ in range(n)]
        for i, one in self.active():
            for layer in one.at_layers(n):
                if self.anatomy.layers[layer].attention is not None:
                    by_layer[layer].append((i, one))
        may_join = any(e.acts_at("logits") for _, e in self.active()) and "weights" in self.anatomy.stages
        torch.compiler.reset()  # compiled code does not see that hooks came, only that they went
        hooks: list[Any] = []
        self._handles = hooks
        for module in dict.fromkeys((self.model, self.anatomy.generator)):
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after, always_call=True))
        for layer, (parts, edits) in enumerate(zip(self.anatomy.layers, by_layer, strict=True)):
            edit_heads = [(i, e) for i, e in edits if e.acts_at("heads")]
            if parts.out_proj is not None and (edit_heads or any(e.acts_at("begin") for _, e in edits)):
                hook = _HeadHook(self, layer, edit_heads)
                hooks.append(parts.out_proj.register_forward_pre_hook(hook))
            see_input = [(i, e) for i, e in edits if e.acts_at("layer_input")]
            if see_input:
                hooks.append(
                    parts.module.register_forward_pre_hook(_InputHook(self, layer, see_input), with_kwargs=True)
                )
            move = [(i, e) for i, e in edits if e.acts_at("tokens")]
            if move:
                hooks.append(
                    parts.module.register_forward_pre_hook(_TokensHook(self, layer, move).enter, with_kwargs=True)
                )
            edit_rows = [(i, e) for i, e in edits if any(e.acts_at(stage) for stage in ATTENTION_STAGES)]
            if (edit_rows or may_join) and parts.attention is not None:
                view = attention.AttentionView(parts.attention, layer, n, edit_rows, self.call)
                self._configs.append((parts.attention, parts.attention.config))
                attention.attach(parts.attention, view)
        move = [(i, e) for i, e in self.active() if e.acts_at("tokens")]
        if move:
            hooks.append(self.anatomy.layers[-1].module.register_forward_hook(_TokensHook(self, n, move).leave))
        self._own_generate = self.model.__dict__.get("generate")
        self._generate: Any = self.model.generate
        self.model.__dict__["generate"] = self.generate
        self.model.__dict__[ATTRIBUTE] = self

    def detach(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        for module, config in self._configs:
            module.config = config
        self._handles, self._configs = [], []
        if self.model.__dict__.pop(ATTRIBUTE, None) is not None:
            del self.model.__dict__["generate"]
            if self._own_generate is not None:
                self.model.__dict__["generate"] = self._own_generate
        self._forget()

    # ---- generations ------------------------------------------------------------------------------------------------

    def call(self) -> Call | None:
        """The forward pass that this thread is in, or `None`: then the model runs untouched."""
        return self._local.call

    def generate(
        self, *args: Any, image_mask: Tensor | None = None, prompt_end: int | None = None, **kwargs: Any
    ) -> Any:
        """The model's own `generate`; knows where the prompt ends, and warns if a method never acted."""
        given = {**dict(zip(self._generate_parameters, args, strict=False)), **kwargs}
        if isinstance(given.get("inputs"), Tensor):
            given["input_ids"] = given.pop("inputs")
        ids = given.get("inputs_embeds", given.get("input_ids"))
        mask = given.get("attention_mask")
        if prompt_end is None and isinstance(mask, Tensor) and mask.dim() == 2:
            prompt_end = mask.shape[1]
        elif prompt_end is None and isinstance(ids, Tensor):
            prompt_end = ids.shape[1]
        config = kwargs.get("generation_config") or self.model.generation_config
        setting = {name: kwargs.get(name) or getattr(config, name, None) for name in (*ASSISTED, "num_beams")}
        n_beams, assisted = setting.pop("num_beams") or 1, any(v not in (None, False) for v in setting.values())
        self._check_decoding(n_beams, assisted)
        guides = [(i, e) for i, e in self._in_force() if e.acts_at("logits")]
        if guides:
            processors = [*(kwargs.get("logits_processor") or []), _LogitsStage(self, guides)]
            kwargs["logits_processor"] = LogitsProcessorList(
                sorted(processors, key=lambda one: getattr(one, "listens", False))
            )
        inputs = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        if image_mask is None and self.anatomy.generator is not self.model:  # whose inputs are embeddings
            image_mask = self._image_mask(given, inputs.get("input_ids"))
        outer, self._local.scope = self._local.scope, _Scope(inputs, prompt_end, image_mask, n_beams)
        run = self._generate
        if guides and self.anatomy.model_type in LOSES_PROCESSORS and kwargs.pop("generation_mode", "text") == "text":
            run = partial(GenerationMixin.generate, self.model)  # type: ignore[arg-type]
        try:
            out = run(*args, **kwargs)
            if self._local.scope.position >= (prompt_end or 0):
                self._warn_idle(self._local.scope.generation)
            return out
        finally:
            self._local.scope, self._local.call = outer, None

    def _check_decoding(self, n_beams: int, assisted: bool) -> None:
        for _, one in self._in_force():
            if one.traits.sequential and n_beams > 1:
                raise ValueError(f"{one.name} follows one answer token by token; beam search is not supported with it")
            if assisted and (one.traits.sequential or one.acts_at("logits")):
                raise ValueError(f"{one.name} needs every token in its turn; assisted generation is not supported")
        for i, one in self.active():
            left_out = self._local.force is not None and i not in self._local.force
            if self._local.asking or left_out or i in self._warned or not any(map(one.acts_at, ASK_STAGES)):
                continue
            self._warned.add(i)
            warnings.warn(f"{one.name} acts in vlmfix.ask only, not in a plain generate", stacklevel=4)

    def _warn_idle(self, generation: Generation | None) -> None:
        for i, one in self.active():
            if generation is None or i in self._warned or i not in generation.force:
                continue
            samples = one.effects(generation.memos[i])
            if samples and not any(s["acted"] for s in samples):
                self._warned.add(i)
                warnings.warn(f"{one.name} did nothing in a whole generation: {one.idle_hint()}", stacklevel=4)

    def last(self) -> Generation | None:
        """The last generation of this thread, or anyone's if this thread had none."""
        return self._local.last or self._last

    def left(self, cache: Any) -> Left:
        """What the pass that filled a cache left here, for `go_on`."""
        return self.entries, self._generations.get(cache)

    def go_on(self, cache: Any, index: Tensor, left: Left) -> None:
        """Let several prompts that begin alike go on from a cache: the b-th from sample `index[b]` of a pass in which
        these interventions were in force, perhaps among others."""
        entries, generation = left
        if generation is not None:  # else all interventions are idle
            memos = [
                memo for own in self.entries for e, memo in zip(entries, generation.memos, strict=True) if e is own
            ]
            self._generations[cache] = replace(generation, memos=memos, force=self.force()).branched(index)

    def effects(self, last: Generation | None = None) -> list[dict[str, Any]]:
        """See `vlmfix.effects`: of a generation, else this thread's last one, or anyone's if this thread had none."""
        last, found = last or self.last(), []
        for i, e in enumerate(self.entries):
            samples = [] if e.active is None or last is None else e.active.effects(last.memos[i])
            found.append({**describe(e), "samples": samples})
        return found

    # ---- hooks ------------------------------------------------------------------------------------------------------

    @attention.between_compiled_pieces
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Find out what this forward pass is, and start a generation if it is a prefill."""
        local, scope = self._local, self._local.scope
        if module is not self.model and local.call is not None:
            return args, kwargs  # a part of a pass that is known already
        local.call, local.owner = None, module
        if local.capture is not None or not (force := self.force()):
            kwargs.pop("image_mask", None)
            return args, kwargs
        named = {**dict(zip(self._parameters[module is not self.model], args, strict=False)), **kwargs}
        image_mask = kwargs.pop("image_mask", None)
        embeds, ids, cache = (named.get(k) for k in ("inputs_embeds", "input_ids", "past_key_values"))
        rows = embeds if embeds is not None else ids
        if rows is None:
            raise ValueError("the forward pass got neither input_ids nor inputs_embeds")
        n_rows = rows.shape[1]
        start = self._start(cache, scope)
        generation = self._generation(cache, scope, start)
        if scope is not None and scope.prompt_end is not None:
            end = scope.prompt_end if scope.prompt_end > start or start == 0 or generation else start + n_rows
            image_mask = scope.image_mask if image_mask is None else image_mask
        else:
            end = start + n_rows if start == 0 or n_rows > 1 else start
        n_prompt = min(max(end - start, 0), n_rows)
        new = generation is None
        if generation is None:
            memos: list[dict[str, Any]] = [{} for _ in self.entries]
            generation = Generation(Geometry.empty(rows.shape[0], rows.device), memos, force)
        if n_prompt and generation.geometry.n < start + n_prompt:
            if scope is not None and end > start + n_rows and scope.holds(end):  # in pieces: the whole decides on rows
                mask, told = scope.inputs.get("attention_mask"), {**named, "attention_mask": None}
                if mask is not None:
                    told["attention_mask"] = mask.repeat_interleave(rows.shape[0] // mask.shape[0], dim=0)
                if image_mask is None:
                    image_mask = self._image_mask(scope.inputs, scope.inputs.get("input_ids"))
                self._extend(generation, told, rows, start, end - start, image_mask)
            else:
                self._extend(generation, named, rows, start, n_prompt, image_mask)
        if new:
            self.anatomy.must_be_as_found()
            if start or end > n_prompt:
                self._need_whole_prompt()
            self._begin(generation, module, named, n_prompt)
        if scope is not None:
            scope.generation, scope.position = generation, start + n_rows
        if scope is not None and self._may_join(generation, scope, n_rows, n_prompt):
            joined = join({**named, **kwargs}, generation.streams)
            if joined is not None:
                args, kwargs, cache, generation.ahead = (), joined, joined["past_key_values"], True
        local.call = Call(generation, start, n_rows, n_prompt, ends=end <= start + n_rows, cache=cache)
        return args, kwargs

    def _may_join(self, generation: Generation, scope: _Scope, n_rows: int, n_prompt: int) -> bool:
        """Whether second streams may go along in a pass: over one new token, no beams, in a model whose attention gets
        keys and values as the cache gives them."""
        return (
            bool(generation.streams)
            and (n_rows, n_prompt, scope.n_beams) == (1, 0, 1)
            and len(generation.joinable) == len(self.anatomy.layers)
            and not any(one.acts_at("tokens") for _, one in self._in_force())
        )

    @attention.between_compiled_pieces
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self._local.owner:
            return  # a part of a pass
        call, self._local.call = self._local.call, None
        if call is None or output is None:
            return
        self._last = self._local.last = call.generation
        if isinstance(call.cache, JointCache):
            part(output, call.cache)
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._generations[cache] = call.generation

    def _start(self, cache: Any, scope: _Scope | None) -> int:
        """Tokens in the cache."""
        if cache is None:
            return 0
        length = cache.get_seq_length()
        if isinstance(length, Tensor):  # a static cache: asking it would wait for the device at every token
            return scope.position if scope is not None and scope.generation is not None else int(length)
        return length

    def _generation(self, cache: Any, scope: _Scope | None, start: int) -> Generation | None:
        """The generation that this pass continues; `None` for a new one."""
        if cache is None or start == 0:
            return scope.generation if scope is not None and cache is None else None
        found = scope.generation if scope is not None and scope.generation is not None else self._generations.get(cache)
        if found is None:
            raise ValueError(
                f"the cache holds {start} tokens that were computed without these interventions, so their geometry "
                f"is not known; start from an empty cache, or unwrap the model"
            )
        return found

    def _extend(
        self, generation: Generation, named: dict[str, Any], rows: Tensor, start: int, n: int, image_mask: Tensor | None
    ) -> None:
        """Add a piece of prompt, the rows `start .. start + n`, to the geometry."""
        batch, ids = rows.shape[0], named.get("input_ids")
        if image_mask is not None:
            given = image_mask.to(rows.device, torch.bool)
            if given.dim() != 2 or batch % given.shape[0] or given.shape[1] < start + n:
                raise ValueError(f"image_mask: expected bool of shape {(batch, start + n)}, got {tuple(given.shape)}")
            image = given.repeat_interleave(batch // given.shape[0], dim=0)[:, start : start + n]
        elif (mask := self._image_mask(named, ids if named.get("inputs_embeds") is None else None)) is not None:
            image = mask[:, :n]
        else:
            raise ValueError(
                "cannot tell which tokens are image tokens, since the prompt has no placeholder ids; "
                "give image_mask, bool of shape (batch, tokens)"
            )
        valid = _valid(named.get("attention_mask"), image, start)
        if generation.geometry.image.shape[0] != batch:
            raise ValueError(
                f"the cache holds {generation.geometry.image.shape[0]} sequences, the new prompt has {batch}"
            )
        generation.geometry = generation.geometry.extended(start, image, valid)

    def _image_mask(self, named: dict[str, Any], ids: Tensor | None) -> Tensor | None:
        """(B, T) bool: image tokens, by their ids or as the caller tells the model; `None` if nothing says it."""
        told = named.get(self.anatomy.image_mask_argument or "")
        if told is not None:
            return told.bool()
        if ids is None or not self.anatomy.image_token_ids:
            return None
        return torch.isin(ids, torch.tensor(self.anatomy.image_token_ids, device=ids.device))

    def _in_force(self) -> list[tuple[int, Intervention]]:
        force = self.force()
        return [(i, one) for i, one in self.active() if i in force]

    def _need_whole_prompt(self) -> None:
        for _, one in self._in_force():
            if one.traits.whole_prompt:
                raise ValueError(f"{one.name} needs the whole prompt in one pass; leave out prefill_chunk_size")

    def _begin(self, generation: Generation, module: nn.Module, named: dict[str, Any], n: int) -> None:
        """Let interventions prepare: passes of their own run here, before the first pass, and untouched."""
        scope, rows = self._local.scope, generation.geometry.image.shape[0]
        named = {k: v for k, v in named.items() if v is not None}

        def stream(inputs: dict[str, Any]) -> Stream:
            inputs["past_key_values"] = DynamicCache(config=self.model.config.get_text_config(decoder=True))  # type: ignore
            generation.streams.append(Stream(self._run_stream, inputs, rows))
            return generation.streams[-1]

        prompt = Prompt(
            generation.geometry,
            embeddings=lambda: self._embeddings(named, n),
            text_pass=lambda x, mask, kinds: (module if kinds else self.anatomy.decoder)(
                inputs_embeds=x, attention_mask=mask.long(), use_cache=False, **kinds
            ),
            image_pass=lambda: module(**{**named, "past_key_values": None, "use_cache": False}),
            capture=self._capture,
            model=self.model,
            inputs=named if scope is None else scope.inputs,
            prefill=named,
            stream=stream,
        )
        for i, one in self._in_force():
            if one.acts_at("begin"):
                one.begin(prompt, generation.memos[i])

    @torch.no_grad()
    def _run_stream(self, inputs: dict[str, Any]) -> Any:
        """The untouched model on a second stream."""
        seeing = any(inputs.get(argument) is not None for argument in PICTURE_ARGUMENTS)
        if seeing and self.anatomy.model_type in MISPLACES_CACHE:
            raise TypeError(f"{self.anatomy.model_type} cannot run a second stream with pictures of its own")
        module, parameters = (
            (self.model, self._parameters[0]) if seeing else (self.anatomy.generator, self._parameters[-1])
        )
        with self.only(()):
            return module(**inputs, **({"logits_to_keep": 1} if "logits_to_keep" in parameters else {}))

    def _embeddings(self, named: dict[str, Any], n: int) -> Tensor:
        if named.get("inputs_embeds") is not None:
            return named["inputs_embeds"][:, :n]
        embed = self.model.get_input_embeddings()  # type: ignore[operator]
        ids = named["input_ids"][:, :n]
        return embed(ids.clamp(max=embed.weight.shape[0] - 1))  # some placeholder ids lie outside the table

    def _capture(self, run: Callable[[], Any], positions: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """Head outputs (B, H, d) at `positions` (B,) of a pass with nothing in force."""
        found: dict[int, Tensor] = {}
        self._local.capture = (positions, found)
        try:
            with torch.no_grad():
                run()
            return {layer: found[layer] for layer in layers if layer in found}
        finally:
            self._local.capture = None


class _LogitsStage(LogitsProcessor):
    """What `generate` calls with the scores of the next token."""

    def __init__(self, attachment: Attachment, edits: list[tuple[int, Intervention]]):
        self.attachment, self.edits = attachment, edits
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scope = self.attachment._local.scope
        if scope is None or scope.generation is None:
            return scores
        if self.start is None:
            self.start = input_ids.shape[1]
        scope.generation.follow(input_ids, scope.n_beams, self.attachment.anatomy.image_token_ids)
        for i, one in self.edits:
            scores = one.logits(scores, Step(input_ids.shape[1] - self.start, scope.generation.memos[i]))
        return scores


class _HeadHook:
    """Forward pre-hook on one output projection: the heads stage."""

    def __init__(self, attachment: Attachment, layer: int, edits: list[tuple[int, Intervention]]):
        self.attachment, self.layer, self.edits = attachment, layer, edits

    @attention.between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        a, local = self.attachment.anatomy, self.attachment._local
        x = args[0]
        parts = a.layers[self.layer]
        o = x.reshape(*x.shape[:-1], parts.n_heads, parts.head_dim)
        if local.capture is not None:
            positions, found = local.capture
            found[self.layer] = o[torch.arange(len(o), device=o.device), positions.to(o.device)]
        call = local.call
        if call is None or not self.edits:
            return None
        o, others = o.split([call.n_samples, len(o) - call.n_samples])
        for i, one in self.edits:
            if i not in call.generation.force:
                continue
            site = call.site(i, one.rows, self.layer, len(a.layers), call.start + call.n_rows, slice(None), o.device)
            o = one.heads(o, site)
        return (torch.cat([o, others]).reshape(x.shape), *args[1:])


class _TokensHook:
    """Around decoder layers: the tokens stage. `layer` is the layer about to run; their number, after the last."""

    def __init__(self, attachment: Attachment, layer: int, edits: list[tuple[int, Intervention]]):
        self.attachment, self.layer, self.edits = attachment, layer, edits

    @attention.between_compiled_pieces
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook on a layer."""
        given = {"hidden_states": args[0], **kwargs} if args else kwargs
        new = self._edited(given)
        if new is given:
            return None
        return ((new["hidden_states"], *args[1:]), {k: new[k] for k in kwargs}) if args else ((), new)

    @attention.between_compiled_pieces
    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook on the last layer."""
        x = output[0] if isinstance(output, tuple) else output
        new = self._edited({"hidden_states": x})["hidden_states"]
        return None if new is x else ((new, *output[1:]) if isinstance(output, tuple) else new)

    def _edited(self, inputs: dict[str, Any]) -> dict[str, Any]:
        call, layers = self.attachment.call(), self.attachment.anatomy.layers
        if call is None:
            return inputs
        parts, device = layers[min(self.layer, len(layers) - 1)], inputs["hidden_states"].device
        for i, one in self.edits:
            if i in call.generation.force:
                n = call.start + call.n_rows
                site = call.site(i, one.rows, self.layer, len(layers), n, slice(None), device)
                look: Any = partial(attention.queries_and_keys, parts.module, parts.attention)  # type: ignore[arg-type]
                inputs = one.tokens(inputs, site, look)
        return inputs


class _InputHook:
    """Forward pre-hook on one decoder layer: shows interventions the layer's input, for the prompt's rows only."""

    def __init__(self, attachment: Attachment, layer: int, edits: list[tuple[int, Intervention]]):
        self.attachment, self.layer, self.edits = attachment, layer, edits

    @attention.between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.attachment.call()
        if call is None or call.n_prompt == 0:
            return
        x = args[0] if args else kwargs["hidden_states"]
        for i, one in self.edits:
            if i not in call.generation.force:
                continue
            site = call.prompt_site(i, self.layer, len(self.attachment.anatomy.layers), x.device)
            one.layer_input(x[:, : call.n_prompt], site)


def describe(entry: Entry) -> dict[str, Any]:
    """An intervention for a record: name, settings as resolved on the model, and the facts found."""
    return {**(entry.active or entry.requested).to_json(), "facts": entry.facts}


def _valid(mask: Any, image: Tensor, start: int) -> Tensor:
    """(B, n) bool: which prompt rows `start..` are no padding, from any form of attention mask."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return torch.ones_like(image)
    if mask.dim() == 4:
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    n = image.shape[1]
    piece = mask[:, start : start + n] if mask.shape[1] >= start + n else mask[:, -n:]
    return piece.to(image.device).bool().expand_as(image)
