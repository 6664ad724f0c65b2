"""What an intervention is: a frozen dataclass that overrides the stages that it edits.

This module imports no torch, so that `vlmfix methods` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from vlmfix.asking.asking import Answering, Look
    from vlmfix.engine.state import Prompt
    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.geometry import Geometry

Rows = Literal["last", "after_last_image", "text", "all", "generated"]
STAGES = ("refine", "tokens", "scores", "weights", "heads", "logits", "decode")
"""In the order in which they happen. `refine` and `decode` belong to `ask`, the others to the model's passes."""
ATTENTION_STAGES = ("survey", "scores", "weights")
ASK_STAGES = ("refine", "decode")


class Idle(Exception):
    """Raised by `Intervention.resolve`: this model gives the method nothing to act on. Becomes a warning, never
    silence."""


@dataclass
class Site:
    """Where in the model and in the sequence an edit happens. B samples (or beams), R rows, K keys of this call."""

    layer: int
    """Decoder layer, 0-based."""
    n_layers: int
    """Decoder layers of the model."""
    geometry: Geometry
    """What the K keys are: masks of shape (B, K)."""
    rows: Tensor
    """(B, R) bool: rows that this intervention may edit here; in `layer_input`, prompt rows that are no padding."""
    start: int
    """Position of the first row of this forward pass."""
    first_key: int
    """Position of the first of the K keys: 0, but in layers that keep only a window of keys."""
    memo: dict[str, Any]
    """This intervention's own state of this generation: born at the prefill, gone afterwards."""
    n_prompt: int = 0
    """Rows of this forward pass that are prompt; 0 while tokens are generated from a cache."""
    picked: Any = None
    """Which rows of this pass these are; `None` or a slice for all of them. See `positions`."""

    @property
    def positions(self) -> Tensor:
        """(R,) position of each row, on the scale of `start`."""
        index = self.picked if hasattr(self.picked, "device") else self.rows[0].long().fill_(1).cumsum(0) - 1
        return self.start + index


@dataclass
class Step:
    """The choice of one token inside `generate`: where the `logits` stage happens."""

    index: int
    """0 for the first token of the answer."""
    memo: dict[str, Any]
    """As in `Site`. A `Stream` that `begin` put here has already got all tokens chosen so far."""


