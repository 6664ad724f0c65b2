"""The hooks that carry the stages: one class for each place in the model, all by the same rule.

Find the pass, take the first stream's rows, let the interventions in force edit them one after the other, each with its
site, and put the rows back. Where no intervention acts at a stage there is no hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import LogitsProcessor, cache_utils

from vlmfix.engine import attention
from vlmfix.engine.attention import between_compiled_pieces
from vlmfix.engine.passes import Pass
from vlmfix.engine.plan import Placed
from vlmfix.engine.running import Running
from vlmfix.method.prompt import Readable
from vlmfix.method.site import Step
from vlmfix.method.stages import ASK_STAGES, ATTENTION_STAGES
from vlmfix.model.anatomy import Anatomy, DecoderLayer


class StageHook:
    """What the hooks of one layer have in common. `edits` are the interventions that act at its stage in this layer;
    `reads` tells whether something may be read there by `prompt.capture`."""

    stage: ClassVar[str]
    reading: ClassVar[Readable | None] = None

    def __init__(self, running: Running, parts: Anatomy, layer: int, edits: list[Placed], reads: bool = False):
        self.running, self.layer, self.edits, self.reads = running, layer, edits, reads
        self.layers: tuple[DecoderLayer, ...] = parts.layers

    @classmethod
    def module(cls, layer: DecoderLayer) -> nn.Module | None:
        """Where in a layer it sits; `None` if the layer has no such part."""
        return layer.module if layer.attention is not None else None

    def register(self, module: nn.Module) -> Any:
        """Put it on, and give the handle that takes it off."""
        return module.register_forward_hook(self, with_kwargs=True)  # type: ignore[arg-type]

    @property
    def current(self) -> Pass | None:
        """The pass that this thread is in; `None`: the model runs untouched."""
        return self.running.pass_to_edit(self.edits)

    def capture(self, x: Tensor) -> None:
        """Note what a reading pass asks for of (B, Q, ...)."""
        if self.running.thread.capture is not None and self.reads:
            self.note(x)

    @between_compiled_pieces
    def note(self, x: Tensor) -> None:
        """For whoever reads."""
        capture = self.running.thread.capture
        if capture is not None and capture.reading == self.reading:
            capture.note(self.layer, x)

    def edited(self, value: Any, this_pass: Pass, device: Any, n_keys: int | None = None) -> Any:
        """What the interventions in force make of a value, one after the other."""
        n_keys = this_pass.start + this_pass.n_rows if n_keys is None else n_keys
        for i, one in self.edits:
            if i in this_pass.generation.force:
                site = this_pass.site(i, one.rows, self.layer, len(self.layers), n_keys, slice(None), device)
                value = self.act(one, value, site)
        return value

    def edited_rows(self, x: Tensor) -> Tensor:
        """(B, Q, ...) as the interventions in force make it, second streams' rows left alone."""
        this_pass = self.current
        if this_pass is None or not self.edits:
            return x
        own = this_pass.own(x)
        if this_pass.plan is None:
            new = self.edited_in_general(own, this_pass)
        else:
            new = own
            for one, site in this_pass.plan.at(self.stage, self.layer):
                new = self.act(one, new, site)
        return x if new is own else this_pass.rejoin(new, x)

    @between_compiled_pieces
    def edited_in_general(self, x: Tensor, this_pass: Pass) -> Tensor:
        """Where a pass has no plan."""
        return self.edited(x, this_pass, x.device)

    def act(self, one: Any, value: Any, site: Any) -> Any:
        """One intervention's edit."""
        return getattr(one, self.stage)(value, site)


class InputHook(StageHook):
    """Shows a decoder layer's input, for the prompt's rows only."""

    stage = "layer_input"

    def register(self, module: nn.Module) -> Any:
        """Before the layer."""
        return module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the interventions see `hidden_states` (B, Q, D)."""
        this_pass = self.current
        if this_pass is not None and this_pass.plan is None:
            self.show(args[0] if args else kwargs["hidden_states"], this_pass)

    @between_compiled_pieces
    def show(self, x: Tensor, this_pass: Pass) -> None:
        """To the interventions in force."""
        if this_pass.n_prompt == 0:
            return
        for i, one in self.edits:
            if i in this_pass.generation.force:
                site = this_pass.prompt_site(i, self.layer, len(self.layers), x.device)
                one.layer_input(x[:, : this_pass.n_prompt], site)


class TokensHook(StageHook):
    """Edits what a decoder layer gets."""

    stage = "tokens"

    def register(self, module: nn.Module) -> Any:
        """Before the layer."""
        return module.register_forward_pre_hook(self, with_kwargs=True)

    @between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: the layer gets the arguments that come back."""
        inputs = {"hidden_states": args[0], **kwargs} if args else kwargs
        new = self.edited_inputs(inputs)
        if new is inputs:
            return None
        if not args:
            return (), new
        return (new["hidden_states"], *args[1:]), {name: new[name] for name in kwargs}

    def edited_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the layer gets instead."""
        this_pass = self.current
        if this_pass is None:
            return inputs
        return self.edited(inputs, this_pass, inputs["hidden_states"].device)

    def act(self, one: Any, value: Any, site: Any) -> Any:
        """With a way to look at the layer's queries and keys."""
        parts = self.layers[min(self.layer, len(self.layers) - 1)]
        look: Any = partial(attention.queries_and_keys, parts.module, parts.attention)  # type: ignore[arg-type]
        return one.tokens(value, site, look)


