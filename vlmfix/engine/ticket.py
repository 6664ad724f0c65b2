"""What ties a cache to its generation: a ticket that the cache carries, and that its copies carry on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from vlmfix.engine.state import Generation

ATTRIBUTE = "_vlmfix_ticket"


@dataclass
class Ticket:
    """Which generation filled a cache, and under which wrapping."""

    owner: object
    """Of one wrapping of a model, until it comes off: what another left is not known to it."""
    generation: Generation

    def __deepcopy__(self, memo: dict[int, Any]) -> Ticket:
        """A copied cache goes on by itself: its generation is copied too, and belongs to the same wrapping."""
        old = self.generation
        # One copy of everything together: a stream stands in the memos and among the streams, and must be one again.
        memos, streams, hidden = copy.deepcopy((old.memos, old.streams, old.hidden), memo)
        joinable = set(old.joinable)
        return Ticket(
            self.owner,
            replace(old, memos=memos, streams=streams, hidden=hidden, joinable=joinable, plan=None, laid=False),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A stored cache says nothing of how it was filled: whoever loads it may have other weights."""
        return Ticket, (None, None)


def stamp(cache: Any, ticket: Ticket) -> None:
    """Give a cache its ticket."""
    cache.__dict__[ATTRIBUTE] = ticket


def ticket_of(cache: Any) -> Ticket | None:
    """The ticket of a cache, or `None`."""
    return getattr(cache, "__dict__", {}).get(ATTRIBUTE)