@dataclass(frozen=True)
class Intervention:
    """A training-free edit of a model's forward pass. Fields are the method's settings; a stage is a method to
    override.

    | stage | gets and returns | where |
    |---|---|---|
    | `refine`  | pictures and prompt of a question | before they become inputs; in `ask` only |
    | `tokens`  | what a decoder layer gets: hidden states, rotary embeddings, mask | all rows |
    | `scores`  | (B, H, R, K) float32, before softmax | rows named by `rows` |
    | `weights` | (B, H, R, K) float32, after softmax | rows named by `rows` |
    | `heads`   | (B, Q, H, d) head outputs before the output projection, the model's dtype | all rows |
    | `logits`  | (B, V) float32 scores of the next token | every new token; in `generate` only |
    | `decode`  | a batch of questions; returns answers | in the place of `generate`; in `ask` only |

    Stages return their input untouched where they change nothing: rows that come back unchanged keep the original
    kernel's output bit for bit.
    """

    name: ClassVar[str] = ""
    """Name on the command line."""
    summary: ClassVar[str] = ""
    """What it does, in one clause."""
    paper: ClassVar[str] = ""
    """Where it was published."""
    cost: ClassVar[str] = ""
    """What it costs over the untouched model."""
    expect: ClassVar[str] = ""
    """What to expect of it, and for which task: one honest line."""
    rows: ClassVar[Any] = "last"
    """Prompt rows that the attention stages edit, one of `Rows`; rows of generated tokens always belong. A subclass may
    make it a field."""
    whole_prompt: ClassVar[bool] = False
    """True: the prompt must go through the model in one piece (no chunked prefill)."""
    shares_pictures: ClassVar[bool] = False
    """True: what is done to a prompt's row depends on nothing after it, and tensors in the memo begin with the axis of
    samples. Questions about one picture may then share the pass over it. A subclass may make it a property."""
    accelerator: ClassVar[bool] = False
    """True: made for speed, not against hallucination; put in force beside methods, never ranked among them."""
    token_by_token: ClassVar[bool] = False
    """True: what it remembers belongs to one answer's tokens in their order, so beams and assisted generation are
    refused."""
    uses_answers: ClassVar[bool] = False
    """True: it knows the right answers, for an upper bound; result tables refuse it. A subclass may make it a
    property."""

    @property
    def leaves_pictures(self) -> bool:
        """Whether rows up to the end of the picture stay as they are, by the stages it acts at and its `rows`: then
        several methods may share one pass over a picture."""
        after = self.shares_pictures and self.rows in ("last", "after_last_image", "generated")
        return after and not any(map(self.acts_at, (*ASK_STAGES, "begin", "tokens", "heads")))

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Decoder layers whose stages run, of a model with `n_layers` layers."""
        return range(n_layers)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[Intervention, dict[str, Any]]:
        """Fill settings left `None` from facts about the loaded model.

        Returns the filled intervention and what else a result should record (origin of the values, ...).
        Raises `Idle` where the model gives nothing to act on and `ValueError` where a setting does not fit the model.
        """
        return self, {}

    def begin(self, prompt: Prompt, memo: dict[str, Any]) -> None:
        """Run before the first pass of a generation, with the whole prompt."""

    def composes(self, others: Sequence[Intervention]) -> None:
        """Raise a `ValueError` that says why, if this method cannot be in force together with `others`."""

    def refine(self, look: Look, images: list[Image], prompt: str) -> tuple[list[Image], str, dict[str, Any]]:
        """Give the pictures and the prompt to answer from, and what a record should say of it (`acted` among it).

        `look` asks the model on the way, with this intervention's other stages in force and nobody else's; outside
        its looks the other stages of an intervention that refines are not in force.
        """
        return images, prompt, {}

    def decode(self, run: Answering) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """Answer a batch of questions in another way than one call of `generate`: token ids, and what a record should
        say (`acted` among it), per question. `run.generate` is the model with all interventions in force."""
        return run.generate(), []

    def layer_input(self, x: Tensor, site: Site) -> None:
        """See the input of a layer, (B, Q, D), for the prompt's rows: `site.start` is the position of the first."""

    def survey(self, a: Tensor, site: Site) -> None:
        """See the attention weights (B, H, R, K), float32, of all rows of a pass that holds prompt, before any row of
        that layer is edited. They come in pieces of rows, in order; `site.rows` tells padding, `site.positions` which
        rows they are."""

    def tokens(
        self, inputs: dict[str, Any], site: Site, look: Callable[[dict[str, Any]], tuple[Tensor, Tensor, float]]
    ) -> dict[str, Any]:
        """Replace what a decoder layer gets: `hidden_states` (B, Q, D), `position_embeddings`, `attention_mask` and
        what else its model hands it. Tokens may leave: the cache of this layer then holds fewer keys than others.

        The model hands the mask and the rotary embeddings of all tokens to every layer, also to those after tokens
        left. `site` is over all tokens too. Once more, with `site.layer == site.n_layers`, it gets the `hidden_states`
        that the last layer gives. `look(inputs)` computes the layer's queries (B, H, Q, d), keys (B, Hk, Q, d) and
        scale by the layer's own code, and no more of it.
        """
        return inputs

    def scores(self, s: Tensor, site: Site) -> Tensor:
        """Edit attention scores."""
        return s

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Edit attention weights."""
        return a

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """Edit head outputs."""
        return o

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Edit the scores of the next token: logits, or log-probabilities in beam search; after the model's own
        repetition and length rules, before temperature and the like."""
        return scores

    def report(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """What it did in one generation: one JSON-ready dictionary per row of the batch, with `acted` among the
        keys."""
        return []

    def answered(self, memo: dict[str, Any], row: int, run: Answering, tokens: list[int]) -> dict[str, Any]:
        """Add to what `report` says of one answer, now that its tokens are known; in `ask` only. `row` of the batch."""
        return {}

    def idle_hint(self) -> str:
        """What to suspect first when it never acted."""
        return "check its settings against this model."

    def _fill(self, variants: dict[str, dict[str, Any]]) -> None:
        """Give settings left `None` the values of this intervention's `variant`; for `__post_init__`."""
        variant: str = self.variant  # type: ignore[attr-defined]
        if variant not in variants:
            raise ValueError(f"variant: expected one of {', '.join(variants)}, got {variant!r}")
        for key, value in variants[variant].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    def controls(self) -> tuple[Intervention, ...]:
        """Negative controls: the same push with the selection taken out of it (random heads, random tokens), or turned
        round. Where a control does as well as the method, it is not the selection that helps.
        """
        return ()

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Whether this class has its own version of a stage or of `begin`, `layer_input`, ..."""
        return getattr(cls, method) is not getattr(Intervention, method)

    def acts_at(self, stage: str) -> bool:
        """Whether a stage (or `begin`, `layer_input`, `survey`) has work to do with these settings."""
        return self.overrides(stage)

    @classmethod
    def stages(cls) -> tuple[str, ...]:
        """Stages that this method edits."""
        return tuple(stage for stage in STAGES if cls.overrides(stage))

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """What else it needs from the model: layer inputs, all rows of attention, a pass before the first."""
        wants = {
            "layer_input": "layer inputs",
            "survey": "attention of all rows once",
            "begin": "a pass before the first",
        }
        return tuple(text for method, text in wants.items() if cls.overrides(method))

    def to_json(self) -> dict[str, Any]:
        """Name and settings, JSON-ready; `from_json` is the way back."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": self.name or f"{type(self).__module__}:{type(self).__qualname__}", **settings}

    def __call__(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """`with VAR(p=0.4)(model): ...`: in force inside the block, and as it was before after it."""
        from vlmfix.engine.attachment import wrapped

        return wrapped(model, self)


Interventions = None | str | Intervention | Sequence[str | Intervention]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."


def method_class(name: str) -> type[Intervention]:
    """The class behind a name of the registry or behind `package.module:Class`. `ValueError` if there is none."""
    from vlmfix.hooks import REGISTRY

    path = name if ":" in name else REGISTRY.get(name)
    if path is None:
        raise ValueError(f"unknown method {name!r}; {did_you_mean(name, ['none', *REGISTRY])}")
    module, _, attribute = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Intervention)):
        raise ValueError(f"method {name!r} is not a subclass of vlmfix.Intervention")
    return cls


