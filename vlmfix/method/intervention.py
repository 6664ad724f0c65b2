"""What an intervention is: a frozen dataclass that overrides the stages that it edits.

This module imports no torch, so that `vlmfix methods` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vlmfix.method.names import name_of
from vlmfix.method.settings import LATER, fill_and_check, settings_of
from vlmfix.method.site import Rows, Site, Step
from vlmfix.method.stages import ASK_STAGES, STAGES

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from vlmfix.asking.batch import Batch
    from vlmfix.asking.look import Look
    from vlmfix.method.prompt import Prompt, Readable
    from vlmfix.model.anatomy import Anatomy


ScoreMod = Callable[..., Any]
"""(score, sample, head, row, key) -> score, on tensors without dimensions."""


class Idle(Exception):
    """Raised by `Intervention.resolve`: this model gives the method nothing to act on. Becomes a warning, never
    silence."""


@dataclass(frozen=True)
class Traits:
    """What a method, with its settings, asks of a generation. The core refuses what it forbids, and the contract test
    reads from it what to demand."""

    whole_prompt: bool = False
    """The prompt must go through the model in one piece (no chunked prefill)."""
    shares_pictures: bool = False
    """What is done to a prompt's row depends on nothing after it, and tensors in the memo begin with the axis of
    samples. Questions about one picture may then share the pass over it."""
    by_plan: bool = False
    """While answering, its stages inside the layers are functions of tensors alone: what they need beside `x` and its
    masks (`site.kept`) lies in the memo since the prompt, and what they note is added to tensors there. They read
    neither positions nor geometry of a new token, so that one `Site` serves a whole answer, compiled or not."""
    sequential: bool = False
    """What it remembers belongs to one answer's tokens in their order, so beams and assisted generation are refused."""
    stepwise: bool = False
    """What it does to a token depends on the pass over the token before. So beams, assisted generation, generation
    without a cache and the scoring of an answer in one pass are refused."""
    accelerator: bool = False
    """Made for speed, not against hallucination; put in force beside methods, never ranked among them."""
    before_penalties: bool = False
    """Its `logits` stage comes before the model's repetition and length penalties, as in its release, not after."""
    lens: bool = False
    """Its `logits` stage reads inner layers with the model's head, by `step.lens`."""
    captures: tuple[Readable, ...] = ()
    """What `begin` reads by `prompt.capture`, in the layers `at_layers`."""
    uses_answers: bool = False
    """It knows the right answers, for an upper bound; result tables refuse it."""
    only_checks: bool = False
    """It edits nothing: it sees to it, in `resolve`, that those beside it come on to the right model."""


