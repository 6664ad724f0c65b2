"""The page docs/in-force.md says what happens: every way to call a wrapped model, with a method of every stage."""

import importlib.util
import inspect
from pathlib import Path

import pytest
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.generation.continuous_batching import ContinuousMixin

from tests.contract import ways
from vlmfix.engine.decoding import MODES

TOOL = Path(__file__).parents[2] / "tools/in_force.py"


def tool():
    spec = importlib.util.spec_from_file_location("in_force", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = tool()
WRITTEN = PAGE.parsed(PAGE.PAGE.read_text())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ways.WAYS)
def test_the_page_says_what_happens(way, request):
    """Of ways that take long, two stages, and all of them with --all-models."""
    quick = way not in ways.SLOW or request.config.getoption("--all-models")
    for stage in ways.METHODS if quick else ("scores", "logits"):
        outcome, sentence = ways.verdict(way, stage)
        assert outcome not in ways.FAULTS, f"{stage}: {outcome} {sentence}"
        assert (PAGE.MARKS[outcome], sentence) == WRITTEN[way][stage], f"{stage}: run `make in-force`"


def test_the_page_has_every_way_and_no_other():
    assert list(WRITTEN) == list(ways.WAYS)


def test_the_methods_are_told_apart_from_the_untouched_model():
    """Else every cell would be in force."""
    for stage in ways.METHODS:
        if stage not in ways.ASK_STAGES:
            assert (ways.reference(stage) - ways.plain()).abs().max() > 0.1


def test_every_mode_of_transformers_is_known():
    """A mode or a door that a later transformers brings must be looked at before it passes."""
    elsewhere = {"contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search"}
    assert {mode.value for mode in GenerationMode} == {*MODES, *elsewhere}
    doors = set()
    for mixin in (GenerationMixin, ContinuousMixin):
        for name, function in vars(mixin).items():
            if not name.startswith("_") and inspect.isfunction(function):
                doors.add(name)
    no_doors = {
        "adjust_generation_fn", "load_custom_generate", "prepare_inputs_for_generation", "compute_transition_scores",
        "destroy_cached_continuous_batching_manager", "heal_tokens",
    }  # fmt: skip
    assert doors - no_doors == {
        "generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager",
    }  # fmt: skip
