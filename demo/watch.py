"""What an answer looked at: the attention behind each of its tokens, in every layer and head, before and after a
method's edit, and as the untouched model has it when it reads the same words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmfix.asking.asking import Answering, Record
from vlmfix.demo.studio import Studio
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import effects
from vlmfix.hooks.lookback import steps_of, token_ends
from vlmfix.hooks.parts import sinks, views
from vlmfix.hooks.var import VAR
from vlmfix.method.heads import parse_heads
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.registry import spec_of
from vlmfix.method.site import Rows, Site
from vlmfix.model.anatomy import anatomy

Array = NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """Attention of one answer of T tokens, in A layers with H heads, to the N image tokens of its prompt."""

    layers: tuple[int, ...]
    """Decoder layers that attend, A of them; in hybrid decoders some do not."""
    image: Array
    """(T, A, H, N) float16, which halves what large models take: weights of the row that predicts each token."""
    total: Array
    """(T, A, H) float32: its weights on all keys; 1, but where a layer has attention sinks as parameters."""
    sinks: Array
    """(A, N) bool: image tokens that are visual sinks there, by VAR's rule; none where no sink dimensions are known."""

    def heat(self, steps: Sequence[int], layers: Sequence[int], head: int | None = None) -> Array:
        """(N,) attention behind some tokens, averaged over them, some layers, and all heads or one."""
        found = self.image[list(steps)][:, self._at(layers)]
        return (found if head is None else found[:, :, [head]]).mean((0, 1, 2), dtype=np.float32)

    def shares(self, layers: Sequence[int], head: int | None = None) -> Array:
        """(T,) share of each token's attention that lies on the image, over the same layers and heads."""
        at = self._at(layers)
        image, total = self.image[:, at].sum(-1, dtype=np.float32), self.total[:, at]
        if head is not None:
            image, total = image[..., head], total[..., head]
        return image.reshape(len(image), -1).sum(1) / total.reshape(len(total), -1).sum(1)

    def by_head(self, steps: Sequence[int]) -> Array:
        """(A, H) share of the attention behind some tokens that lies on the image."""
        return (self.image[list(steps)].sum(-1, dtype=np.float32) / self.total[list(steps)]).mean(0)

    def marked(self, layers: Sequence[int]) -> Array:
        """(N,) bool: sinks in at least half of some layers."""
        return self.sinks[self._at(layers)].mean(0) >= 0.5

    def _at(self, layers: Sequence[int]) -> list[int]:
        return [self.layers.index(layer) for layer in layers]