class LastTokensHook(TokensHook):
    """Edits what the last decoder layer gives, as the layer that would come after it."""

    def register(self, module: nn.Module) -> Any:
        """After the layer."""
        return module.register_forward_hook(self)

    @between_compiled_pieces
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: what comes back goes on in the place of the layer's output."""
        x = _first(output)
        new = self.edited_inputs({"hidden_states": x})["hidden_states"]
        return None if new is x else _with_first(output, new)


class HeadsHook(StageHook):
    """Edits the head outputs that an output projection gets."""

    stage = "heads"
    reading = "heads"

    @classmethod
    def module(cls, layer: DecoderLayer) -> nn.Module | None:
        """The output projection."""
        return layer.out_proj

    def register(self, module: nn.Module) -> Any:
        """Before the projection."""
        return module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: the projection gets the heads (B, Q, H, d) that come back, joined."""
        joined, parts = args[0], self.layers[self.layer]
        o = joined.reshape(*joined.shape[:-1], parts.n_heads, parts.head_dim)
        self.capture(o)
        new = self.edited_rows(o)
        return None if new is o else (new.reshape(joined.shape), *args[1:])


class CacheHook(StageHook):
    """Edits the keys and values that a layer has in the cache, after its attention."""

    stage = "cache"
    KINDS: ClassVar[tuple[str, ...]] = (
        "DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )  # fmt: skip
    """Kinds of a layer's cache that hold keys and values as plain tensors (B, Hk, K, d), which may be replaced."""

    @classmethod
    def module(cls, layer: DecoderLayer) -> nn.Module | None:
        """The attention."""
        return layer.attention

    @between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: the cache keeps the keys and values that come back."""
        this_pass = self.current
        if this_pass is None or not any(i in this_pass.generation.force for i, _ in self.edits):
            return
        if getattr(module, "is_kv_shared_layer", False):
            return  # its keys are those of an earlier layer, which has seen to them
        kept = self.kept([*args, *kwargs.values()])
        keys, values = self.edited((kept.keys, kept.values), this_pass, kept.keys.device, kept.keys.shape[-2])
        if (keys.shape, values.shape) != (kept.keys.shape, kept.values.shape):
            raise ValueError(
                f"cache: expected keys and values of shapes {tuple(kept.keys.shape)} and {tuple(kept.values.shape)} "
                f"back, got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        kept.keys, kept.values = keys, values

    def kept(self, arguments: list[Any]) -> Any:
        """The layer's part of the cache, from what its attention was called with. `ValueError` where there is none
        that can be edited."""
        names = ", ".join(one.name or type(one).__name__ for _, one in self.edits)
        cache = next((x for x in arguments if isinstance(x, cache_utils.Cache)), None)
        if cache is None:
            raise ValueError(f"{names} edits the cache, and this pass has none; leave out use_cache=False")
        index = self.layers[self.layer].cache_index
        kept = cache.layers[self.layer if index is None else index]
        known = type(kept).__name__ in self.KINDS and type(kept).__module__ == cache_utils.__name__
        if not known or getattr(cache, "offloading", False):
            kind = "an offloaded cache" if known else f"a cache of {type(kept).__name__}"
            raise ValueError(
                f"{names} edits keys and values, and cannot in {kind}; leave out cache_implementation, so that the "
                f"cache is a DynamicCache"
            )
        return kept

    def act(self, one: Any, value: Any, site: Any) -> Any:
        """Of keys and values."""
        return one.cache(*value, site)


class MlpHook(StageHook):
    """Edits the output of a layer's MLP."""

    stage = "mlp"
    reading = "mlp"

    @classmethod
    def module(cls, layer: DecoderLayer) -> nn.Module | None:
        """The MLP."""
        return layer.mlp

    def register(self, module: nn.Module) -> Any:
        """After the MLP."""
        return module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the (B, Q, D) that come back go on in the place of the MLP's output."""
        this_pass, capture = self.current, self.running.thread.capture
        if capture is not None:
            batch = len(capture.positions)
        elif this_pass is not None:
            batch = this_pass.batch
        else:
            return None
        rows = _first(output)
        # Experts, and OPT, put the rows of all samples one after the other.
        x = rows if rows.dim() == 3 else rows.reshape(batch, -1, rows.shape[-1])
        self.capture(x)
        new = self.edited_rows(x)
        return None if new is x else _with_first(output, new.reshape(rows.shape))


