"""Which heads matter: tools that look at a model on pictures and give every attention head a score.

| tool | question |
|---|---|
| `vhd` | whose output changes most when the image is taken away? |
| `ablate` | which head, switched off, changes what the model says next? |
| `subspace` | which head, switched off, turns the last hidden states of many prompts most? |
| `visual` | which head looks at the object that the model is about to name? |
| `separate` | whose lookback ratio tells true object words from invented ones? |
| `random` | none: the control of the others |

None of them mends anything; interventions read the head list that they write (`vlmfix.method.heads`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlmfix.asking.asking import Answering, open_picture, spellings
from vlmfix.engine.attachment import attached
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.benchmarks.pope import Pope
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import naming
from vlmfix.eval.tune.ablation import each_head_off, logits_at
from vlmfix.eval.tune.lookback import read_words
from vlmfix.hooks.lookback import Lookback
from vlmfix.hooks.parts import sinks
from vlmfix.hooks.vhr import Choice, choose
from vlmfix.method.heads import HeadList, picture_id
from vlmfix.method.intervention import Idle, Intervention, Traits
from vlmfix.method.prompt import Prompt
from vlmfix.method.settings import checked_settings, did_you_mean, read_settings
from vlmfix.method.site import Site
from vlmfix.model.anatomy import anatomy

Tell = Callable[..., None]
"""Progress: what is done, how much of it, of how much."""
RESAMPLES = 1000
"""Of the bootstrap: enough for an interval to read, for some thousand heads at once."""
FEW_PAIRS = 200


@dataclass(frozen=True)
class Subject:
    """A model and the pictures that it is looked at on."""

    model: Any
    processor: Any
    data: Data
    batch_size: int = 32
    """Sequences that go through the model at once."""
    tell: Tell = lambda label, done, total: None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        parts = anatomy(self.model)
        return len(parts.layers), parts.n_heads

    def inputs(self, items: Sequence[Item]) -> dict[str, Any]:
        """The processor's output for some questions, padded on the left."""
        questions = [([open_picture(item.image)], item.prompt) for item in items]
        return Answering.of(self.model, self.processor, questions, {}).inputs


