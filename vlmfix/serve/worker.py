"""The one thread that asks: it takes what waits, in batches of the same method and settings.

One model, its weights once. Methods take turns on it: an `Asker` puts its own on for a batch and off again, so no two
batches see each other, and torch's random numbers belong to one batch at a time.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from vlmfix.asking.asker import Asker, ask_settings
from vlmfix.engine.decoding import decoding_of
from vlmfix.serve.listening import FirstToken, Line, Listener, cut_at
from vlmfix.serve.wire import Answered, Asked, Refused

MOST_ASKERS = 16
"""Methods that are kept resolved; the one that was asked longest ago goes."""
STOPS = "the server stops; ask again later"
WINDOW_S = 0.005
"""How long the first of a batch waits for company."""


@dataclass(eq=False)
class Ticket:
    """A request that waits. Its events come in `events`: `(index, text)` as an answer grows, at last the `Answered`
    list with the number of prompt tokens, or an exception."""

    asked: Asked
    spec: str
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    abandoned: bool = False
    """The client has left."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Tickets with the same key can share a batch. One with a seed is asked alone, so that its answer depends on
        nobody else's question."""
        settings, has_picture = tuple(sorted(self.asked.settings.items())), bool(self.asked.images)
        return self.spec, settings, has_picture, None if self.asked.seed is None else id(self)

    def tell(self, what: Any) -> None:
        """From the worker's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, what)
        except RuntimeError:  # the server has stopped
            self.abandoned = True


class Worker:
    """Asks one model, in a thread of its own, until `close`."""

    def __init__(self, model: Any, processor: Any, *, max_batch: int = 16, max_waiting: int = 256) -> None:
        self.model, self.processor = model, processor
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.counts: Counter[str] = Counter()
        """For `/metrics`."""
        self._waiting: deque[Ticket] = deque()
        self._asking: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._askers: OrderedDict[str, Asker] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="vlmfix-serve", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, ticket: Ticket) -> None:
        """`Refused` where the queue is full."""
        with self._changed:
            if self._closed:
                raise Refused(STOPS, 503, "server_error")
            if len(self._waiting) >= self.max_waiting:
                sentence = f"the server is busy: {len(self._waiting)} requests wait already; try again later"
                raise Refused(sentence, 429, "rate_limit_error")
            self._waiting.append(ticket)
            self._changed.notify()

    def close(self) -> None:
        """No more batches, and the one that is asked ends at its next token; all clients are told."""
        with self._changed:
            self._closed = True
            unanswered = [*self._waiting, *self._asking]
            self._waiting.clear()
            self._changed.notify()
        for ticket in unanswered:
            ticket.abandoned = True
            ticket.tell(Refused(STOPS, 503, "server_error"))

    def join(self, timeout: float) -> None:
        """Wait, after `close`, for the thread to end."""
        self._thread.join(timeout)

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            self._answer(batch)
            self._asking = []

    def _next_batch(self) -> list[Ticket] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if len(self._waiting) < self.max_batch and not self._closed:
                self._changed.wait(WINDOW_S)
            if self._closed:
                return None
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.abandoned)
            batch: list[Ticket] = []
            n_rows = 0
            for ticket in list(self._waiting):
                fits = not batch or (ticket.key == batch[0].key and n_rows + ticket.asked.n <= self.max_batch)
                if fits:
                    batch.append(ticket)
                    n_rows += ticket.asked.n
                    self._waiting.remove(ticket)
            self._asking = batch
            return batch

    def _answer(self, batch: Sequence[Ticket]) -> None:
        if not batch:
            return
        try:
            self._ask(batch)
        except Exception as error:
            if len(batch) > 1:  # one of them may be at fault: each for itself
                for ticket in batch:
                    self._answer([ticket])
                return
            self.counts["errors"] += 1
            if isinstance(error, (ValueError, TypeError)):
                batch[0].tell(error)
                return
            traceback.print_exception(error)
            batch[0].tell(Refused(f"{type(error).__name__} while answering; see the server's log", 500, "server_error"))

    def asker(self, spec: str) -> Asker:
        """The methods, resolved on the model."""
        if spec not in self._askers:
            self._askers[spec] = Asker(self.model, self.processor, None if spec == "none" else spec)
        self._askers.move_to_end(spec)
        while len(self._askers) > MOST_ASKERS:
            self._askers.popitem(last=False)
        return self._askers[spec]

    def _ask(self, batch: Sequence[Ticket]) -> None:
        asker, first = self.asker(batch[0].spec), batch[0].asked
        settings = ask_settings(None, first.settings)
        in_own_way = any(method is not None and method.acts_at("decode") for method in asker.interventions)
        rows = [(ticket, index) for ticket in batch for index in range(ticket.asked.n)]
        if in_own_way and any(ticket.asked.top_logprobs is not None for ticket in batch):
            raise Refused(f"logprobs: {batch[0].spec} works on whole answers, and has no log-probabilities of tokens")
        end_ids = decoding_of(self.model, settings).end_ids
        lines = []
        for ticket, index in rows:
            tell = partial(_tell_text, ticket, index) if ticket.asked.stream else None
            lines.append(Line(self.processor, end_ids, ticket.asked.stop, tell))
        pad_id = getattr(getattr(self.processor, "tokenizer", None), "pad_token_id", None)
        listener = Listener(lines, lambda row: rows[row][0].abandoned, pad_id, follow=not in_own_way)
        first_token = FirstToken()
        wants_first = any(ticket.asked.top_logprobs is not None for ticket in batch)
        listening: dict[str, Any] = {"stopping_criteria": [listener]}
        if wants_first:
            listening["logits_processor"] = [first_token]
        records = asker.ask_batch(_questions(rows), seed=first.seed, **settings, **listening)

        answers: dict[Ticket, list[Answered]] = {ticket: [] for ticket in batch}
        for row, ((ticket, index), record, line) in enumerate(zip(rows, records, lines, strict=True)):
            if line.tokens:
                line.finish()
                finish, n_tokens, text = "stop" if line.done else "length", len(line.tokens), line.text()
            else:  # by a method's own way
                cut = cut_at(record.text, ticket.asked.stop)
                finish, n_tokens = record.finish if cut is None else "stop", len(record.token_ids)
                text = record.text if cut is None else cut.strip()
                if ticket.asked.stream and text:
                    _tell_text(ticket, index, text)
            log_probs = None
            if ticket.asked.top_logprobs is not None and line.tokens:
                log_probs = first_token.of(row, line.tokens[0], self.processor, ticket.asked.top_logprobs)
            told = asdict(record)
            facts = {name: told[name] for name in ("method", "effects", "passes", "tokens", "seconds", "batch_size")}
            answers[ticket].append(Answered(text, finish, n_tokens, log_probs, facts))
            self.counts["answers"] += 1
            self.counts["new_tokens"] += n_tokens
        self.counts["batches"] += 1
        first_row = 0
        for ticket in batch:
            n_prompt = listener.n_prompt[first_row] or _n_prompt(asker, rows[first_row])
            ticket.tell((answers[ticket], n_prompt))
            first_row += ticket.asked.n


def _n_prompt(asker: Asker, row: tuple[Ticket, int]) -> int:
    """Tokens of a prompt that went through the model in a method's own way."""
    return int(asker.inputs(_questions([row]))["attention_mask"].sum())


def _tell_text(ticket: Ticket, index: int, text: str) -> None:
    ticket.tell((index, text))


def _questions(rows: Sequence[tuple[Ticket, int]]) -> list[tuple[Any, Any]]:
    """One picture object for the same bytes, whoever sent them: by that its pass is shared."""
    pictures: dict[str, Any] = {}
    questions = []
    for ticket, _ in rows:
        images = [pictures.setdefault(digest, picture) for digest, picture in ticket.asked.images]
        questions.append((images, ticket.asked.conversation))
    return questions
