"""What an answer looked at: the attention behind each of its tokens, in every layer and head, before and after a
method's edit, and as the untouched model has it when it reads the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmfix.asking.batch import Batch, model_inputs
from vlmfix.asking.record import Record
from vlmfix.asking.words import Written
from vlmfix.demo.studio import Studio
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
        weights = self.image[list(steps)][:, self._at(layers)]
        if head is not None:
            weights = weights[:, :, [head]]
        return weights.mean((0, 1, 2), dtype=np.float32)

    def shares(self, layers: Sequence[int], head: int | None = None) -> Array:
        """(T,) share of each token's attention that lies on the image, over the same layers and heads."""
        places = self._at(layers)
        on_image, total = self.image[:, places].sum(-1, dtype=np.float32), self.total[:, places]
        if head is not None:
            on_image, total = on_image[..., head], total[..., head]
        return on_image.reshape(len(on_image), -1).sum(1) / total.reshape(len(total), -1).sum(1)

    def by_head(self, steps: Sequence[int]) -> Array:
        """(A, H) share of the attention behind some tokens that lies on the image."""
        return (self.image[list(steps)].sum(-1, dtype=np.float32) / self.total[list(steps)]).mean(0)

    def marked(self, layers: Sequence[int]) -> Array:
        """(N,) bool: sinks in at least half of some layers."""
        return self.sinks[self._at(layers)].mean(0) >= 0.5

    def _at(self, layers: Sequence[int]) -> list[int]:
        """Places of decoder layers among those that attend."""
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
        """Keep the weights (B, H, R, K) on image tokens, their sum over all keys, and which rows count."""
        memo, image, this_pass = site.memo, site.geometry.image, (site.start, a.shape[-1])
        if site.n_prompt:
            n_image = int(image.sum(1).max())
            memo["columns"] = image.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_image]
        of_layer = memo.setdefault("looks", {}).setdefault(site.layer, {"pass": this_pass, "parts": []})
        if site.start == 0 and of_layer["pass"] != this_pass:  # the prompt once more, longer: there is no cache
            of_layer.update({"pass": this_pass, "parts": []})
        columns = memo["columns"].to(a.device)[:, None, None].expand(-1, a.shape[1], a.shape[2], -1)
        on_image = pad(a, (site.first_key, 0)).gather(-1, columns)
        of_layer["parts"].append((on_image.half().cpu(), a.sum(-1).cpu(), site.rows.cpu()))

    def answered(self, memo: dict[str, Any], row: int, run: Batch, tokens: list[int]) -> dict[str, Any]:
        """`seen`: what the answer looked at; `pictures`: what it was given."""
        if "looks" not in memo:
            return {}
        pictures, _ = run.questions[0]
        return {"seen": self.seen(memo, row, slice(len(tokens))), "pictures": pictures}

    def seen(self, memo: dict[str, Any], row: int, part: slice) -> Seen:
        """Of one row of the batch; `part` of the rows that were read predicts its answer."""
        columns = memo["columns"][row].cpu()
        image, total, marked = [], [], []
        for layer, of_layer in memo["looks"].items():
            image_parts, total_parts = [], []
            for on_image, on_all, rows in of_layer["parts"]:
                image_parts.append(on_image[row][:, rows[row]])
                total_parts.append(on_all[row][:, rows[row]])
            image.append(torch.cat(image_parts, 1).transpose(0, 1)[part])  # (T, H, N)
            total.append(torch.cat(total_parts, 1).transpose(0, 1)[part])  # (T, H)
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
        calibrated = sinks.resolve(model, parts, sinks.default_tau(parts.hidden_size), processor)
        if not calibrated.dims:
            return cls(origin=f"calibration finds no sink dimension: {calibrated.explain()}")
        return cls(calibrated.dims, calibrated.tau, calibrated.origin)

    def unless_named_by(self, method: Sequence[Intervention]) -> Sinks:
        """Those that a method names, else these."""
        for intervention in method:
            dims, tau = getattr(intervention, "dims", None), getattr(intervention, "tau", None)
            if dims and tau:
                return Sinks(tuple(dims), tau, f"as {intervention.name} was told")
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
        inputs = model_inputs(model, processor, [([picture], prompt)])
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
        first, n_cells = self.first + view.first, view.rows * view.columns
        return x[first : first + n_cells].reshape(view.rows, view.columns)


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
        distinct = {id(seen): seen for seen in self.looks}
        return sum(seen.image.nbytes for seen in distinct.values())


def inspect(
    studio: Studio, picture: Image.Image, prompt: str, method: Sequence[Intervention], known: Sinks
) -> Inspection:
    """Ask, and keep what the answer looked at.

    `ValueError` or `TypeError` where the question cannot be asked, or where the method decodes in a way that cannot be
    followed token by token.
    """
    sinks_here = known.unless_named_by(method)
    watch = Watch(dims=sinks_here.dims or None, tau=sinks_here.tau)
    asker = studio.asker([replace(watch, moment="before"), *method, watch])
    record = studio.ask_with(asker, picture, prompt)
    before_edit, *of_methods, after_edit = record.effects
    if not ("seen" in before_edit and "seen" in after_edit and record.token_ids):
        raise ValueError("Nothing was read: the model has no softmax attention, or it gave no answer.")
    before, after = before_edit["seen"], after_edit["seen"]
    if np.array_equal(before.image, after.image):
        after = before
    model, processor = studio.model, studio.processor
    shown: list[Shown] = []
    n_tokens = 0
    for refined in after_edit["pictures"]:
        shown.append(Shown.of(model, processor, refined, prompt, n_tokens))
        n_tokens += shown[-1].n
    return Inspection(
        spec=spec_of(method),
        record=replace(record, effects=of_methods, method=record.method[1:-1]),
        words=words_of(processor, record.token_ids),
        before=before,
        after=after,
        untouched=reread(studio, picture, prompt, record.token_ids, watch) if method else None,
        shown=tuple(shown),
        original=Shown.of(model, processor, picture, prompt),
        sinks=sinks_here,
        heads=_chosen_heads(asker.effects()[1:-1]),
    )


def reread(studio: Studio, picture: Image.Image, prompt: str, tokens: Sequence[int], watch: Watch) -> Seen:
    """What the untouched model looks at when it reads an answer word for word."""
    asker = studio.asker([replace(watch, rows="after_last_image")])
    inputs = asker.batch([(picture, prompt)]).after(tokens[:-1])
    _, (memo,) = asker.forward(inputs)
    return watch.seen(memo, 0, slice(-len(tokens), None))


def words_of(processor: Any, tokens: Sequence[int]) -> tuple[Word, ...]:
    """The words of an answer and their tokens."""
    words = Written.by(processor, tokens).words()
    return tuple(Word(word, tuple(steps)) for word, steps in words if steps)


def _chosen_heads(effects: Sequence[dict[str, Any]]) -> dict[int, tuple[int, ...]]:
    """Heads per layer that methods say they chose, or were told to act on."""
    chosen: dict[int, set[int]] = {}
    for effect in effects:
        for layer, head in parse_heads(effect.get("head_list") or "") or ():
            chosen.setdefault(layer, set()).add(head)
        for sample in effect["samples"][:1]:
            for layer, facts in sample.get("layers", {}).items():
                chosen.setdefault(int(layer), set()).update(facts.get("heads", ()))
    return {layer: tuple(sorted(heads)) for layer, heads in sorted(chosen.items()) if heads}