@dataclass
class Found:
    """What a tool measured: sums over samples for each picture, and how they become one score per head."""

    pictures: Sequence[str]
    """P files."""
    sums: dict[str, np.ndarray]
    """Name -> (P, L, H)."""
    counts: dict[str, np.ndarray]
    """Name -> (P,) samples behind the sums."""
    score: Callable[[Mapping[str, np.ndarray]], np.ndarray] = lambda means: next(iter(means.values()))
    """Means (..., L, H) by name -> scores (..., L, H)."""
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, pictures: Sequence[str], names: Sequence[str], values: np.ndarray, at: np.ndarray, kind: np.ndarray
    ) -> Found:
        """From samples: `values` (S, L, H), each of picture `at` (S,) and of `kind` (S,), an index into `names`."""
        sums, counts = {}, {}
        for k, name in enumerate(names):
            sums[name] = np.zeros((len(pictures), *values.shape[1:]))
            np.add.at(sums[name], at[kind == k], values[kind == k])
            counts[name] = np.bincount(at[kind == k], minlength=len(pictures)).astype(float)
        return cls(pictures, sums, counts)

    def scores(self, times: np.ndarray | None = None) -> np.ndarray:
        """(L, H), or (N, L, H) with each picture counted `times` (N, P) times."""
        weights = np.ones(len(next(iter(self.counts.values())))) if times is None else times
        with np.errstate(invalid="ignore", divide="ignore"):
            means = {
                name: np.tensordot(weights, sums, 1) / np.asarray(weights @ self.counts[name])[..., None, None]
                for name, sums in self.sums.items()
            }
        return self.score(means)

    def intervals(self, seed: int = 0) -> np.ndarray:
        """(2, L, H): 95 % intervals from a bootstrap over pictures."""
        n = len(self.pictures)
        times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # heads without a score
            return np.nanpercentile(self.scores(times), [2.5, 97.5], axis=0)

    def agreement(self) -> float | None:
        """Rank correlation (Spearman) of the scores on every other picture with those on the rest."""
        halves = np.arange(len(self.pictures)) % 2
        one, other = (self.scores(half.astype(float)).ravel() for half in (halves, 1 - halves))
        known = np.isfinite(one) & np.isfinite(other)
        if known.sum() < 3:
            return None
        mine, others = _mean_ranks(one[known]), _mean_ranks(other[known])
        return float(np.corrcoef(mine, others)[0, 1]) if mine.std() and others.std() else None


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks; equal values share their mean rank."""
    level = np.unique(x, return_inverse=True)[1]
    sizes = np.bincount(level)
    return (sizes.cumsum() - (sizes - 1) / 2)[level]


class Tool:
    """Gives every head of a model a score."""

    name: ClassVar[str]
    source: ClassVar[str]
    """Where it was published."""

    @property
    def meaning(self) -> str:
        """What a score is, in one line."""
        raise NotImplementedError

    @property
    def direction(self) -> Literal["high is good", "high is bad"]:
        """What a high score says of a head."""
        return "high is good"

    def measure(self, subject: Subject) -> Found:
        """Look at the model. `ValueError` if the data has nothing that the tool needs."""
        raise NotImplementedError


# ---- vision-aware head divergence -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Both(Intervention):
    """Reads head outputs at the last prompt position, with the image and without."""

    @property
    def traits(self) -> Traits:
        return Traits(captures=("heads",))

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        layers = range(len(anatomy(prompt.model).layers))
        memo.update(text=prompt.capture("heads", layers, image=False), visual={})

    def heads(self, o: Tensor, site: Site) -> Tensor:
        last = (site.geometry.last_prompt - site.start)[:, None, None, None].expand(-1, 1, *o.shape[2:])
        site.memo["visual"][site.layer] = o.gather(1, last)[:, 0]
        return o


def divergence(model: Any, inputs: dict[str, Any], distance: str = "sq_l2") -> dict[int, Choice]:
    """VHD of every head, and VHR's choice by it, per layer: one pass with the image and one without."""
    with torch.no_grad(), wrapped(model, _Both()):
        model(**inputs, use_cache=False)
        memo = attached(model).last().memos[0]  # type: ignore[union-attr]
    return {layer: choose(memo["text"][layer], memo["visual"][layer], distance) for layer in sorted(memo["visual"])}


@dataclass(frozen=True)
class VHD(Tool):
    """VHR's vision-aware head divergence, averaged over pictures."""

    name: ClassVar[str] = "vhd"
    source: ClassVar[str] = "He et al., ACL 2025, arXiv 2412.13949"

    distance: Literal["sq_l2", "l2"] = "sq_l2"
    """Squared (release) or plain (paper, Eq. 4)."""
    relative: bool = False
    """Divide by the layer's mean over heads (ours): outputs grow with depth, so plain divergence favours late layers,
    while VHR compares heads of one layer only."""

    def __post_init__(self) -> None:
        """Check the distance."""
        _one_of("distance", self.distance, ("sq_l2", "l2"))

    @property
    def meaning(self) -> str:
        """Of a score."""
        text = "distance of the head's output with and without the image, at the last prompt token"
        return f"{text}, over the layer's mean" if self.relative else text

    def measure(self, subject: Subject) -> Found:
        """Two passes per picture, one of them without the image."""
        items = Chair().items(subject.data)
        values, chosen = [], []
        for batch in _batches(items, subject, "vhd"):
            per_layer = list(divergence(subject.model, subject.inputs(batch), self.distance).values())
            values.append(torch.stack([c.vhd.cpu() for c in per_layer], 1))
            chosen.append(torch.stack([c.selected.float().cpu() for c in per_layer], 1))
        vhd = torch.cat(values).double()
        if self.relative:
            vhd = vhd / vhd.mean(-1, keepdim=True)
        found = _all_alike(items, vhd.numpy())
        found.extra["chosen_by_vhr"] = torch.cat(chosen).mean(0).tolist()
        return found


