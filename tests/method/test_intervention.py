"""Names, settings, and the ways to write them."""

import re
import sys
import types
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfix.hooks import VAR, VHR
from vlmfix.method.intervention import Intervention
from vlmfix.method.registry import as_interventions, from_json, method_class, parse, spec_of, split_methods

share = st.floats(0, 1, allow_nan=False)
layers = st.none() | st.lists(st.integers(0, 40), unique=True, max_size=5).map(tuple)
dims = st.none() | st.lists(st.integers(0, 5000), min_size=1, max_size=3).map(tuple)
instances = st.one_of(
    st.builds(
        VAR, p=share, rho=share, tau=st.none() | st.floats(0.1, 50), dims=dims, skip_first=st.integers(0, 9),
        variant=st.sampled_from(["hallucination", "general", "released"]), require_dims=st.booleans(),
    ),
    st.builds(VHR, alpha=st.floats(0.1, 2.9), layers=layers, variant=st.sampled_from(["release", "paper", "qwen_port"])),
)  # fmt: skip


@given(st.lists(instances, max_size=3))
def test_labels_and_json_lead_back(found):
    assert parse(spec_of(found)) == tuple(found)
    assert tuple(from_json(one.to_json()) for one in found) == tuple(found)
    assert as_interventions([spec_of([one]) for one in found]) == tuple(found)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("none,var,vhr", ["none", "var", "vhr"]),
        ("var:p=0.4,rho=0.8,vhr", ["var:p=0.4,rho=0.8", "vhr"]),
        ("none, vhr:layers=1/3-5,alpha=2 ,var+vhr:alpha=1", ["none", "vhr:layers=1/3-5,alpha=2", "var+vhr:alpha=1"]),
        ("", []),
    ],
)
def test_splitting(text, parts):
    assert split_methods(text) == parts


def test_forms():
    assert as_interventions(None) == as_interventions("none") == as_interventions([]) == ()
    assert as_interventions("vhr:layers=1/3-5") == (VHR(layers=(1, 3, 4, 5)),)
    assert as_interventions(["var", VHR()]) == (VAR(), VHR())
    assert as_interventions("vhr:layers=7") == (VHR(layers=(7,)),)
    with pytest.raises(TypeError, match="expected a name, an Intervention or a list of these, got int"):
        as_interventions(3)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("vrh", "unknown method 'vrh'; did you mean 'vhr'"),
        ("zzz", "unknown method 'zzz'; known: acg, act, adaiat, "),
        ("var:rhoo=1", "var has no setting 'rhoo'; did you mean 'rho'"),
        ("var:p", "expected setting=value after the colon, got 'p'"),
        ("var:p=lots", "var: p expects a number, got 'lots'"),
        ("var:skip_first=1.5", "var: skip_first expects a whole number, got '1.5'"),
        ("var:p=true", "var: p expects a number, got 'true'"),
        ("var:dims=a/b", "var: dims expects whole numbers such as 1/18-31, got 'a/b'"),
        ("var:dims=0.5/0.25", "var: dims expects whole numbers such as 1/18-31, got '0.5/0.25'"),
        ("var:require_dims=1", "var: require_dims expects true or false, got '1'"),
        ("no.such.module:X", "cannot be imported"),
    ],
)
def test_mistakes(spec, sentence):
    with pytest.raises(ValueError, match="^(?s:.*)" + re.escape(sentence)):
        parse(spec)


@dataclass(frozen=True)
class Dim(Intervention):
    """A user's own: dims what every head says of the image."""

    name = "dim"
    gain: float = 0.5

    def heads(self, o, site):
        return o * self.gain


def test_a_users_own_intervention():
    from tests.models import llava, picture_prompt

    assert parse("tests.method.test_intervention:Dim:gain=0.25") != ()
    (one,) = parse("tests.method.test_intervention:Dim:gain=0.25")
    assert one.gain == 0.25 and one.stages() == ("heads",) and one.needs() == ()
    model = llava()
    prompt = picture_prompt(model)
    plain = model(**prompt).logits
    with one(model):
        assert not plain.equal(model(**prompt).logits)
    assert plain.equal(model(**prompt).logits)