@dataclass(frozen=True)
class Watch(Intervention):
    """Keeps the attention of the rows that predict the answer's tokens, for one question at a time. Changes nothing."""

    name: ClassVar[str] = "look inside"
    summary: ClassVar[str] = "monitor: keeps the attention behind each answer token; changes nothing"

    moment: Literal["before", "after"] = "after"
    """What is read: `before`, what the layer itself computes (of attention sinks that are parameters it knows nothing);
    `after`, what the methods before it in the list have made of that."""
    rows: Rows = "last"  # type: ignore[misc]
    """Prompt rows that are read: `last` predicts the answer's first token."""
    dims: tuple[int, ...] | None = None
    """Dimensions by which visual sinks are told; `None`: none are."""
    tau: float | None = None
    """Their threshold, as VAR's."""

    @property
    def traits(self) -> Traits:
        """It keeps the rows of one answer."""
        return Traits(sequential=True)

    def acts_at(self, stage: str) -> bool:
        """Layer inputs are needed to find sinks only."""
        return super().acts_at(stage) and (stage != "layer_input" or bool(self.dims))

    def layer_input(self, x: Tensor, site: Site) -> None:
        """Mark sinks, as VAR does."""
        VAR(dims=self.dims, tau=self.tau).layer_input(x, site)  # type: ignore[arg-type]

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """Read what would become the weights; all edits of scores come before the first look at weights."""
        if self.moment == "before":
            self._note(s.softmax(-1), site)
        return s

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Read the weights."""
        if self.moment == "after":
            self._note(a, site)
        return a

    @staticmethod
    def _note(a: Tensor, site: Site) -> None:
        memo, image, this_pass = site.memo, site.geometry.image, (site.start, a.shape[-1])
        if site.n_prompt:
            n = int(image.sum(1).max())
            memo["columns"] = image.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]
        looks = memo.setdefault("looks", {}).setdefault(site.layer, {"pass": this_pass, "parts": []})
        if site.start == 0 and looks["pass"] != this_pass:  # the prompt once more, longer: there is no cache
            looks.update({"pass": this_pass, "parts": []})
        columns = memo["columns"].to(a.device)[:, None, None].expand(-1, a.shape[1], a.shape[2], -1)
        looked = pad(a, (site.first_key, 0)).gather(-1, columns)
        looks["parts"].append((looked.half().cpu(), a.sum(-1).cpu(), site.rows.cpu()))

    def answered(self, memo: dict[str, Any], row: int, run: Answering, tokens: list[int]) -> dict[str, Any]:
        """`seen`: what the answer looked at; `pictures`: what it was given."""
        if "looks" not in memo:
            return {}
        return {"seen": self.seen(memo, row, slice(len(tokens))), "pictures": run.questions[0][0]}

    def seen(self, memo: dict[str, Any], row: int, part: slice) -> Seen:
        """Of one row of the batch; `part` of the rows that were read predicts its answer."""
        columns = memo["columns"][row].cpu()
        image, total, marked = [], [], []
        for layer, looks in memo["looks"].items():
            mine = [(a[row][:, rows[row]], t[row][:, rows[row]]) for a, t, rows in looks["parts"]]
            image.append(torch.cat([a for a, _ in mine], 1).transpose(0, 1)[part])  # (T, H, N)
            total.append(torch.cat([t for _, t in mine], 1).transpose(0, 1)[part])
            marked.append(memo["sinks"][layer][row].cpu()[columns] if self.dims else torch.zeros(len(columns)).bool())
        stacked = torch.stack(image, 1), torch.stack(total, 1), torch.stack(marked)
        return Seen(tuple(memo["looks"]), *(x.numpy() for x in stacked))


@dataclass(frozen=True)
class Sinks:
    """By which dimensions visual sinks are told on a model."""

    dims: tuple[int, ...] = ()
    tau: float | None = None
    origin: str = ""
    """Where they come from, or why there are none."""

    @classmethod
    def of(cls, model: nn.Module, processor: Any) -> Sinks:
        """As VAR finds them."""
        parts = anatomy(model)
        if parts.n_streams > 1:
            return cls(origin=f"no sinks are told: {parts.text_type} has {parts.n_streams} residual streams a token")
        found = sinks.resolve(model, parts, sinks.default_tau(parts.hidden_size), processor)
        if not found.dims:
            return cls(origin=f"calibration finds no sink dimension: {found.explain()}")
        return cls(found.dims, found.tau, found.origin)

    def given(self, method: Sequence[Intervention]) -> Sinks:
        """Those that a method names, else these."""
        for one in method:
            dims, tau = getattr(one, "dims", None), getattr(one, "tau", None)
            if dims and tau:
                return Sinks(tuple(dims), tau, f"as {one.name} was told")
        return self


@dataclass(frozen=True)
class Shown:
    """A picture in a prompt, and which of its pixels the image tokens stand for."""

    picture: Image.Image
    first: int
    """Of its tokens, among the prompt's image tokens."""
    n: int
    """How many these are."""
    view: views.View | None
    """None where they lie on no grid."""
    gridless: str = ""
    """Why not."""

    @classmethod
    def of(cls, model: Any, processor: Any, picture: Image.Image, prompt: str, first: int = 0) -> Shown:
        """From what the processor makes of the picture."""
        inputs = Answering.of(model, processor, [([picture], prompt)], {}).inputs
        ids = torch.tensor(anatomy(model).image_token_ids, device=inputs["input_ids"].device)
        n = int(torch.isin(inputs["input_ids"], ids).sum())
        try:
            return cls(picture, first, n, views.view(model.config, processor, inputs, picture.size, n))
        except (TypeError, ValueError) as error:
            return cls(picture, first, n, None, str(error))

    def grid(self, x: Array) -> Array:
        """Values of all image tokens (N,) as the (rows, columns) of this picture."""
        view = self.view
        if view is None:
            raise ValueError(self.gridless)
        first = self.first + view.first
        return x[first : first + view.rows * view.columns].reshape(view.rows, view.columns)


