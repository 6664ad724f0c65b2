"""The table of stages is the only one: what is written elsewhere of stages is made from it, or agrees with it."""

import inspect
from pathlib import Path

import pytest

from vlmfix.engine import hooks
from vlmfix.method.intervention import Intervention
from vlmfix.method.prompt import Readable
from vlmfix.method.stages import READINGS, TABLE, to_markdown

ROOT = Path(__file__).parents[2]


def test_table_in_contributing():
    assert to_markdown() in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("stage", TABLE, ids=lambda stage: stage.name)
def test_a_stage_is_a_method_of_an_intervention_with_a_hook(stage):
    default = getattr(Intervention, stage.name)
    assert inspect.getdoc(default)
    if stage.edits:
        assert f"| `{stage.name}`" in Intervention.__doc__
    if stage.of in ("layer", "heads", "cache", "mlp"):
        assert stage.name in {kind.stage for kind in hooks.HOOKS}
    assert bool(stage.deed) == bool(stage.part), "what is refused has a sentence"


def test_readings_have_names_and_a_hook():
    names = {reading.name for reading in READINGS}
    assert names == set(Readable.__args__)
    assert names == {kind.reading for kind in (*hooks.HOOKS, hooks.OutputHook)} - {None}