# ---- switching heads off --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablate(Tool):
    """Switches one head off at a time and looks at the next token."""

    name: ClassVar[str] = "ablate"
    source: ClassVar[str] = "kl: SHIPS, Zhou et al., arXiv 2410.13708; margin and token: ours"

    see: Literal["kl", "margin", "token"] = "kl"
    """`kl`: KL(p || p with the head off) of the first answer token, on POPE's questions. `margin`: how much the head
    pushes log p(yes) - log p(no) up for absent objects, less what it does for present ones. `token`: how much the head
    raises the log-probability of objects that the model invents in captions, less that of true ones."""
    mode: Literal["output", "uniform"] = "output"
    """How a head is switched off: no output, or uniform attention (code's "undifferentiated")."""
    eps: float | None = None
    """What is left of the output or of the scores. `None`: 0 for output, 1e-5 for uniform (code)."""
    max_new_tokens: int = 256
    """Of the captions, for `token`."""

    def __post_init__(self) -> None:
        """Check words and fill eps."""
        _one_of("see", self.see, ("kl", "margin", "token"))
        _one_of("mode", self.mode, ("output", "uniform"))
        if self.eps is None:
            object.__setattr__(self, "eps", 0.0 if self.mode == "output" else 1e-5)

    @property
    def direction(self) -> Literal["high is good", "high is bad"]:
        """Heads that push to errors are bad."""
        return "high is good" if self.see == "kl" else "high is bad"

    @property
    def meaning(self) -> str:
        """Of a score."""
        return {
            "kl": "KL divergence of the first answer token when the head is off",
            "margin": "push towards yes on absent objects, less the push on present ones, in nats",
            "token": "push towards invented objects in captions, less the push towards true ones, in nats",
        }[self.see]

    def measure(self, subject: Subject) -> Found:
        """L * H passes per question or caption, without decoding."""
        found = self._tokens(subject) if self.see == "token" else self._answers(subject)
        if self.see != "kl":
            bad, good = found.sums
            lacking = [name for name, n in found.counts.items() if not n.sum()]
            if lacking:
                raise ValueError(f"{subject.data.name} has no {lacking[0]} objects to look at; take more pictures")
            found.score = lambda means: means[bad] - np.maximum(means[good], 0)
            found.extra["parts"] = {
                name: (sums.sum(0) / found.counts[name].sum()).tolist() for name, sums in found.sums.items()
            }
            found.extra["samples"] = {name: int(n.sum()) for name, n in found.counts.items()}
        return found

    def _off(self, subject: Subject, inputs: dict[str, Any], read: Callable[[dict[str, Any]], Tensor]) -> Any:
        return each_head_off(subject.model, inputs, read, mode=self.mode, eps=self.eps or 0.0, rows=subject.batch_size)

    def _answers(self, subject: Subject) -> Found:
        """First answer tokens of POPE's questions."""
        bench = Pope()
        items = bench.items(subject.data)
        label = {bench.item_id(q): q.label for q in bench.questions(subject.data)}
        words = [list(spellings(subject.processor, word)) for word in ("yes", "no")]

        def read(inputs: dict[str, Any]) -> Tensor:
            logp = logits_at(subject.model, inputs, [-1])[:, 0]
            if self.see == "kl":
                return logp
            yes, no = (logp[:, word].logsumexp(-1) for word in words)
            return yes - no

        values = []
        for batch in _batches(items, subject, f"ablate {self.see}", _together(subject)):
            inputs = subject.inputs(batch)
            plain, out = read(inputs), np.zeros((len(batch), *subject.shape))
            for layer, heads, off in self._off(subject, inputs, read):
                out[:, layer, heads] = (kl(plain, off) if self.see == "kl" else plain - off).T.double().cpu().numpy()
            values.append(out)
        pictures = list(dict.fromkeys(item.image for item in items))
        at = np.array([pictures.index(item.image) for item in items])
        yes = np.array([label[item.id] == "yes" for item in items])
        names = ("all",) if self.see == "kl" else ("absent", "present")
        return Found.of(pictures, names, np.concatenate(values), at, (yes & (self.see != "kl")).astype(int))

    def _tokens(self, subject: Subject) -> Found:
        """Object words in the model's own captions."""
        captions = _captions(subject, self.max_new_tokens)
        values, at, true = [np.zeros((0, *subject.shape))], [], []
        with_words = [(i, c) for i, c in enumerate(captions) if c.named]
        for batch in _batches(with_words, subject, "ablate token", _together(subject)):
            inputs, n = naming.told(subject.model, subject.processor, [c for _, c in batch])
            words = [(b, w) for b, (_, c) in enumerate(batch) for w in c.named]
            columns = sorted({n + w.token - 1 for _, w in words})
            row = torch.tensor([b for b, _ in words])
            column = torch.tensor([columns.index(n + w.token - 1) for _, w in words])
            token = torch.tensor([batch[b][1].tokens[w.token] for b, w in words])

            read = partial(_log_p, subject.model, columns=columns, tokens=token)
            pick = (row, column, torch.arange(len(words)))
            plain, out = read(inputs)[pick], np.zeros((len(words), *subject.shape))
            for layer, heads, off in self._off(subject, inputs, read):
                out[:, layer, heads] = (plain - off[:, pick[0], pick[1], pick[2]]).T.double().cpu().numpy()
            values.append(out)
            at += [batch[b][0] for b, _ in words]
            true += [w.true for _, w in words]
        pictures = [c.item.image for c in captions]
        return Found.of(pictures, ("invented", "true"), np.concatenate(values), np.array(at, int), np.array(true, int))