class OutputHook(StageHook):
    """Reads the output of a decoder layer: for `prompt.capture`, and in every pass for `step.hidden`."""

    stage = "hidden"
    reading = "hidden"

    @classmethod
    def module(cls, layer: DecoderLayer) -> nn.Module | None:
        """The whole layer."""
        return layer.module

    def register(self, module: nn.Module) -> Any:
        """After the layer."""
        return module.register_forward_hook(self)

    @between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: the layer's output (B, Q, D) is noted."""
        x, this_pass = _first(output), self.current
        self.capture(x)
        if this_pass is not None and any(i in this_pass.generation.force for i, _ in self.edits):
            last = this_pass.own(x)[:, -1]
            # A view would keep the hidden states of the whole prompt in memory.
            this_pass.generation.hidden[self.layer] = last.clone() if x.shape[1] > 1 else last


class EmbeddingHook(OutputHook):
    """Reads what the first layer gets, as the output of a layer -1."""

    def register(self, module: nn.Module) -> Any:
        """Before the layer."""
        return module.register_forward_pre_hook(self, with_kwargs=True)

    @between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the layer's input (B, Q, D) is noted."""
        super().__call__(module, args, args[0] if args else kwargs["hidden_states"])


class LogitsStage(LogitsProcessor):
    """What `generate` calls with the scores of the next token."""

    penalties_follow = False
    """Whether penalties of the model's own come after it, here and now."""

    def __init__(self, running: Running, parts: Anatomy, edits: list[Placed], before_penalties: bool = False):
        self.running, self.edits, self.before_penalties = running, edits, before_penalties
        self.image_token_ids, self.head = parts.image_token_ids, parts.lens
        n_layers = len(parts.layers)
        self.hidden_layers = {i: tuple(one.hidden_layers(n_layers)) for i, one in edits}
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor of `generate`."""
        scope = self.running.thread.scope
        if scope is None or scope.generation is None:
            return scores
        if self.start is None:
            # A second call may go on with an answer: its first token is then not the answer's.
            width = input_ids.shape[1]
            self.start = width if scope.prompt_end is None else min(scope.prompt_end, width)
        generation, index = scope.generation, input_ids.shape[1] - self.start
        generation.follow(input_ids, scope.n_beams, self.image_token_ids)
        for i, one in self.edits:
            states = {layer: generation.hidden[layer] for layer in self.hidden_layers[i]}
            as_logits = self.penalties_follow and scope.n_beams == 1
            head = self.head if one.traits.lens else None
            has_image = generation.geometry.image.any(1)
            step = Step(index, generation.memos[i], states, as_logits=as_logits, has_image=has_image, head=head)
            scores = one.logits(scores, step)
        return scores


class AskHook:
    """Says once, whoever runs the decoder, that methods of `ask` do nothing outside of it."""

    def __init__(self, running: Running):
        self.running = running

    @between_compiled_pieces
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first layer."""
        if self.running.thread.capture is None:
            self.running.warn_of_ask()


HOOKS: tuple[type[StageHook], ...] = (InputHook, TokensHook, HeadsHook, CacheHook, MlpHook)
"""One for each stage inside a layer, in the order of their registration."""


def put_on(running: Running, parts: Anatomy) -> Iterator[Any]:
    """Put on all hooks inside the decoder that the interventions need; gives the handles that take them off."""
    n_layers = len(parts.layers)
    guides = [(i, one) for i, one in running.active if one.acts_at("logits")]
    at_layers = {i: set(one.at_layers(n_layers)) for i, one in running.active}
    hidden_layers = {i: set(one.hidden_layers(n_layers)) for i, one in guides}
    may_join = bool(guides) and "attention" not in parts.lacks
    readers = [(i, one) for i, one in guides if -1 in hidden_layers[i]]
    if readers:
        yield EmbeddingHook(running, parts, -1, readers).register(parts.layers[0].module)
    if any(any(map(one.acts_at, ASK_STAGES)) for _, one in running.active):
        yield parts.layers[0].module.register_forward_pre_hook(AskHook(running))
    for number, layer in enumerate(parts.layers):
        here = [(i, one) for i, one in running.active if number in at_layers[i]]
        readings: set[str] = set()
        for _, one in here:
            readings.update(one.traits.captures if one.acts_at("begin") else ())
        for kind in HOOKS:
            module = kind.module(layer)
            edits = [(i, one) for i, one in here if one.acts_at(kind.stage)]
            if module is not None and (edits or kind.reading in readings):
                yield kind(running, parts, number, edits, kind.reading in readings).register(module)
        edits = [(i, one) for i, one in here if any(map(one.acts_at, ATTENTION_STAGES))]
        if layer.attention is not None and (edits or may_join):
            view = attention.AttentionView(
                layer.attention, number, n_layers, edits, partial(running.pass_to_edit, [*edits, *guides])
            )
            yield attention.attach(layer.attention, view)
        if number == n_layers - 1:  # before the layer's output is read
            edits = [(i, one) for i, one in running.active if one.acts_at("tokens")]
            if edits:
                yield LastTokensHook(running, parts, n_layers, edits).register(layer.module)
        edits = [(i, one) for i, one in guides if number in hidden_layers[i]]
        if edits or "hidden" in readings:
            yield OutputHook(running, parts, number, edits, "hidden" in readings).register(layer.module)


def _first(output: Any) -> Tensor:
    """The hidden states among what a module gives."""
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, x: Tensor) -> Any:
    """What a module gives, with other hidden states."""
    return (x, *output[1:]) if isinstance(output, tuple) else x
