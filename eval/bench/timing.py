"""Time and memory of one generation, and statistics over rounds."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts what the process computes, on all cores: for machines that are shared with other work."""
STATIC = {"cache_implementation": "static", "disable_compile": True}
"""Settings of `generate` for models whose forward pass is compiled already."""
FIGURES = ("prefill", "token", "memory")
"""What a `Timing` tells."""


@dataclass(frozen=True)
class Timing:
    """One generation."""

    prefill: float
    """Seconds to the first token."""
    token: float
    """Seconds per further token, the median."""
    memory: float | None
    """Peak bytes, weights included: allocated on a GPU, resident on a CPU under Linux; `None` elsewhere."""


class Stopwatch(LogitsProcessor):
    """Notes when the scores of each token are there, those of methods included."""

    listens = True
    """Comes after the processors that edit."""

    def __init__(self, clock: str) -> None:
        self.clock, self.times = clock, [now(clock)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor of `generate`."""
        self.times.append(now(self.clock))
        return scores


def now(clock: str) -> float:
    """Seconds by a clock, after all work that the GPU still has."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


@torch.inference_mode()
def measure(
    model: Any, inputs: dict[str, Tensor], new_tokens: int, clock: str = "wall", settings: dict[str, Any] | None = None
) -> Timing:
    """Time one generation, with more settings of `generate`."""
    _forget_peak()
    watch = Stopwatch(clock)
    how = {"max_new_tokens": new_tokens + 1, "do_sample": False, "pad_token_id": 0, **(settings or {})}
    model.generate(**inputs, logits_processor=[watch], **how)
    steps = np.diff(watch.times)
    return Timing(float(steps[0]), float(np.median(steps[1:])), _peak())


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # 5: the kernel forgets the peak of resident memory


def _peak() -> float | None:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * float(line.split()[1])
    return None


def summary(timings: Sequence[Timing], untouched: Sequence[Timing]) -> dict[str, Any]:
    """Medians with quartiles, and ratios to the untouched model within rounds with 95 % bootstrap intervals."""
    row: dict[str, Any] = {}
    for figure in FIGURES:
        values = [getattr(timing, figure) for timing in timings]
        reference = [getattr(timing, figure) for timing in untouched]
        if None not in values and None not in reference:
            row[figure] = {
                "median": statistics.median(values),
                "quartiles": np.percentile(values, [25, 75]).tolist(),
                **ratio(values, reference),
            }
    return row


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Median of the ratios within rounds, and the 95 % interval of a bootstrap over rounds."""
    ratios = np.array(values) / np.array(reference)
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    medians = np.median(draws, axis=1)
    return {"ratio": float(np.median(ratios)), "interval": np.percentile(medians, [2.5, 97.5]).tolist()}


def machine_facts(model: Any) -> dict[str, Any]:
    """What was measured with, for the results."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """Of this machine."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()
