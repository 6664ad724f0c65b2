"""The shipped organisms: they see, they invent by co-occurrence, and their sinks are found."""

import json
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

import vlmfix
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.results import compare
from vlmfix.eval.run.runner import answer_all
from vlmfix.eval.scorers import chair
from vlmfix.hooks import PAI, VAR
from vlmfix.organism import evaluate, language
from vlmfix.organism.captions import DESCRIBE
from vlmfix.organism.scenes import Painter, object_sets

ORGANISMS = ("organism", "organism-qwen")


@pytest.fixture(scope="module", params=ORGANISMS)
def organism(request):
    return vlmfix.load(request.param)


@pytest.fixture(scope="module")
def rows(organism, tmp_path_factory):
    """Benchmark and group -> columns, on the first 32 test scenes."""
    data, folder = Data.load("organism", limit=32), tmp_path_factory.mktemp("organisms")
    benches = [benchmark("chair", "strict"), benchmark("pope")]
    runs = [answer_all(*organism, (), one, data, folder) for one in benches]
    found = {}
    for comparison in compare(runs):
        for row in comparison.rows:
            found[f"{comparison.benchmark.name} {row.group}".strip()] = row.estimates
    return found, compare(runs[:1])[0].groups[0][0].scores


def test_they_see_and_invent(rows):
    found, scores = rows
    assert found["chair"]["recall"].value > 0.7 and found["pope random"]["accuracy"].value > 0.9
    assert found["pope adversarial"]["accuracy"].value < found["pope random"]["accuracy"].value
    assert 0.25 < found["chair"]["CHAIR_S"].value < 0.75
    told = evaluate.inventions(scores)
    assert told["rate_last"] > told["rate_first"] and told["lift"] > 3 and told["rank6"] > 0.5


def test_without_an_image_they_say_what_is_common(organism):
    told = evaluate.without_image(*organism, DESCRIBE[0])
    assert told["frequency"] > 1.5 and chair.mentions(told["caption"], variant="strict")


def test_the_first_token_is_a_sink(organism):
    data = Data.load("organism", limit=4)
    told = evaluate.attention_shares(*organism, list(data.images.values()), DESCRIBE[0])
    assert max(told["first"]) > 0.2 and told["massive_first"] > 100


def test_var_acts_by_default_on_the_first_organism():
    model, processor = vlmfix.load("organism")
    picture = Data.load("organism", limit=1).images[1]
    vlmfix.wrap(model, VAR(), processor)
    vlmfix.ask(model, processor, picture, DESCRIBE[0], max_new_tokens=4)
    (told,) = vlmfix.effects(model)
    assert set(told["dims"]) <= set(language.SINKS)
    assert any(layer["visual_sinks"] and layer["selected"] > 0 for layer in told["samples"][0]["layers"].values())


def test_methods_change_what_they_say(organism):
    picture = Data.load("organism", limit=1).images[1]
    before = vlmfix.ask(*organism, picture, DESCRIBE[0])
    with PAI(alpha=2.0)(organism[0]):
        assert vlmfix.ask(*organism, picture, DESCRIBE[0]).token_ids != before.token_ids


@pytest.mark.parametrize(
    ("name", "split", "seed", "n"),
    [("test", "val", evaluate.TEST_SEED, 500), ("calibration", "train", evaluate.CALIBRATION_SEED, 120)],
)
def test_the_shipped_scenes_are_those_of_the_generator(name, split, seed, n):
    """Pictures to rounding, annotations to the letter."""
    folder = files("vlmfix.assets") / "organism" / name
    annotations = json.loads((folder / "instances.json").read_text("utf-8"))
    sets = object_sets(split)
    chosen = np.random.default_rng(seed).choice(len(sets), 500, replace=False)
    assert len(annotations["images"]) == n == len(list((folder / "images").iterdir()))
    for index in (1, n // 2, n):
        scene = Painter().scene(sets[chosen[index - 1]], seed, index)
        shown = np.asarray(Image.open(str(folder / "images" / annotations["images"][index - 1]["file_name"])), np.int16)
        assert np.abs(shown - scene.pixels).max() <= 3
        boxes = [a["bbox"] for a in annotations["annotations"] if a["image_id"] == index]
        assert boxes == [list(placed.box) for placed in scene.objects]


def test_the_log_is_that_of_the_recipe():
    """Every stage of both organisms was run to the end that the recipe says."""
    from vlmfix.organism.recipe import Recipe

    recipe, folder = Recipe(), files("vlmfix.assets") / "organism" / "log"
    for stage in ("tower", "language", "projector", "together", "settle", "dynamic"):
        last = json.loads((folder / f"{stage}.jsonl").read_text("utf-8").splitlines()[-1])
        wanted = getattr(recipe, stage)
        assert last["scenes"] > wanted.scenes - 20 * wanted.batch
