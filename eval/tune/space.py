"""What `vlmfix tune` tries: settings of methods as they say themselves, head lists with gains, and sums of these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Any

from vlmfix.hooks.headgain import HeadGain
from vlmfix.method.heads import HeadList, head_names
from vlmfix.method.intervention import Intervention
from vlmfix.method.names import REGISTRY
from vlmfix.method.registry import method_class, spec_of
from vlmfix.method.settings import settings_of

SHARES = (1 / 16, 1 / 8, 1 / 4)
"""Of a model's heads: how many a head list selects."""
STRENGTHEN, WEAKEN = (2.0, 1.5, 1.25), (0.5, 0.8)
"""Gains of heads whose high score is good, and of those whose high score is bad; powers of two first, which fold into
the weights without rounding in every dtype."""


@dataclass(frozen=True)
class Candidate:
    """Methods to try, in force together."""

    methods: tuple[Intervention, ...]
    title: str
    """In short, for people."""

    @property
    def label(self) -> str:
        """As the command line reads it."""
        return spec_of(self.methods)

    @property
    def kinds(self) -> frozenset[str]:
        """Names of its methods; of head gains, the list that they came from."""
        return frozenset(part.partition(":")[0] for part in self.title.split(" + "))


def singles(head_lists: Iterable[HeadList], *, bakeable: bool = False, decoding: bool = False) -> list[Candidate]:
    """One method each, with the settings that its `search` names: the first choice of every method and list, then the
    second of each, and so on, so that a small budget sees all of them."""
    by_method: list[list[Candidate]] = [list(of_list(head_list)) for head_list in head_lists]
    for name in () if bakeable else REGISTRY:
        cls: Any = method_class(name)
        candidates = [one for one in searched(cls) if decoding or not one.acts_at("decode")]
        by_method.append([Candidate((one,), spec_of([one])) for one in candidates])
    in_turns = zip_longest(*by_method)
    return [candidate for turn in in_turns for candidate in turn if candidate is not None]


def searched(cls: type[Intervention]) -> Iterator[Intervention]:
    """A method with each combination of the values that its `search` names."""
    if cls.search:
        for values in product(*cls.search.values()):
            yield cls(**dict(zip(cls.search, values, strict=True)))


def of_list(head_list: HeadList) -> Iterator[Candidate]:
    """Head gains by a list: its own gains, or more and fewer heads by stronger and weaker gains."""
    if head_list.tool == "gains":
        ranked = head_list.selected
        gains = tuple(head_list.score(head) for head in ranked)
        for power in (1.0, 0.5, 1.5):
            scaled = tuple(round(gain**power, 4) for gain in gains)
            yield Candidate((HeadGain(head_list=head_names(ranked), gain=scaled),), f"gains:power={power:g}")
        return
    ranked = head_list.ranking()
    gains = STRENGTHEN if head_list.direction == "high is good" else WEAKEN
    for gain in gains:
        for share in reversed(SHARES):
            n = max(1, round(share * len(ranked)))
            heads = head_names(ranked[:n])
            yield Candidate((HeadGain(head_list=heads, gain=gain),), f"{tool_title(head_list)}:top={n},gain={gain:g}")


def tool_title(head_list: HeadList) -> str:
    """A list's tool, with what it looked at where it can look at several things."""
    see = head_list.settings.get("see")
    return f"{head_list.tool}-{see}" if see else head_list.tool


def pairs(firsts: Sequence[Candidate], seconds: Sequence[Candidate]) -> list[Candidate]:
    """Sums of two candidates of different methods, the best ones first; those that cannot be in force together are left
    to the trial to refuse."""
    sums: dict[frozenset[str], Candidate] = {}
    ranked = sorted(product(range(len(firsts)), range(len(seconds))), key=sum)
    for i, k in ranked:
        first, second = firsts[i], seconds[k]
        if first.kinds & second.kinds:
            continue
        parts = sorted([*first.title.split(" + "), *second.title.split(" + ")])
        candidate = Candidate(merged([*first.methods, *second.methods]), " + ".join(parts))
        sums.setdefault(frozenset(parts), candidate)
    return list(sums.values())


def merged(methods: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The same with all head gains in one: gains of a head multiply."""
    gains: dict[tuple[int, int], float] = {}
    others = []
    for method in methods:
        if not isinstance(method, HeadGain):
            others.append(method)
            continue
        for head, gain in method.gains().items():
            gains[head] = gains.get(head, 1.0) * gain
    if sum(isinstance(method, HeadGain) for method in methods) < 2:
        return tuple(methods)
    joint = HeadGain(head_list=head_names(gains), gain=tuple(round(gain, 4) for gain in gains.values()))
    return (joint, *others)


def neighbours(candidate: Candidate) -> list[Candidate]:
    """The same with one number a little smaller or larger: between the values that its method's `search` names, and
    half as strong or half as strong again where that is a gain."""
    near = []
    for place, method in enumerate(candidate.methods):
        for setting, value in _near(method):
            try:
                changed = replace(method, **{setting: value})
            except ValueError:
                continue  # out of the setting's range
            methods = (*candidate.methods[:place], changed, *candidate.methods[place + 1 :])
            shown = f"{value:g}" if isinstance(value, float) else f"^{_power(method, changed):g}"
            near.append(Candidate(methods, f"{candidate.title} with {setting}={shown}"))
    return near


def _near(method: Intervention) -> Iterator[tuple[str, Any]]:
    """Settings and other values of them."""
    if isinstance(method, HeadGain):
        for power in (0.7, 1.4):
            if isinstance(method.gain, tuple):
                yield "gain", tuple(round(gain**power, 4) for gain in method.gain)
            elif method.gain is not None:
                yield "gain", round(method.gain**power, 4)
        return
    numbers = {setting.name for setting in settings_of(type(method)) if setting.range is not None}
    for name in type(method).search:
        value = getattr(method, name)
        if name in numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            for factor in (0.75, 1.3):
                yield name, round(value * factor, 4)


def _power(method: Any, changed: Any) -> float:
    """By which the gains of heads were raised."""
    for before, after in zip(method.gain, changed.gain, strict=True):
        if before != 1:
            return round(math.log(after) / math.log(before), 1)
    return 1.0
