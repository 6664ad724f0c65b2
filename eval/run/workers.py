"""The processes that share a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Workers:
    """The processes that share a run: this one's rank, their number, and a barrier."""

    rank: int = 0
    n: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def found(cls) -> Workers:
        """Those that `accelerate launch` or torchrun started; this process alone without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState
        from torch import distributed

        if not distributed.is_initialized():
            # `accelerate launch` keeps one store over its restarts: addresses of dead processes must not be found there
            store, rank, n = next(distributed.rendezvous("env://"))
            attempt = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, store=attempt, rank=rank, world_size=n)
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)
