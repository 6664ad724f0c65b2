"""What a run refuses to ask: missing pictures, methods that know the answers, lists chosen on the very pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmfix.asking.fix import Fix
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.hooks.lookback import Detector
from vlmfix.hooks.parts.attention_to_answer import Statistics
from vlmfix.method.heads import HeadList, picture_id
from vlmfix.method.intervention import Intervention


def check_pictures(items: Sequence[Item], where: str) -> None:
    """`ValueError` if pictures are missing that are about to be asked about."""
    paths = dict.fromkeys(item.image for item in items)
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        advice = f"; {where}" if where else ""
        raise ValueError(f"no such image file: {missing[0]} ({len(missing)} pictures are missing){advice}")


def refuse_right_answers(methods: Sequence[Sequence[Intervention]]) -> None:
    """`ValueError` if a method knows the right answers."""
    names = [intervention.name for method in methods for intervention in method if intervention.traits.uses_answers]
    if names:
        raise ValueError(
            f"{', '.join(names)} with these settings uses the right answers: an upper bound, and no result"
        )


def refuse_own_pictures(method: Sequence[Intervention], facts: Sequence[dict[str, Any]], items: Sequence[Item]) -> None:
    """`ValueError` if heads, a detector or a fix were chosen on pictures that they are to be judged by."""
    made_on = [(file, HeadList.load(file).data.get("ids", ())) for file in _files(facts, "head_list")]
    made_on += [(file, Detector.read(file).ids) for file in _files(facts, "detector")]
    made_on += [(file, Statistics.read(file).data.get("ids", ())) for file in _files(facts, "statistics")]
    made_on += [(part.file, part.content.pictures) for part in method if isinstance(part, Fix)]
    for file, ids in made_on:
        pictures = {picture_id(path) for path in {item.image for item in items}}
        common = pictures.intersection(ids)
        if common:
            raise ValueError(
                f"{file} was made on {len(common)} of the {len(pictures)} pictures that are asked about; heads, "
                f"detectors and fixes must not be judged by pictures that they were chosen on: make it on others"
            )


def _files(facts: Sequence[dict[str, Any]], kind: str) -> list[str]:
    return [each[kind]["file"] for each in facts if kind in each]