def _log_p(model: Any, inputs: dict[str, Any], columns: Sequence[int], tokens: Tensor) -> Tensor:
    """(B, R, W) log-probability, after each of R columns, of each of W tokens."""
    return logits_at(model, inputs, columns)[:, :, tokens]


def kl(plain: Tensor, off: Tensor) -> Tensor:
    """KL(p || q) (..., B) of log-probabilities (B, V) and (..., B, V); 1e-12 is added to both, as in the release."""
    p, q = plain.double().exp() + 1e-12, off.double().exp() + 1e-12
    return (p * (p.log() - q.log())).sum(-1)


@dataclass(frozen=True)
class Subspace(Tool):
    """Switches one head off at a time and looks at the last hidden states of all prompts together."""

    name: ClassVar[str] = "subspace"
    source: ClassVar[str] = "Sahara, Zhou et al., arXiv 2410.13708"

    rank: int = 1
    """Leading left singular vectors that are compared; the largest principal angle counts (code: 1)."""
    mode: Literal["output", "uniform"] = "output"
    """As in `ablate`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _one_of("mode", self.mode, ("output", "uniform"))
        if self.rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {self.rank}")

    @property
    def meaning(self) -> str:
        """Of a score."""
        return "angle between the leading directions of last hidden states, head on and off, in degrees"

    def measure(self, subject: Subject) -> Found:
        """L * H passes per prompt; the angle is between prompts, so there are no intervals."""
        items = Pope().items(subject.data)
        if len(items) < max(8, self.rank + 1):
            raise ValueError(f"subspace compares at least 8 prompts; {subject.data.name} gives {len(items)} questions")
        decoder = anatomy(subject.model).decoder
        seen: list[Tensor] = []

        def read(inputs: dict[str, Any]) -> Tensor:
            handle = decoder.register_forward_hook(lambda module, args, out: seen.append(out[0][:, -1].float()))
            try:
                logits_at(subject.model, inputs, [-1])
            finally:
                handle.remove()
            return seen.pop()

        eps, plain, off = 0.0 if self.mode == "output" else 1e-5, [], []
        for batch in _batches(items, subject, "subspace", _together(subject)):
            inputs = subject.inputs(batch)
            plain.append(read(inputs).cpu())
            parts = each_head_off(subject.model, inputs, read, mode=self.mode, eps=eps, rows=subject.batch_size)
            off.append(torch.cat([states.cpu() for _, _, states in parts]))  # (L * H, B, D), in order
        angles = subspace_angle(torch.cat(plain), torch.cat(off, 1), self.rank).view(1, *subject.shape)
        pictures = list(dict.fromkeys(item.image for item in items))
        return Found(pictures, {"angle": angles.numpy()}, {"angle": np.ones(1)}, extra={"prompts": len(items)})


def subspace_angle(plain: Tensor, off: Tensor, rank: int = 1) -> Tensor:
    """Largest principal angle, in degrees, between the leading left singular vectors of `plain` (n, D) and of each of
    `off` (..., n, D)."""
    u, v = (torch.linalg.svd(x.double(), full_matrices=False).U[..., :rank] for x in (plain, off))
    smallest = torch.linalg.svdvals(u.mT @ v)[..., -1]
    return smallest.clamp(-1, 1).arccos().rad2deg()


# ---- visual retrieval -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One object word in a batch of captions: which row of attention predicts it, and where the object is."""

    sample: int
    row: int
    target: np.ndarray
    """(image tokens,) bool: those that show the object."""
    other: np.ndarray | None
    """The same of another picture's object."""
    grid: np.ndarray
    """(image tokens,) bool: those that count."""


