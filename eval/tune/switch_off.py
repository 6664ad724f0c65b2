"""Switch heads off, one at a time, and see what that does: many heads in one batch, one in each of its sequences.

Zhou et al., "On the Role of Attention Heads in Large Language Model Safety", arXiv 2410.13708.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.asking.asker import Asker
from vlmfix.method.intervention import Intervention
from vlmfix.method.site import Rows, Site
from vlmfix.model.anatomy import DecoderLayer, anatomy

Mode = Literal["output", "uniform"]
"""How a head is switched off. `output`: the head says `eps` times what it would say. `uniform`: its attention scores
times `eps`, so that it says the mean of all values that it may look at."""
PAPER_EPS: dict[Mode, float] = {"output": 0.0, "uniform": 1e-5}
"""What is left of the output or of the scores (the authors' code)."""
Read = Callable[[dict[str, Any]], Tensor]
"""Runs the model on inputs of B sequences and gives what is looked at: (B, ...)."""


@dataclass(frozen=True)
class SwitchOff(Intervention):
    """One head of one layer switched off, another one in each sequence of the batch, at all positions."""

    rows: ClassVar[Rows] = "all"

    layer: int
    off: tuple[int, ...]
    """Head that is off in each sequence; -1 is none."""
    mode: Mode = "output"
    eps: float = 0.0
    """1 changes nothing."""

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
        is_off = torch.tensor(self.off, device=like.device)[:, None] == torch.arange(n_heads, device=like.device)
        return torch.where(is_off, self.eps, 1.0).to(like.dtype)


def tiled(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    """The batch `n` times over: sequence b of copy i is at i * B + b. Holds for pictures laid end to end as well."""
    copies = {}
    for name, value in inputs.items():
        copies[name] = value.repeat(n, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value
    return copies


@contextmanager
def layer_inputs(layers: Sequence[DecoderLayer]) -> Iterator[list[Tensor]]:
    """Fills the list with the input (B, T, D) of each layer of the passes inside."""
    inputs: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield inputs


@contextmanager
def resumed(layers: Sequence[DecoderLayer], at: int, x: Tensor) -> Iterator[None]:
    """Passes inside do nothing before layer `at`, which gets `x` (B, T, D): what earlier layers did is known."""

    def give_x(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    # Libraries that place layers on devices leave a `forward` of their own on the object, before the class's. It is put
    # back where there was one; elsewhere ours is deleted, so that the class's comes to light again.
    skipped = [layer.module for layer in layers[:at]]
    own_forwards = [module.__dict__.get("forward") for module in skipped]
    handle = layers[at].module.register_forward_pre_hook(give_x, with_kwargs=True, prepend=True)
    try:
        for module in skipped:
            module.__dict__["forward"] = skip
        yield
    finally:
        handle.remove()
        for module, forward in zip(skipped, own_forwards, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def each_head_off(
    model: Any, inputs: dict[str, Any], read: Read, *, mode: Mode = "output", eps: float = 0.0, rows: int = 64
) -> Iterator[tuple[int, list[int], Tensor]]:
    """What `read` gives with each head off in its turn: layer, heads, and (heads, B, ...).

    At most `rows` sequences go through the model at once, or B if that is more. Layers below the head's are not
    computed again.
    """
    parts = anatomy(model)
    with layer_inputs(parts.layers) as known:
        batch = len(read(inputs))
    is_one_stream = all(isinstance(x, Tensor) and len(x) == batch for x in known)
    if not is_one_stream or len(known) != len(parts.layers):
        raise TypeError(f"{type(model).__name__} does not pass one hidden state through its layers, one after another")
    heads_per_pass = max(1, rows // batch)
    for layer, x in enumerate(known):
        for first in range(0, parts.n_heads, heads_per_pass):
            heads = list(range(first, min(first + heads_per_pass, parts.n_heads)))
            head_of_sequence = tuple(head for head in heads for _ in range(batch))
            switched_off = Asker(model, None, SwitchOff(layer, head_of_sequence, mode, eps))
            with switched_off.applied(), resumed(parts.layers, layer, x.repeat(len(heads), 1, 1)):
                values = read(tiled(inputs, len(heads)))
            yield layer, heads, values.view(len(heads), batch, *values.shape[1:])