@dataclass(frozen=True)
class Word:
    """A word of an answer."""

    text: str
    steps: tuple[int, ...]
    """Its tokens, by their place in the answer."""


@dataclass(frozen=True)
class Inspection:
    """One answer from inside."""

    spec: str
    """The method."""
    record: Record
    words: tuple[Word, ...]
    before: Seen
    """As each layer computed it, in the pass that gave the answer."""
    after: Seen
    """As the method left it; `before` itself where that is the same."""
    untouched: Seen | None
    """As the untouched model has it when it reads the same words; None where the answer is the untouched model's."""
    shown: tuple[Shown, ...]
    """What the answer was given: the picture, or what a method made of it."""
    original: Shown
    """What was asked about, and what `untouched` looks at."""
    sinks: Sinks
    heads: dict[int, tuple[int, ...]]
    """Layer -> heads that the method chose."""

    @property
    def looks(self) -> tuple[Seen, ...]:
        """All that was read."""
        return self.before, self.after, *([] if self.untouched is None else [self.untouched])

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        return sum(seen.image.nbytes for seen in {id(seen): seen for seen in self.looks}.values())


def inspect(
    studio: Studio, picture: Image.Image, prompt: str, method: Sequence[Intervention], known: Sinks
) -> Inspection:
    """Ask, and keep what the answer looked at.

    `ValueError` or `TypeError` where the question cannot be asked, or where the method decodes in a way that cannot be
    followed token by token.
    """
    told = known.given(method)
    watch = Watch(dims=told.dims or None, tau=told.tau)
    with studio.under([replace(watch, moment="before"), *method, watch]) as twin:
        record = studio.ask_twin(twin, picture, prompt, method)
        heads = _chosen(effects(twin)[1:-1])
    first, *did, last = record.did
    if not ("seen" in first and "seen" in last and record.token_ids):
        raise ValueError("Nothing was read: the model has no softmax attention, or it gave no answer.")
    before, after = first["seen"], last["seen"]
    if np.array_equal(before.image, after.image):
        after = before
    untouched = reread(studio, picture, prompt, record.token_ids, watch) if method else None
    model, processor = studio.model, studio.processor
    shown: list[Shown] = []
    for given in last["pictures"]:
        shown.append(Shown.of(model, processor, given, prompt, sum(one.n for one in shown)))
    return Inspection(
        spec=spec_of(method),
        record=replace(record, did=did, method=record.method[1:-1]),
        words=words_of(processor, record.token_ids),
        before=before,
        after=after,
        untouched=untouched,
        shown=tuple(shown),
        original=Shown.of(model, processor, picture, prompt),
        sinks=told,
        heads=heads,
    )


@torch.inference_mode()
def reread(studio: Studio, picture: Image.Image, prompt: str, tokens: Sequence[int], watch: Watch) -> Seen:
    """What the untouched model looks at when it reads an answer word for word."""
    with studio.under([replace(watch, rows="after_last_image")]) as twin:
        run = Answering.of(twin, studio.processor, [([picture], prompt)], {})
        twin(**run.after(tokens[:-1]), use_cache=False)
        memo = attached(twin).last().memos[0]  # type: ignore[union-attr]
    return watch.seen(memo, 0, slice(-len(tokens), None))


def words_of(processor: Any, tokens: Sequence[int]) -> tuple[Word, ...]:
    """The words of an answer and their tokens."""

    def text(some: Sequence[int]) -> str:
        return processor.decode(some, skip_special_tokens=True).strip()

    ends = token_ends(tokens, text)
    spans = ((m[0], steps_of(ends, m.start(), m.end())) for m in re.finditer(r"\S+", text(tokens)))
    return tuple(Word(word, tuple(steps)) for word, steps in spans if steps)


def _chosen(reports: Sequence[dict[str, Any]]) -> dict[int, tuple[int, ...]]:
    """Heads per layer that methods say they chose, or were told to act on."""
    found: dict[int, set[int]] = {}
    for one in reports:
        for layer, head in parse_heads(one.get("head_list") or "") or ():
            found.setdefault(layer, set()).add(head)
        for sample in one["samples"][:1]:
            for layer, facts in sample.get("layers", {}).items():
                found.setdefault(int(layer), set()).update(facts.get("heads", ()))
    return {layer: tuple(sorted(heads)) for layer, heads in sorted(found.items()) if heads}