@dataclass(frozen=True)
class _Rows(Intervention):
    """Reads the attention of chosen rows on image tokens."""

    looks: tuple[Look, ...] = ()
    dims: tuple[int, ...] = ()
    tau: float = 0.0

    def acts_at(self, stage: str) -> bool:
        return super().acts_at(stage) and (stage != "layer_input" or bool(self.dims))

    def layer_input(self, x: Tensor, site: Site) -> None:
        site.memo.setdefault("sink", {})[site.layer] = sinks.phi(x, self.dims) >= self.tau

    def survey(self, a: Tensor, site: Site) -> None:
        memo, image = site.memo, site.geometry.image
        start = memo.setdefault("start", {}).get(site.layer, 0)
        memo["start"][site.layer] = start + a.shape[2]
        here = [i for i, look in enumerate(self.looks) if start <= look.row < start + a.shape[2]]
        for i in here:
            look = self.looks[i]
            keys = image[look.sample]
            row = a[look.sample, :, look.row - start][:, keys]  # (H, image tokens)
            sink = memo["sink"][site.layer][look.sample][keys] if self.dims else torch.zeros_like(keys[keys])
            grid = torch.as_tensor(look.grid, device=row.device)
            both = [
                row.new_full((2, len(row)), torch.nan)
                if shows is None
                else retrieval(row, torch.as_tensor(shows, device=row.device), grid, sink)
                for shows in (look.target, look.other)
            ]
            memo.setdefault("found", {})[i, site.layer] = torch.stack(both)


def retrieval(w: Tensor, target: Tensor, grid: Tensor, sink: Tensor) -> Tensor:
    """(2, H): whether the strongest image token that is no sink shows the object, and the share of image attention on
    it less its share of the area. `w` (H, P) attention on image tokens; masks (P,)."""
    top = w.masked_fill(sink | ~grid, -1).argmax(-1)
    seen = w * grid
    mass = (seen * target).sum(-1) / seen.sum(-1).clamp(min=1e-12) - (target & grid).sum() / grid.sum()
    return torch.stack([target[top].to(w.dtype), mass])