def make(name: str, settings: dict[str, Any]) -> Intervention:
    """An intervention from its name and settings. `ValueError` names unknown settings."""
    cls = method_class(name)
    return cls(**checked_settings(cls, name, settings))


def checked_settings(cls: Any, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a dataclass as they came from text or JSON. `ValueError` names unknown ones and wrong kinds."""
    known = [f.name for f in fields(cls)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; {did_you_mean(key, known)}")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    for f in fields(cls):
        _check_kind(name, f.name, str(f.type), settings.get(f.name))
    return settings


def read_settings(text: str) -> dict[str, Any]:
    """`p=0.4,layers=1/18-31` as a dictionary."""
    settings = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: expected setting=value after the colon, got {item!r}")
        settings[key.strip()] = _value(value.strip())
    return settings


def _check_kind(name: str, key: str, annotation: str, value: Any) -> None:
    """Refuse text for a number and the like, going by the field's annotation."""
    kinds: dict[str, tuple[str, tuple[type, ...]]] = {
        "float": ("a number", (int, float)),
        "int": ("a whole number", (int,)),
        "bool": ("true or false", (bool,)),
        "tuple": ("whole numbers such as 1/18-31", (tuple, int)),
        "tuple[float": ("numbers such as 0.5/0.25", (tuple, int, float)),
    }
    word = re.split("[ ,]", annotation, maxsplit=1)[0]
    said, allowed = kinds.get(word, kinds.get(word.split("[", maxsplit=1)[0], ("", ())))
    wrong = isinstance(value, bool) and bool not in allowed
    wrong |= word == "tuple[int" and isinstance(value, tuple) and not all(isinstance(v, int) for v in value)
    if said and value is not None and (wrong or not isinstance(value, allowed)):
        raise ValueError(f"{name}: {key} expects {said}, got {value!r}")


def from_json(data: dict[str, Any]) -> Intervention:
    """The way back from `Intervention.to_json`."""
    return make(data["name"], {k: v for k, v in data.items() if k != "name"})


def _value(text: str) -> Any:
    """`0.4`, `true`, `none`, `1/18-31` (a tuple of whole numbers, ranges inclusive; empty if nothing), `0.5/0.25`, else
    text."""
    simple = {"true": True, "false": False, "none": None}
    if text.lower() in simple:
        return simple[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    parts = text.split("/")
    ranges = [part.split("-") for part in parts if part]
    if all(len(r) <= 2 and all(x.isdigit() for x in r) for r in ranges):
        return tuple(n for r in ranges for n in range(int(r[0]), int(r[-1]) + 1))
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        return text


def parse(spec: str) -> tuple[Intervention, ...]:
    """`"var"`, `"var:p=0.4,rho=0.8"`, `"var+vhr:alpha=1.5"`, `"my.module:Class:k=3"` or `"none"`, as interventions."""
    found = []
    for part in spec.strip().split("+"):
        pieces = part.strip().split(":")
        n_name = 2 if "." in pieces[0] and len(pieces) > 1 else 1
        name, text = ":".join(pieces[:n_name]), ":".join(pieces[n_name:])
        if name == "none" and not text:
            continue
        found.append(make(name, read_settings(text)))
    return tuple(found)


def split_methods(text: str) -> list[str]:
    """Cut `"none,var:p=0.4,rho=0.8,vhr"` into its methods: a piece that reads `setting=value` belongs to the one
    before."""
    methods: list[str] = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        continues = methods and "=" in piece and ":" not in piece.partition("=")[0]
        if continues:
            methods[-1] += "," + piece
        else:
            methods.append(piece)
    return methods


def with_accelerator(
    methods: Sequence[tuple[Intervention, ...]], speed: str | None, controls: bool = False
) -> list[tuple[Intervention, ...]]:
    """Each method (a list of interventions) with an accelerator beside it, and the untouched model, which stays the
    reference; with `controls`, the accelerator's own too. `ValueError` where one is given for the other, or where they
    do not go together."""
    from vlmfix.hooks import REGISTRY

    if wrong := [one.name for method in methods for one in method if one.accelerator]:
        raise ValueError(f"{wrong[0]} is made for speed and is no method; give --speed {wrong[0]}")
    if speed is None:
        return list(methods)
    known = ", ".join(name for name in REGISTRY if method_class(name).accelerator)
    beside = parse(speed)
    if not beside or not all(one.accelerator for one in beside):
        raise ValueError(f"speed: expected an accelerator ({known}), got {speed!r}")
    found = [(*method, *beside) for method in methods]
    if controls:
        found += [(control,) for one in beside for control in one.controls()]
    for method in found:
        for i, one in enumerate(method):
            one.composes([*method[:i], *method[i + 1 :]])
    return [method for method in methods if not method] + found


def as_interventions(given: Interventions) -> tuple[Intervention, ...]:
    """Any accepted form (a name, a name with settings, an instance, a list of these, `None`) as a tuple of
    instances."""
    if given is None:
        return ()
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, Intervention):
        return (given,)
    if isinstance(given, Sequence):
        return tuple(one for item in given for one in as_interventions(item))
    raise TypeError(f"interventions: expected a name, an Intervention or a list of these, got {type(given).__name__}")


def spec_of(interventions: Sequence[Intervention]) -> str:
    """A short label that `parse` reads back: names with the settings that are not the defaults; `none` for an empty
    list."""
    parts = []
    for one in interventions:
        settings, plain = asdict(one), asdict(type(one)())
        if settings.get("variant") != plain.get(
            "variant"
        ):  # a variant fills other settings, which then need no mention
            plain = {**asdict(type(one)(variant=settings["variant"])), "variant": None}  # type: ignore[call-arg]
        shown = {k: v for k, v in settings.items() if v != plain[k]}
        text = [f"{k}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in shown.items()]
        parts.append(one.to_json()["name"] + (":" + ",".join(text) if text else ""))
    return "+".join(parts) or "none"


__all__ = [
    "STAGES",
    "Idle",
    "Intervention",
    "Interventions",
    "Site",
    "Step",
    "as_interventions",
    "from_json",
    "make",
    "method_class",
    "parse",
    "spec_of",
    "split_methods",
    "with_accelerator",
]
