"""Which questions go through the model together: pictures stay together, large ones first, batches fit the memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image

from vlmfix.asking.pictures import open_picture
from vlmfix.asking.record import Record
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.run.workers import Workers

Failed = Callable[[Item, Exception], None]
"""Hears of a question that could not be asked, and why."""

Ask = Callable[[Sequence[Item], Mapping[str, Image.Image]], list[list[Record]]]
"""Asks a batch of items: records of each method. The mapping has the opened picture of each path."""


def share_of(items: Sequence[Item], workers: Workers) -> list[Item]:
    """The part of the questions that this process asks; those about one picture stay together, in order.

    Large pictures and long prompts come first: neighbours are of like length, so that batches hold little padding, and
    a batch size that is too large for the memory is found out at once.
    """
    by_picture: dict[str, list[Item]] = {}
    for item in items:
        by_picture.setdefault(item.image, []).append(item)

    def size(questions: list[Item]) -> tuple[int, int]:
        return n_pixels(questions[0].image), max(len(item.prompt) for item in questions)

    largest_first = sorted(by_picture.values(), key=size, reverse=True)
    own_pictures = largest_first[workers.rank :: workers.n]
    return [item for questions in own_pictures for item in questions]


def n_pixels(path: str) -> int:
    """Of a picture, by the header of its file; 0 where that cannot be read: which is told when it is opened."""
    try:
        with Image.open(path) as picture:
            return picture.width * picture.height
    except Exception:  # whatever a decoder raises
        return 0


def answered_batches(
    items: Sequence[Item], size: int, ask: Ask, failed: Failed
) -> Iterator[tuple[Sequence[Item], list[list[Record]]]]:
    """Answers batch by batch; a batch that does not fit into memory is halved, and so are those after it. While one is
    answered, a thread opens the pictures of the next.

    Questions of a batch that cannot be asked together are asked one by one. One that cannot be asked by itself is told
    to `failed`, and the others go on, unless `failed` raises.
    """
    start = 0
    opening: dict[str, Future[Image.Image]] = {}
    with ThreadPoolExecutor(1) as thread:
        while start < len(items):
            end = end_of_batch(items, start, size)
            batch, this_and_next = items[start:end], items[start : end_of_batch(items, end, size)]
            paths = dict.fromkeys(item.image for item in this_and_next)
            opening = {path: opening.get(path) or thread.submit(open_picture, path) for path in paths}
            pictures: dict[str, Image.Image] = {}
            readable = []
            for item in batch:
                unreadable = opening[item.image].exception()
                if unreadable is None:
                    pictures[item.image] = opening[item.image].result()
                    readable.append(item)
                elif isinstance(unreadable, Exception):
                    failed(item, unreadable)
                else:
                    raise unreadable
            try:
                answers = ask(readable, pictures) if readable else []
            except Exception as error:
                if len(readable) > 1 and should_reduce_batch_size(error):
                    size = len(readable) // 2
                    message = f"out of memory with {len(readable)} questions at once; going on with {size}"
                    warnings.warn(message, stacklevel=2)
                    items = [*items[:start], *readable, *items[end:]]  # the others are told already
                    continue
                yield from _one_by_one(readable, pictures, ask, failed, error)
            else:
                if readable:
                    yield readable, answers
            start = end


def _one_by_one(
    batch: Sequence[Item], pictures: Mapping[str, Image.Image], ask: Ask, failed: Failed, error: Exception
) -> Iterator[tuple[Sequence[Item], list[list[Record]]]]:
    """Answers to the questions of a batch that failed with an error."""
    if len(batch) == 1:
        failed(batch[0], error)
        return
    for item in batch:
        try:
            answers = ask([item], pictures)
        except Exception as reason:
            failed(item, reason)
        else:
            yield [item], answers


def end_of_batch(items: Sequence[Item], start: int, size: int) -> int:
    """Where a batch of at most `size` ends: where a picture's questions do, unless they alone are more than that."""
    end = min(start + size, len(items))
    border = end
    while start < border < len(items) and items[border].image == items[border - 1].image:
        border -= 1
    return border if border > start else end