@dataclass(frozen=True)
class Visual(Tool):
    """Visual retrieval score: where a head looks when the model names an object."""

    name: ClassVar[str] = "visual"
    source: ClassVar[str] = "ours, after the retrieval head, Wu et al., arXiv 2404.15574"

    see: Literal["mass", "top1"] = "mass"
    """`mass`: the share of image attention on the object, less its share of the area. `top1`: how often the strongest
    image token that is no visual sink shows the object."""
    sinks: bool = False
    """Let `top1` count visual sinks too."""
    max_new_tokens: int = 256
    """Of the captions."""

    def __post_init__(self) -> None:
        """Check the word."""
        _one_of("see", self.see, ("mass", "top1"))

    @property
    def meaning(self) -> str:
        """Of a score."""
        return {
            "mass": "image attention on the object about to be named, less its share of the area",
            "top1": "how often the strongest image token shows the object about to be named",
        }[self.see]

    def measure(self, subject: Subject) -> Found:
        """One caption per picture, and one pass over it."""
        captions = _captions(subject, self.max_new_tokens)
        looks = self._looks(subject, captions)
        if not any(looks):
            raise ValueError(
                f"no object that the model names in {subject.data.name} has a box that its image tokens show; the "
                f"visual tool needs boxes or masks in instances.json"
            )
        dims, tau = self._sinks(subject)
        values, at, index = [], [], ("top1", "mass").index(self.see)
        useful = [(i, c) for i, c in enumerate(captions) if looks[i]]
        for batch in _batches(useful, subject, "visual"):
            inputs, n = naming.told(subject.model, subject.processor, [c for _, c in batch])
            plan = tuple(
                Look(b, n + row - 1, target, other, where)
                for b, (i, _) in enumerate(batch) for row, target, other, where in looks[i]
            )  # fmt: skip
            with wrapped(subject.model, _Rows(plan, dims, tau)):
                subject.model(**inputs, use_cache=False)
                memo = attached(subject.model).last().memos[0]  # type: ignore[union-attr]
            layers = range(subject.shape[0])
            values += [
                torch.stack([memo["found"][k, layer][:, index].cpu() for layer in layers]) for k in range(len(plan))
            ]
            at += [batch[look.sample][0] for look in plan]
        both = torch.stack(values).double().numpy()  # (S, L, 2, H)
        pictures = [c.item.image for c in captions]
        at_, kind = np.array(at), np.zeros(len(at), int)
        found = Found.of(pictures, ("words",), both[:, :, 0], at_, kind)
        control = both[:, :, 1][np.isfinite(both[:, 0, 1, 0])]
        found.extra["control"] = control.mean(0).tolist() if len(control) else None
        found.extra["pairs"] = len(both)
        if len(both) < FEW_PAIRS:
            warnings.warn(
                f"only {len(both)} named objects could be looked for; with fewer than {FEW_PAIRS} the ranking is rough",
                stacklevel=3,
            )
        return found

    def _looks(self, subject: Subject, captions: Sequence[naming.Caption]) -> list[list[Any]]:
        """Per caption: token of each word that names a present object, its cells, another picture's, and the grid."""
        boxes = naming.Annotations(subject.data)
        found: list[list[Any]] = []
        for caption in captions:
            place, n, size = naming.grid(subject.model, subject.processor, caption.item)
            shown = boxes.shown(caption.key, place, size)
            where = np.zeros(n, bool)
            where[place.first : place.first + place.rows * place.columns] = True
            mine = []
            for word in caption.named:
                if word.object in shown and word.token < len(caption.tokens):
                    target = np.zeros(n, bool)
                    target[where] = shown[word.object]
                    mine.append([word.token, target, None, where])
            found.append(mine)
        every = [(i, look) for i, mine in enumerate(found) for look in mine]
        for k, (i, look) in enumerate(every):  # the control: the next object of another picture with such a grid
            others = (o for j, o in every[k + 1 :] + every[:k] if j != i and len(o[1]) == len(look[1]))
            look[2] = next((o[1] for o in others), None)
        return found

    def _sinks(self, subject: Subject) -> tuple[tuple[int, ...], float]:
        """Dimensions and threshold of visual sinks, if the model has any."""
        from vlmfix.hooks.var import VAR

        if self.sinks or self.see == "mass":
            return (), 0.0
        try:
            var: Any = VAR().resolve(subject.model, anatomy(subject.model), subject.processor)[0]
        except Idle:
            return (), 0.0
        return var.dims, var.tau


# ---- lookback ratios ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Separate(Tool):
    """How far apart a head's lookback ratios are: means over true and over invented object words, less deviations."""

    name: ClassVar[str] = "separate"
    source: ClassVar[str] = (
        "the head choice of Attention Tracker, Hung et al., arXiv 2411.00348, on object words (ours)"
    )

    n: float = 1.0
    """Standard deviations of both groups that the means must be apart (code: 0 to 5)."""
    preset: Any = "lookback"
    """What is compared: a preset of the monitor `lookback`."""
    max_new_tokens: int = 256
    """Of the captions."""

    def __post_init__(self) -> None:
        """Check the range and the preset."""
        if self.n < 0:
            raise ValueError(f"n: expected 0 or more, got {self.n}")
        Lookback(preset=self.preset)

    @property
    def meaning(self) -> str:
        """Of a score."""
        return (
            f"mean lookback ratio of true object words less that of invented ones, less {self.n:g} deviations of each"
        )

    def measure(self, subject: Subject) -> Found:
        """One caption per picture."""
        words = read_words(
            subject.model, subject.processor, Lookback(preset=self.preset), subject.data,
            batch_size=subject.batch_size, max_new_tokens=self.max_new_tokens, progress=subject.tell,
        )  # fmt: skip
        for kind, n in (("true", words.grounded.sum()), ("invented", (~words.grounded).sum())):
            if not n:
                raise ValueError(f"captions of {subject.data.name} hold no {kind} objects; take more pictures")
        keys, v = list(subject.data.images), words.v.reshape(-1, *subject.shape).astype(float)
        at = np.array([keys.index(key) for key in words.image])
        of = partial(Found.of, list(map(str, subject.data.images.values())), at=at, kind=words.grounded.astype(int))
        found, squares = of(("invented", "true"), v), of(("invented squared", "true squared"), v**2)
        found.extra["samples"] = {name: int(n.sum()) for name, n in found.counts.items()}
        found.sums |= squares.sums
        found.counts |= squares.counts
        found.score = partial(separation, n=self.n)
        return found


