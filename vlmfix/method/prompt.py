"""What `Intervention.begin` gets: the whole prompt before its first pass, and passes of the untouched model over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vlmfix.model.geometry import Geometry

Readable = Literal["heads", "mlp", "hidden"]
"""What can be read of a layer: the names of `stages.READINGS`."""


class SecondStream(Protocol):
    """Other inputs that get the same answer, token by token, in the untouched model."""

    @property
    def logits(self) -> Tensor:
        """(rows, V) float32, of the next token."""


class Passes(Protocol):
    """Passes of the untouched model, which the engine runs."""

    def embeddings(self) -> Tensor:
        """(B, T, D) text embeddings of the prompt; under image tokens they mean nothing."""

    def text(self, x: Tensor, mask: Tensor, kinds: dict[str, Tensor]) -> Any:
        """Over embeddings (B, T', D) of text, with a mask (B, T') and, in models that go by them, kinds of tokens."""

    def whole(self) -> Any:
        """Over the whole prompt, image included."""

    def capture(
        self, reading: Readable, run: Callable[[], Any], positions: Tensor, layers: Iterable[int]
    ) -> dict[int, Tensor]:
        """What can be read of layers in the pass `run`, at one position (B,) per sample."""

    def stream(self, inputs: dict[str, Any]) -> SecondStream:
        """A second stream that starts from these inputs."""


@dataclass(frozen=True)
class Prompt:
    """The whole prompt, as `Intervention.begin` gets it. B samples, T tokens."""

    geometry: Geometry
    """Masks over the T tokens."""
    model: nn.Module
    inputs: dict[str, Any]
    """What the model was given: `input_ids`, `pixel_values` ...; one row per sample, beams not yet told apart."""
    prefill: dict[str, Any]
    """What the forward pass got of it: one row per beam, pictures perhaps encoded already."""
    passes: Passes

    def capture(self, reading: Readable, layers: Iterable[int], *, image: bool = True) -> dict[int, Tensor]:
        """What can be read of layers at the last token of the prompt, by layer, in a pass of the untouched model:
        `heads` (B, H, d), `mlp` (B, D) or `hidden` (B, D). `Traits.captures` of the method names it beforehand.

        With `image=False` all image tokens are deleted and the other tokens close up; that pass goes through the plain
        text decoder. Layers that have no such part are left out. Raises `ValueError` for what was not named.
        """
        if image:
            return self.passes.capture(reading, self.passes.whole, self.geometry.last_prompt, layers)
        order, mask = self._image_free()
        embeddings = self._taken(self.passes.embeddings(), order)
        last = torch.full_like(order[:, 0], order.shape[1] - 1)

        def run() -> Any:
            return self.passes.text(embeddings, mask, self._kinds(order))

        return self.passes.capture(reading, run, last, layers)

    def image_free_stream(self) -> SecondStream:
        """A second stream in which all image tokens are deleted; the other tokens close up."""
        order, mask = self._image_free()
        inputs: dict[str, Any] = {"attention_mask": mask.long(), **self._kinds(order)}
        positions = self.prefill.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).expand(*positions.shape[:-1], -1)
        ids = self.prefill.get("input_ids")
        if ids is not None:
            return self.passes.stream({"input_ids": ids.gather(1, order), **inputs})
        return self.passes.stream({"inputs_embeds": self._taken(self.passes.embeddings(), order), **inputs})

    def stream_with(self, **changes: Any) -> SecondStream:
        """A second stream that differs from the first in these inputs only (`pixel_values=...`)."""
        rows: Tensor = self.inputs["input_ids" if "input_ids" in self.inputs else "inputs_embeds"]
        mask = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        inputs = {"attention_mask": mask, **self.inputs, **changes}
        positions = self.prefill.get("position_ids")
        if positions is not None:
            n_beams = positions.shape[-2] // len(rows)
            inputs["position_ids"] = positions[..., ::n_beams, :]
        return self.passes.stream(inputs)

    def stream_with_text(self, ids: Sequence[int], at: Tensor) -> SecondStream:
        """A second stream in whose prompts the tokens `ids` stand before the token at position `at` (B,); it sees the
        same pictures. Whatever else the model is told of each token is 0 on them, as on text."""
        rows: Tensor = self.inputs["input_ids" if "input_ids" in self.inputs else "inputs_embeds"]
        device, (n_samples, length) = rows.device, rows.shape[:2]
        new = torch.tensor(list(ids), device=device)
        columns, start = torch.arange(length + len(new), device=device), at.to(device)[:, None]
        within = (columns >= start) & (columns < start + len(new))  # (B, T + n)
        source = torch.where(columns < start, columns, columns - len(new)).clamp(0, length - 1)
        nth = (columns - start).clamp(0, len(new) - 1)
        inputs = {"attention_mask": torch.ones_like(rows[:, :, 0] if rows.dim() == 3 else rows), **self.inputs}
        for name, value in inputs.items():
            if name == "inputs_embeds":
                embedded = self.model.get_input_embeddings()(new)  # type: ignore[operator]
                inputs[name] = torch.where(within[..., None], embedded[nth], self._taken(value, source))
            elif isinstance(value, Tensor) and value.shape == (n_samples, length) and name != "position_ids":
                of_text = new[nth].to(value.dtype) if name == "input_ids" else int(name == "attention_mask")
                inputs[name] = torch.where(within, of_text, value.gather(1, source))
        positions = self.prefill.get("position_ids")
        if positions is not None:
            # What is put in goes on from where it stands, and all that follows stands later by its length.
            own = positions[..., :: positions.shape[-2] // n_samples, :]
            first = own.gather(-1, at.to(device)[:, None].expand(*own.shape[:-1], 1))
            moved = own.gather(-1, source.expand(*own.shape[:-1], -1)) + (columns >= start + len(new)) * len(new)
            inputs["position_ids"] = torch.where(within, first + nth, moved)
        return self.passes.stream(inputs)

    def _image_free(self) -> tuple[Tensor, Tensor]:
        """(B, T') positions of the tokens that are no image tokens, moved together to the right, and their mask."""
        keep = self.geometry.prompt & ~self.geometry.image
        length = int(keep.sum(1).max())
        order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -length:]
        return order, keep.gather(1, order)

    def _kinds(self, order: Tensor) -> dict[str, Tensor]:
        """`token_type_ids` of the tokens that stay, where a model goes by them: prefixes that see both ways."""
        kinds = self.prefill.get("token_type_ids")
        return {} if kinds is None else {"token_type_ids": kinds.gather(1, order)}

    @staticmethod
    def _taken(x: Tensor, order: Tensor) -> Tensor:
        """(B, T', D) entries of (B, T, D) at positions (B, T')."""
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
