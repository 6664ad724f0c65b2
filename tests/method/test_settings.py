"""Settings by the annotations of their fields: what is listed, read, converted and refused."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfix.hooks import REGISTRY
from vlmfix.method.intervention import LATER, Intervention
from vlmfix.method.kinds import Heads, Layers, Range
from vlmfix.method.layers import layers_of
from vlmfix.method.registry import from_json, method_class, parse, spec_of
from vlmfix.method.settings import settings_of


@dataclass(frozen=True)
class Every(Intervention):
    """One setting of every kind."""

    variants: ClassVar[dict[str, dict[str, Any]]] = {"mild": {"strength": 0.5}, "wild": {"strength": 2.0}}

    share: Annotated[float, Range(0, 1)] = 0.5
    """A share,
    on two lines."""
    n: Annotated[int, Range(1)] = 3
    strength: Annotated[float, Range(above=0)] = LATER
    """`None`: the variant's."""
    on: bool = False
    word: Literal["left", "right"] = "left"
    variant: Literal["mild", "wild"] = "mild"
    layers: Layers | None = None
    ratios: Annotated[tuple[float, ...], Range(above=0, most=1)] = (0.5,)
    span: Literal["first"] | tuple[int, int] = "first"
    heads_of: Heads | None = None
    note: str = ""


BY_NAME = {setting.name: setting for setting in settings_of(Every)}
PATH = f"{__name__}:Every"


def test_settings_are_listed_as_data():
    assert list(BY_NAME) == [
        "share",
        "n",
        "strength",
        "on",
        "word",
        "variant",
        "layers",
        "ratios",
        "span",
        "heads_of",
        "note",
    ]
    assert BY_NAME["share"].doc == "A share, on two lines." and BY_NAME["n"].doc == ""
    assert (BY_NAME["share"].kind, BY_NAME["share"].expected) == ("a number", "a number in 0..1")
    assert BY_NAME["share"].range == Range(0, 1) and BY_NAME["ratios"].range == Range(above=0, most=1)
    assert BY_NAME["word"].choices == ("left", "right") and BY_NAME["on"].choices == ("true", "false")
    assert BY_NAME["span"].choices == () and BY_NAME["word"].range is None
    optional = {name for name, setting in BY_NAME.items() if setting.optional}
    assert optional == {"strength", "layers", "heads_of"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"share": 1.5}, "share: expected a number in 0..1, got 1.5"),
        ({"share": math.nan}, "share: expected a number in 0..1, got nan"),
        ({"share": "much"}, "share: expected a number in 0..1, got 'much'"),
        ({"share": True}, "share: expected a number in 0..1, got True"),
        ({"share": None}, "share: expected a number in 0..1, got None"),
        ({"n": 0}, "n: expected 1 or more, got 0"),
        ({"n": 1.5}, "n: expected 1 or more, got 1.5"),
        ({"strength": 0}, "strength: expected a number above 0, got 0"),
        ({"strength": math.inf}, "strength: expected a number above 0, got inf"),
        ({"on": 1}, "on: expected true or false, got 1"),
        ({"word": "lefft"}, "word: expected left or right, got 'lefft'; did you mean 'left'?"),
        ({"variant": "tame"}, "variant: expected mild or wild, got 'tame'"),
        ({"layers": (1, -1)}, "layers: expected whole numbers such as 1/18-31, each 0 or more, got (1, -1)"),
        ({"layers": (1.5,)}, "layers: expected whole numbers"),
        ({"ratios": (0.5, 0.0)}, "ratios: expected numbers such as 0.5/0.25, each above 0 and up to 1, got (0.5, 0.0)"),
        ({"span": (1, 2, 3)}, "span: expected first, or 2 numbers such as 1/2, got (1, 2, 3)"),
        ({"heads_of": ""}, "heads_of: expected the file of a head list, or heads such as L3H1/L3H5, got ''"),
        ({"heads_of": ((1, -2),)}, "heads_of: expected the file of a head list"),
        ({"note": 3}, "note: expected text, got 3"),
    ],
)
def test_values_refused(settings, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        Every(**settings)


def test_values_take_the_form_of_their_annotation():
    every = Every(layers=3, ratios=1, heads_of=((1, 2), (3, 4)), span=[2, 5])
    assert (every.layers, every.ratios, every.heads_of, every.span) == ((3,), (1,), "L1H2/L3H4", (2, 5))
    assert Every(variant="wild").strength == 2.0 and Every(variant="wild", strength=0.1).strength == 0.1


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("share=1,n=7,strength=2e-1", {"share": 1, "n": 7, "strength": 0.2}),
        ("on=True,word=right,variant=wild", {"on": True, "word": "right", "variant": "wild"}),
        ("layers=1/18-20/4,ratios=0.5/0.25", {"layers": (1, 18, 19, 20, 4), "ratios": (0.5, 0.25)}),
        ("layers=none,heads_of=none", {"layers": None, "heads_of": None}),
        ("layers=", {"layers": ()}),
        ("span=2/5", {"span": (2, 5)}),
        ("heads_of=L1H2/L3H4", {"heads_of": "L1H2/L3H4"}),
        ("heads_of=heads.json,note=12", {"heads_of": "heads.json", "note": "12"}),
        ("note=none", {"note": "none"}),
    ],
)
def test_text_is_read_by_the_annotation(text, settings):
    assert parse(f"{PATH}:{text}") == (Every(**settings),)


@given(
    st.builds(
        Every, share=st.floats(0, 1), n=st.integers(1, 9), strength=st.none() | st.floats(0.1, 9), on=st.booleans(),
        word=st.sampled_from(["left", "right"]), variant=st.sampled_from(["mild", "wild"]),
        layers=st.none() | st.lists(st.integers(0, 40), max_size=4).map(tuple),
        ratios=st.lists(st.floats(0.01, 1), max_size=3).map(tuple),
        span=st.just("first") | st.tuples(st.integers(0, 9), st.integers(0, 9)),
        heads_of=st.none() | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3).map(tuple),
        note=st.sampled_from(["", "12", "true", "none", "two words", "0.5/0.25"]),
    )
)  # fmt: skip
def test_settings_of_every_kind_go_round(every):
    assert parse(spec_of([every])) == (every,) and from_json(every.to_json()) == every


def test_every_setting_of_every_method_is_of_a_known_kind_and_explained():
    for name in REGISTRY:
        for setting in settings_of(method_class(name)):
            assert setting.doc and "anything" not in setting.kind, (name, setting.name)


def test_annotations_that_are_not_there():
    @dataclass(frozen=True)
    class Lost(Intervention):
        gain: "Missing" = 1.0  # noqa: F821

    with pytest.raises(TypeError, match=r"Lost: the annotations of settings cannot be read: name 'Missing'"):
        Lost()


def test_layers_at_the_same_depth():
    assert layers_of(5, 18, 32) == range(5, 19) and layers_of(5, 18, 4) == range(1, 3)
    assert layers_of(18, 31, 40) == range(22, 40) and layers_of(18, 31, 64) == range(36, 64)
    assert layers_of(62, 78, 6, of=100) == range(4, 6) and layers_of(31, 31, 1) == range(1)