@dataclass(frozen=True)
class Intervention:
    """A training-free edit of a model's forward pass. Fields are the method's settings; a stage is a method to
    override.

    Settings are filled from `variants` and checked by their annotations, see `vlmfix.method.kinds`. Two names have a
    meaning for all methods: `layers`, decoder layers, which must be layers of the model, and `select`, how tokens or
    heads are chosen, whose other choices are controls.

    | stage | gets and returns | where |
    |---|---|---|
    | `refine`  | pictures and prompt of a question | before they become inputs; in `ask` only |
    | `tokens`  | what a decoder layer gets: hidden states, rotary embeddings, mask | all rows |
    | `scores`  | (B, H, R, K) float32, before softmax | rows named by `rows` |
    | `weights` | (B, H, R, K) float32, after softmax | rows named by `rows` |
    | `heads`   | (B, Q, H, d) head outputs before the output projection, the model's dtype | all rows |
    | `cache`   | (B, Hk, K, d) keys and values that a layer has in the cache, after its attention | all keys so far |
    | `mlp`     | (B, Q, D) output of a layer's MLP, before it joins the residual stream | all rows |
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
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    """Presets, for methods with a setting `variant`: values of the settings that are `LATER` by default."""
    search: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Settings and values that `vlmfix tune` tries, in every combination, the likeliest first; empty: it leaves the
    method alone."""
    rows: ClassVar[Any] = "last"
    """Prompt rows that the attention stages edit, one of `Rows`; rows of generated tokens always belong. A subclass may
    make it a field."""

    def __post_init__(self) -> None:
        """Fill the variant's values and check each setting. A subclass calls this before checks of its own, of several
        settings together."""
        fill_and_check(self, self.variants)

    @property
    def traits(self) -> Traits:
        """What these settings ask of a generation, and what they leave alone."""
        return Traits()

    @property
    def leaves_pictures(self) -> bool:
        """Whether rows up to the end of the picture stay as they are, by the stages it acts at and its `rows`: then
        several methods may share one pass over a picture."""
        after = self.traits.shares_pictures and self.rows in ("last", "after_last_image", "generated")
        return after and not any(map(self.acts_at, (*ASK_STAGES, "begin", "tokens", "heads", "cache", "mlp")))

    def at_layers(self, n_layers: int) -> Iterable[int]:
        """Decoder layers whose stages run, of a model with `n_layers` layers."""
        return range(n_layers)

    def resolve(self, model: nn.Module, anatomy: Anatomy, processor: Any = None) -> tuple[Intervention, dict[str, Any]]:
        """Fill settings left `None` from facts about the loaded model.

        Returns the filled intervention and what else a result should record (origin of the values, ...).
        Raises `Idle` where the model gives nothing to act on and `ValueError` where a setting does not fit the model.
        """
        return self, {}

    def static(self, anatomy: Anatomy) -> dict[int, list[float]] | None:
        """What weights can hold of the method, as resolved on a model, without this library: decoder layer -> a
        constant factor for the output of each of its heads. `None`: what is done depends on picture or answer."""
        return None

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

    def decode(self, run: Batch) -> tuple[list[list[int]], list[dict[str, Any]]]:
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

    def score_mod(self, s: Tensor, site: Site) -> ScoreMod:
        """The edit of `scores` once more, entry by entry, where it is pointwise: FlexAttention then computes it inside
        its kernel, in all rows at once, and nothing is done again. Of `s` (B, H, 1, K) only shape and dtype mean
        something here. Rows that may not be edited are the engine's business."""
        raise NotImplementedError

    def weights(self, a: Tensor, site: Site) -> Tensor:
        """Edit attention weights."""
        return a

    def heads(self, o: Tensor, site: Site) -> Tensor:
        """Edit head outputs."""
        return o

    def cache(self, keys: Tensor, values: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Edit the keys and values (B, Hk, K, d) that a layer has in the cache, the newest rows' among them: after its
        attention in this pass, so that later passes see the edit. Tensors of the same shapes come back; the cache
        holds them from then on. With latent attention they are the latents. `site` is over the K keys.
        """
        return keys, values

    def mlp(self, x: Tensor, site: Site) -> Tensor:
        """Edit the output (B, Q, D) of a layer's MLP, the model's dtype."""
        return x

    def hidden_layers(self, n_layers: int) -> Iterable[int]:
        """Layers whose outputs the `logits` stage reads by `step.hidden(layer)`; -1 for what the first layer gets."""
        return ()

    def logits(self, scores: Tensor, step: Step) -> Tensor:
        """Edit the scores of the next token: logits, or log-probabilities in beam search; after the model's own
        repetition and length rules (see `Traits.before_penalties`), before temperature and the like."""
        return scores

    def effects(self, memo: dict[str, Any]) -> list[dict[str, Any]]:
        """What it did in one generation: one JSON-ready dictionary per row of the batch, with `acted` among the keys.
        By default that alone, from the bool tensor (B,) that a stage has put under `acted` into the memo."""
        return [{"acted": acted} for acted in memo["acted"].tolist()] if "acted" in memo else []

    def answered(self, memo: dict[str, Any], row: int, run: Batch, tokens: list[int]) -> dict[str, Any]:
        """Add to what `report` says of one answer, now that its tokens are known; in `ask` only. `row` of the batch."""
        return {}

    def idle_hint(self) -> str:
        """What to suspect first when it never acted."""
        return "check its settings against this model."

    def controls(self) -> tuple[Intervention, ...]:
        """Negative controls: the same push with the selection taken out of it (random heads, random tokens), or turned
        round. Where a control does as well as the method, it is not the selection that helps.

        By default one for each other choice of the setting `select`.
        """
        controls = []
        for setting in settings_of(type(self)):
            if setting.name == "select":
                others = [choice for choice in setting.choices if choice != setting.default]
                controls = [replace(self, select=choice) for choice in others]  # type: ignore[call-arg]
        return tuple(controls)

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
        return {"name": name_of(type(self)), **settings}

    def check_layers(self, n_layers: int) -> None:
        """`ValueError` if the setting `layers` names layers that a model with `n_layers` layers does not have; called
        before `resolve`."""
        named = getattr(self, "layers", None) if "layers" in self.__dataclass_fields__ else None
        outside = [layer for layer in named or () if not 0 <= layer < n_layers]
        if outside:
            raise ValueError(f"layers: expected numbers in 0..{n_layers - 1}, got {outside}")

    def __call__(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """`with VAR(p=0.4)(model): ...`: in force inside the block, and as it was before after it."""
        from vlmfix.engine.wrap import wrapped

        return wrapped(model, self)


__all__ = ["LATER", "Idle", "Intervention", "Rows", "Site", "Step", "Traits"]
