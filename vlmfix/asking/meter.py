"""What an answer costs: passes and rows of the text decoder."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Meter:
    """Counts what goes through a model's text decoder in this thread, for the length of a `with` block."""

    def __init__(self, model: Any) -> None:
        self.passes = 0
        """Forward passes, one for each sequence of a batch."""
        self.tokens = 0
        """Rows of these passes, padding included."""
        self._thread = threading.get_ident()
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else model

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
        shape = next((x.shape for x in inputs if isinstance(x, torch.Tensor)), None)
        if shape is not None and threading.get_ident() == self._thread:
            self.passes += shape[0]
            self.tokens += shape[0] * shape[1]

    def __enter__(self) -> Meter:
        self._handle = self._decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