class Outer:
    @dataclass(frozen=True)
    class Inner(Intervention):
        """A class within a class."""

        k: int = 1


@dataclass(frozen=True)
class CallsItselfVar(Intervention):
    """Has the name of a method of the registry, and is another."""

    name = "var"
    k: int = 1


@dataclass(frozen=True)
class BetterVar(VAR):
    """Inherits the name of a method of the registry."""


@pytest.mark.parametrize("cls", [Dim, Outer.Inner, CallsItselfVar, BetterVar])
def test_names_of_third_parties_go_round(cls):
    """Also where the class says a name of its own: only the registry may be asked by a bare name."""
    changed = {Dim: {"gain": 0.25}, BetterVar: {"p": 0.25}}.get(cls, {"k": 3})
    for one in (cls(), cls(**changed)):
        assert one.to_json()["name"] == f"tests.method.test_intervention:{cls.__qualname__}"
        assert from_json(one.to_json()) == one and type(from_json(one.to_json())) is cls
        assert parse(spec_of([one])) == (one,) and type(parse(spec_of([one]))[0]) is cls
        assert parse(spec_of([VAR(), one, VHR()])) == (VAR(), one, VHR())


@pytest.mark.parametrize("module", ["mymod", "var", "none", "my.pkg.mod"])
def test_modules_of_any_name(module, monkeypatch):
    """Without a dot, and with the name of a method of the registry."""
    namespace = types.ModuleType(module)
    source = (
        "from dataclasses import dataclass\nfrom vlmfix import Intervention\n"
        f"@dataclass(frozen=True)\nclass MyClass(Intervention):\n    __module__ = {module!r}\n    k: int = 1\n"
    )
    monkeypatch.setitem(sys.modules, module, namespace)
    exec(source, vars(namespace))
    for one in (namespace.MyClass(), namespace.MyClass(k=3)):
        assert from_json(one.to_json()) == one
        assert parse(spec_of([one])) == (one,) and parse(spec_of([VAR(), one])) == (VAR(), one)
    assert parse(f"{module}:MyClass:k=3") == (namespace.MyClass(k=3),)


def test_hooks_are_named_by_the_registry_alone():
    import vlmfix.hooks

    for name, path in vlmfix.hooks.REGISTRY.items():
        cls = method_class(name)
        assert cls is getattr(vlmfix.hooks, path.partition(":")[2]) and cls.name == name
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from vlmfix.hooks import Nothing  # noqa: F401


def test_the_template_works_as_it_stands():
    """What people copy keeps the contract's first two points, and moves attention as its docstring says."""
    import torch

    from tests.contract.test_contract import footprint, logits
    from tests.models import llava, picture_prompt
    from vlmfix.hooks.template import Template
    from vlmfix.method.site import Site
    from vlmfix.model.geometry import Geometry

    image = torch.tensor([[False, True, True, False], [False] * 4])
    site = Site(2, 4, Geometry(image, image | True, image | True), torch.ones(2, 1, dtype=torch.bool), 0, 0, {})
    a = torch.tensor([0.4, 0.2, 0.1, 0.3]).expand(2, 1, 1, 4)
    out = Template(gain=2.0).weights(a, site)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.4, 0.4, 0.2, 0.3]) / 1.3)
    assert torch.equal(out[1], a[1])
    model = llava()
    prompt = picture_prompt(model, 2, lengths=[3, 6])
    plain = logits(model, prompt)
    before = footprint(model)
    with Template()(model):
        assert not torch.equal(logits(model, prompt), plain)
    assert footprint(model) == before and torch.equal(logits(model, prompt), plain)
    with pytest.raises(ValueError, match="gain: expected a number above 0, got 0"):
        Template(gain=0)
