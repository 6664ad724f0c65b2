"""Head lists: a score for every attention head of a model, the heads chosen by it, and where it came from.

A list is made once, offline (`vlmfix heads`), kept as JSON, and read by interventions that act on heads. No torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

FORMAT = "vlmfix.heads/1"
EMBEDDED = {"visual16": "organism/heads/visual16.json"}
"""Head lists that come with the package, by name: of the embedded model, made by `vlmfix heads --tool visual --top
16`."""
Head = tuple[int, int]
"""Layer and query head, 0-based. In text: `L3H1`."""


@dataclass(frozen=True)
class HeadList:
    """Scores of all heads of one model, and the selected ones."""

    model: str
    """Id of the model that was looked at."""
    tool: str
    """What gave the scores: `vhd`, `ablate`, `visual` ..."""
    scores: tuple[tuple[float, ...], ...]
    """L rows of H numbers; NaN where a head has no score."""
    selected: tuple[Head, ...] = ()
    """By falling score."""
    direction: Literal["high is good", "high is bad"] = "high is good"
    """Whether heads with a high score are to be strengthened or weakened."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the tool, and how the heads were selected."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the scores were measured on: `name`, `n`, `seed`, and `ids`, the `picture_id` of each picture."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the tool found: counts, intervals, controls."""
    revision: str | None = None
    """Of the model's files, where the Hub told."""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        """Check that the scores are a table and that the selected heads lie in it."""
        scores = tuple(tuple(map(float, row)) for row in self.scores)
        selected = tuple((int(layer), int(head)) for layer, head in self.selected)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "selected", selected)
        lengths = [len(row) for row in scores]
        if not scores or lengths[0] == 0 or len(set(lengths)) > 1:
            raise ValueError(f"scores: expected one row per layer with one number per head, got rows of {lengths}")
        if any(math.isinf(score) for row in scores for score in row):
            raise ValueError("scores: expected finite numbers, or NaN where a head has none; got infinity")
        if self.direction not in ("high is good", "high is bad"):
            raise ValueError(f"direction: expected 'high is good' or 'high is bad', got {self.direction!r}")
        check_heads(selected, self.n_layers, self.n_heads)

    @property
    def n_layers(self) -> int:
        """L, layers of the decoder."""
        return len(self.scores)

    @property
    def n_heads(self) -> int:
        """H, query heads of each layer."""
        return len(self.scores[0])

    def ranking(self) -> tuple[Head, ...]:
        """All heads that have a score, highest first; equal ones in the order of layers and heads."""
        with_score = []
        for layer, row in enumerate(self.scores):
            with_score += [(layer, head) for head, score in enumerate(row) if not math.isnan(score)]
        return tuple(sorted(with_score, key=lambda head: -self.score(head)))

    def score(self, head: Head) -> float:
        """The score of one head; NaN if it has none."""
        return self.scores[head[0]][head[1]]

    def select(
        self,
        *,
        top: int | None = None,
        share: float | None = None,
        threshold: float | None = None,
        positive: bool = False,
    ) -> HeadList:
        """The same list with other heads selected: the `top` first, a `share` of all that have a score (rounded, at
        least one), those with a score of at least `threshold`, or those with a `positive` score. One of the four.
        """
        options = {"top": top, "share": share, "threshold": threshold, "positive": positive or None}
        rule = {name: value for name, value in options.items() if value is not None}
        if len(rule) != 1:
            raise ValueError(f"select: expected one of top, share, threshold, positive, got {', '.join(rule) or None}")
        ranked = self.ranking()
        if top is not None:
            if not 1 <= top <= len(ranked):
                raise ValueError(f"top: expected a number of heads in 1..{len(ranked)}, got {top}")
            selected: Sequence[Head] = ranked[:top]
        elif share is not None:
            if not 0 < share <= 1:
                raise ValueError(f"share: expected a number above 0 and up to 1, got {share}")
            selected = ranked[: max(1, round(share * len(ranked)))]
        elif threshold is not None:
            selected = [head for head in ranked if self.score(head) >= threshold]
        else:
            selected = [head for head in ranked if self.score(head) > 0]
        if not selected:
            highest = f"{self.score(ranked[0]):.4g}" if ranked else "not a number"
            raise ValueError(f"no head is selected by {rule}; the highest score is {highest}")
        return replace(self, selected=tuple(selected), settings={**self.settings, "select": rule})

    def check(self, n_layers: int, n_heads: int, model: str | None = None) -> None:
        """`ValueError` if the list belongs to a model of another shape; a warning if only the model's name differs."""
        if (self.n_layers, self.n_heads) != (n_layers, n_heads):
            raise ValueError(
                f"the head list was made on {self.model} with {self.n_layers} layers x {self.n_heads} heads, but this "
                f"model has {n_layers} x {n_heads}; make one for it with vlmfix heads"
            )
        if model is not None and model != self.model:
            warnings.warn(
                f"the head list was made on {self.model!r}, this model is {model!r}: heads of one checkpoint seldom "
                f"mean the same in another",
                stacklevel=3,
            )

    def facts(self) -> dict[str, Any]:
        """What a result should record of a list that was used, in short."""
        return {
            "tool": self.tool,
            "model": self.model,
            "direction": self.direction,
            "settings": self.settings,
            "data": {name: fact for name, fact in self.data.items() if name != "ids"},
        }

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; a head without a score is null."""
        shape = {"format": FORMAT, "layers": self.n_layers, "heads": self.n_heads}
        return _plain({**shape, **asdict(self)})

    @classmethod
    def from_json(cls, data: Any) -> HeadList:
        """The way back. `ValueError` if it is no head list."""
        file_format = data.get("format") if isinstance(data, dict) else type(data).__name__
        if not isinstance(data, dict) or file_format != FORMAT:
            raise ValueError(f"expected a head list of format {FORMAT!r} (made by vlmfix heads), got {file_format!r}")
        needed = ("model", "tool", "layers", "heads", "scores", "selected")
        missing = [key for key in needed if key not in data]
        if missing:
            raise ValueError(f"the head list lacks {', '.join(missing)}")
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        try:
            known["scores"] = [[math.nan if score is None else score for score in row] for row in data["scores"]]
            head_list = cls(**known)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the head list cannot be read: {error}") from error
        if (head_list.n_layers, head_list.n_heads) != (data["layers"], data["heads"]):
            raise ValueError(
                f"the head list says {data['layers']} layers x {data['heads']} heads, but its scores are "
                f"{head_list.n_layers} x {head_list.n_heads}"
            )
        return head_list

    def save(self, path: str | Path) -> None:
        """Write it. `ValueError` if that cannot be."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(self.to_json(), allow_nan=False) + "\n", "utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> HeadList:
        """Read it: a file, or one that comes with the package, by its name (`visual16`). `ValueError` if there is no
        such file or if it is no head list."""
        embedded = EMBEDDED.get(str(path))
        try:
            source = files("vlmfix.assets") / embedded if embedded else Path(path)
            data = json.loads(source.read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the head list {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _plain(data: Any) -> Any:
    """As JSON knows it: lists for tuples, null for NaN."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data


def check_heads(heads: Iterable[Head], n_layers: int, n_heads: int) -> None:
    """`ValueError` if a head does not exist in a model of this shape, or is named twice."""
    counts = Counter(heads)
    outside = [(layer, head) for layer, head in counts if not (0 <= layer < n_layers and 0 <= head < n_heads)]
    if outside:
        raise ValueError(
            f"heads: expected layers in 0..{n_layers - 1} and heads in 0..{n_heads - 1}, got {head_names(outside)}"
        )
    repeated = sorted(head for head, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"heads: {head_names(repeated)} named twice")


def head_names(heads: Iterable[Head]) -> str:
    """Heads as text, `L3H1/L3H5`; `parse_heads` is the way back."""
    return "/".join(f"L{layer}H{head}" for layer, head in heads)


def parse_heads(text: str) -> tuple[Head, ...] | None:
    """Heads written as `L3H1/L3H5`; `None` if the text reads otherwise (then it may be a file)."""
    if not re.fullmatch(r"L\d+H\d+(/L\d+H\d+)*", text):
        return None
    return tuple((int(layer), int(head)) for layer, head in re.findall(r"L(\d+)H(\d+)", text))


def resolve_heads(
    setting: str, n_layers: int, n_heads: int, model: str | None, instead: str | None = None
) -> tuple[tuple[Head, ...], dict[str, Any]]:
    """What an intervention's head list means on a loaded model: the heads, and facts to record.

    `setting` is the file of a head list, or heads such as `L3H1/L3H5`. As a control, `instead` asks for as many
    `random` heads of the model, or for those with the `least` score. Facts under `head_list` let the runner refuse
    pictures that the list was made on. `ValueError` where something does not fit.
    """
    heads, ranking = parse_heads(setting), None
    facts: dict[str, Any] = {"heads_origin": "given"}
    if heads is not None:
        check_heads(heads, n_layers, n_heads)
    else:
        head_list = HeadList.load(setting)
        head_list.check(n_layers, n_heads, model)
        if not head_list.selected:
            raise ValueError(f"no heads: {setting} has none selected; make it with --top, --share or --threshold")
        heads, ranking = head_list.selected, head_list.ranking()
        facts = {"heads_origin": "file", "head_list": {"file": setting, **head_list.facts()}}
    if instead == "random":
        heads = random_heads(len(heads), n_layers, n_heads)
    elif instead == "least" and ranking is not None:
        from_the_last = ranking[::-1]
        heads = from_the_last[: len(heads)]
    elif instead is not None:
        raise ValueError(f"heads with the {instead} score need the file of a head list, got {setting}")
    return heads, facts


def picture_id(path: str | Path) -> str:
    """A digest of a picture's file: tells the same picture under another name or number."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def random_heads(n: int, n_layers: int, n_heads: int, seed: int = 0) -> tuple[Head, ...]:
    """`n` different heads of a model, by chance: the control of every head list."""
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    return tuple(sorted(random.Random(seed).sample(every, n)))
