"""A task under several processes of one machine: each takes whole runs, so that answers are those of one process.

For small models on a CPU, which leave cores idle. Several processes can also share the questions of one run, on GPUs:
see `workers`. No torch here; the processes load it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmfix.eval.api import Setup, Task, evaluate
from vlmfix.eval.benchmarks.questions import YesNo
from vlmfix.eval.run.progress import Progress
from vlmfix.eval.run.results import Run
from vlmfix.method.registry import spec_of

CAPTION = 8
"""How many times as long as a yes/no answer a caption takes, about; decides on the order alone."""
_state: dict[str, Any] = {}
"""Of a process: its model, and the queue that hears of its progress."""


@dataclass(frozen=True)
class Unit:
    """What one process asks at a time: one benchmark under one method, or under several that share their pictures."""

    task: Task
    places: tuple[int, ...]
    """Of its runs, among all runs."""
    cost: int


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def units_of(setups: Sequence[Setup]) -> list[Unit]:
    """The parts of tasks that can be asked apart, the longest first."""
    units: list[Unit] = []
    first = 0
    for setup in setups:
        for bench in setup.benches:
            together: list[int] = []
            groups: list[list[int]] = [together]
            for place, method in enumerate(setup.methods):
                shares = isinstance(bench, YesNo) and all(part.leaves_pictures for part in method)
                groups[0].append(place) if shares else groups.append([place])
            weight = len(bench.items(setup.data)) * (CAPTION if bench.describes else 1)
            for group in filter(None, groups):
                methods = [spec_of(setup.methods[place]) for place in group]
                task = replace(setup.task, benchmarks=(bench.name,), methods=methods, speed=None, controls=False)
                units.append(Unit(task, tuple(first + place for place in group), weight * len(group)))
            first += len(setup.methods)
    return sorted(units, key=lambda unit: -unit.cost)


def answer_in_processes(
    setups: Sequence[Setup], n: int, progress: Progress | None = None, command: str | None = None
) -> list[Run]:
    """Ask all questions of prepared tasks, which share one model: a run for each benchmark and method, in their order.

    Args:
        setups: The tasks.
        n: How many processes.
        progress: Is told how far all runs are together.
        command: How the user can go on after an interruption.
    """
    units = units_of(setups)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    done: dict[str, int] = {}
    total = sum(len(bench.items(setup.data)) * len(setup.methods) for setup in setups for bench in setup.benches)
    folders: dict[int, Path] = {}
    pool = ProcessPoolExecutor(n, context, _begin, (told, max(1, cores() // n)))
    try:
        waiting: dict[Future[Any], Unit] = {pool.submit(_answer, unit.task, command): unit for unit in units}
        while waiting:
            for future in [future for future in waiting if future.done()]:
                unit = waiting.pop(future)
                paths, said = future.result()
                folders.update(zip(unit.places, paths, strict=True))
                for message in said:
                    warnings.warn(message, stacklevel=2)
            try:
                label, answered = told.get(timeout=0.2)
            except queue.Empty:
                continue
            done[label] = answered
            if progress is not None:
                progress("answers", sum(done.values()), total, "")
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if progress is not None:
        progress("answers", total, total, "")
    return [Run.read(folders[place]) for place in range(len(folders))]


def _begin(told: Any, threads: int) -> None:
    """Make a process ready: the one that started it hears of Ctrl-C and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    _state["told"] = told


def _answer(task: Task, command: str | None) -> tuple[list[Path], list[str]]:
    """Ask one unit: folders of its runs, and what was warned of."""
    from vlmfix.eval.api import load

    model = task.model, task.dtype, task.device_map, task.quantize
    if _state.get("model") != model:
        _state.update(model=model, loaded=load(task))

    def tell(label: str, n_done: int, total: int, figure: str) -> None:
        _state["told"].put((label, n_done))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        runs = evaluate(task, loaded=_state["loaded"], progress=tell, command=command)
    said = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    return [run.folder for run in runs], list(dict.fromkeys(said))