def separation(means: Mapping[str, np.ndarray], n: float) -> np.ndarray:
    """mean(true) - mean(invented) - n (std(true) + std(invented)), from the means of ratios and of their squares."""
    deviations = [np.sqrt(np.maximum(means[f"{k} squared"] - means[k] ** 2, 0)) for k in ("true", "invented")]
    return means["true"] - means["invented"] - n * sum(deviations)


@dataclass(frozen=True)
class Random(Tool):
    """Scores by chance."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"

    seed: int = 0

    @property
    def meaning(self) -> str:
        """Of a score."""
        return "a random number"

    def measure(self, subject: Subject) -> Found:
        """No pass at all."""
        scores = np.random.default_rng(self.seed).random((1, *subject.shape))
        return Found([], {"random": scores}, {"random": np.ones(1)})


TOOLS: dict[str, type[Tool]] = {tool.name: tool for tool in (VHD, Ablate, Subspace, Visual, Separate, Random)}


def tool(spec: str) -> Tool:
    """A tool from its name, or its name with settings: `ablate:see=margin,mode=uniform`. `ValueError` if unknown."""
    name, _, text = spec.strip().partition(":")
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}; {did_you_mean(name, TOOLS)}")
    return TOOLS[name](**checked_settings(TOOLS[name], name, read_settings(text)))


@torch.inference_mode()
def rank(
    how: Tool,
    model: Any,
    processor: Any,
    data: Data,
    *,
    batch_size: int = 32,
    tell: Tell = lambda label, done, total: None,
) -> HeadList:
    """Give every head of an untouched model a score. No head is selected yet: see `HeadList.select`.

    Raises `ValueError` if the data lacks what the tool needs, `TypeError` if the model's heads cannot be found.
    """
    with wrapped(model, None):
        found = how.measure(Subject(model, processor, data, batch_size, tell))
    scores = found.scores()
    extra = {"score": how.meaning, **found.extra}
    if len(next(iter(found.counts.values()))) > 1:
        extra |= {"interval": found.intervals().tolist(), "agreement": found.agreement()}
    return HeadList(
        model=model.config._name_or_path,
        revision=getattr(model.config, "_commit_hash", None),
        tool=how.name,
        scores=tuple(map(tuple, scores.tolist())),
        direction=how.direction,
        settings=asdict(how),  # type: ignore[call-overload]
        data={
            "name": data.name,
            "n": len(found.pictures),
            "seed": 0,
            "ids": [picture_id(path) for path in found.pictures],
        },
        extra=extra,
    )


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key}: expected {' or '.join(known)}, got {value!r}")


def _together(subject: Subject) -> int:
    """Questions in one batch, so that all heads of a layer fit into a pass with them."""
    return max(1, subject.batch_size // subject.shape[1])


def _batches(items: Sequence[Any], subject: Subject, label: str, size: int | None = None) -> Any:
    """Pieces of `size`, told as they are done."""
    size = size or subject.batch_size
    for start in range(0, len(items), size):
        subject.tell(label, start, len(items))
        yield items[start : start + size]
    subject.tell(label, len(items), len(items))


def _captions(subject: Subject, max_new_tokens: int) -> list[naming.Caption]:
    return naming.describe(
        subject.model, subject.processor, subject.data, Chair().items(subject.data), max_new_tokens=max_new_tokens,
        batch_size=subject.batch_size, tell=lambda done, total: subject.tell("captions", done, total),
    )  # fmt: skip


def _all_alike(items: Sequence[Item], values: np.ndarray) -> Found:
    """One sample per picture."""
    at = np.arange(len(items))
    return Found.of([item.image for item in items], ("mean",), values, at, np.zeros(len(items), int))
