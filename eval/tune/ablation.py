"""Switch heads off, one at a time, and see what that does: many heads in one batch, one in each of its sequences.

Zhou et al., "On the Role of Attention Heads in Large Language Model Safety", arXiv 2410.13708.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.engine.wrap import wrapped
from vlmfix.method.intervention import Intervention
from vlmfix.method.site import Rows, Site
from vlmfix.model.anatomy import DecoderLayer, anatomy

Read = Callable[[dict[str, Any]], Tensor]
"""Runs the model on inputs of B sequences and gives what is looked at: (B, ...)."""


@dataclass(frozen=True)
class SwitchOff(Intervention):
    """One head of one layer switched off, another one in each sequence of the batch, at all positions."""

    rows: ClassVar[Rows] = "all"

    layer: int
    off: tuple[int, ...]
    """Head that is off in each sequence; -1 is none."""
    mode: Literal["output", "uniform"] = "output"
    """`output`: the head says `eps` times what it would say. `uniform`: its attention scores times `eps`, so that it
    says the mean of all values it may look at."""
    eps: float = 0.0
    """1 changes nothing."""

    def __post_init__(self) -> None:
        """Check the mode."""
        if self.mode not in ("output", "uniform"):
            raise ValueError(f"mode: expected output or uniform, got {self.mode!r}")

    def at_layers(self, n_layers: int) -> tuple[int, ...]:
        """The head's."""
        return (self.layer,)

    def acts_at(self, stage: str) -> bool:
        """Where the mode acts."""
        return stage == {"output": "heads", "uniform": "scores"}[self.mode]

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """Scale the head's output."""
        return o * self._gain(o, o.shape[2])[:, None, :, None]

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """Scale the head's scores; hidden keys stay hidden."""
        return s * self._gain(s, s.shape[1])[:, :, None, None]

    def _gain(self, like: Tensor, n_heads: int) -> Tensor:
        """(B, H)."""
        off = torch.tensor(self.off, device=like.device)[:, None] == torch.arange(n_heads, device=like.device)
        return torch.where(off, self.eps, 1.0).to(like.dtype)


def tiled(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    """The batch `n` times over: sequence b of copy i is at i * B + b. Holds for pictures laid end to end as well."""
    return {k: v.repeat(n, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v for k, v in inputs.items()}


@contextmanager
def layer_inputs(layers: Sequence[DecoderLayer]) -> Iterator[list[Tensor]]:
    """Fills the list with the input (B, T, D) of each layer of the passes inside."""
    found: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield found


@contextmanager
def resumed(layers: Sequence[DecoderLayer], at: int, x: Tensor) -> Iterator[None]:
    """Passes inside do nothing before layer `at`, which gets `x` (B, T, D): what earlier layers did is known."""

    def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def idle(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    skipped = [layer.module for layer in layers[:at]]
    own = [module.__dict__.get("forward") for module in skipped]
    handle = layers[at].module.register_forward_pre_hook(give, with_kwargs=True, prepend=True)
    try:
        for module in skipped:
            module.__dict__["forward"] = idle
        yield
    finally:
        handle.remove()
        for module, forward in zip(skipped, own, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def each_head_off(
    model: Any, inputs: dict[str, Any], read: Read, *, mode: str = "output", eps: float = 0.0, rows: int = 64
) -> Iterator[tuple[int, list[int], Tensor]]:
    """What `read` gives with each head off in its turn: layer, heads, and (heads, B, ...).

    At most `rows` sequences go through the model at once, or B if that is more. Layers below the head's are not
    computed again.
    """
    parts = anatomy(model)
    with layer_inputs(parts.layers) as known:
        batch = len(read(inputs))
    if not all(isinstance(x, Tensor) and len(x) == batch for x in known) or len(known) != len(parts.layers):
        raise TypeError(f"{type(model).__name__} does not pass one hidden state through its layers, one after another")
    per_pass = max(1, rows // batch)
    for layer, x in enumerate(known):
        for first in range(0, parts.n_heads, per_pass):
            heads = list(range(first, min(first + per_pass, parts.n_heads)))
            off = SwitchOff(layer, tuple(h for h in heads for _ in range(batch)), mode, eps)  # type: ignore[arg-type]
            with wrapped(model, off), resumed(parts.layers, layer, x.repeat(len(heads), 1, 1)):
                seen = read(tiled(inputs, len(heads)))
            yield layer, heads, seen.view(len(heads), batch, *seen.shape[1:])


def logits_at(model: Any, inputs: dict[str, Any], positions: Sequence[int]) -> Tensor:
    """Log-probabilities (B, R, V), float32, of what follows each of R positions; -1 is the last."""
    n = inputs["input_ids"].shape[1]
    index = torch.tensor([p % n for p in positions], device=inputs["input_ids"].device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=index).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, index]
    return logits.float().log_softmax(-1)
