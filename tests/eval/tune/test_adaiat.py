"""AdaIAT's statistics: means by hand, what is read against a plain pass, and the command."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vlmfix
from vlmfix.asking.asker import Asker
from vlmfix.cli import app
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.refusals import refuse_own_pictures
from vlmfix.eval.tune.adaiat import Named, means, named_objects
from vlmfix.eval.tune.tool import Subject

DATA = Data.load("calibration", 4)


def named(real, position, value):
    return Named(real, position, np.full((1, 1), float(value)))


def test_means_by_hand():
    """Positions 3 and 5 are one place, 25 another, where nothing real is named."""
    objects = [named(True, 3, 4), named(True, 5, 2), named(False, 5, 1), named(False, 25, 9)]
    real, invented = means(objects, "none")
    assert (real.item(), invented.item()) == (3, 5)
    real, invented = means(objects, "position")
    assert (real.item(), invented.item()) == (3, 1)
    # Two places, of which the second has two of each kind and weighs twice.
    objects += [named(True, 27, 6), named(True, 27, 6), named(False, 21, 3)]
    real, invented = means(objects, "position")
    assert (real.item(), invented.item()) == ((3 + 2 * 6) / 3, (1 + 2 * 6) / 3)
    with pytest.raises(ValueError, match=r"1 real and 0 invented objects, and none of both kinds: give more"):
        means(objects[:1], "none")
    with pytest.raises(ValueError, match="none of both kinds at the same positions"):
        means([named(True, 3, 4), named(False, 25, 9)], "position")


def test_what_is_read_is_what_the_model_attends_to(organism):
    """Against the weights of one eager pass over prompt and caption, at the row that predicts an object."""
    model, processor = organism
    objects = named_objects(Subject(model, processor, Data.load("calibration", 1), 1), 24)
    assert objects, "the first caption names something"
    ((_, path),) = Data.load("calibration", 1).images.items()
    asker = Asker(model, processor)
    record = vlmfix.ask(model, processor, path, Chair().prompt, max_new_tokens=24)
    inputs = dict(asker.inputs([(path, Chair().prompt)]))
    n = inputs["input_ids"].shape[1]
    tokens = torch.tensor([record.token_ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            attentions = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for each in objects:
        row = n + each.position - 1
        want = torch.stack([a[0, :, row, n : row + 1].float().mean(-1) for a in attentions])
        torch.testing.assert_close(torch.from_numpy(each.attention), want, rtol=1e-2, atol=1e-4)


def test_the_command_and_its_file(tmp_path, organism, unwrapped):
    path = tmp_path / "adaiat.json"
    args = ["calibrate", "adaiat", "--limit", "6", "--max-new-tokens", "32", "-o", str(path)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "real and" in result.output and f"to use it: adaiat:statistics={path}" in result.output
    model, processor = organism
    vlmfix.wrap(model, f"adaiat:statistics={path}", processor)
    facts = [told["facts"] for told in vlmfix.effects(model)]
    with pytest.raises(ValueError, match="was made on 1 of the 1 pictures"):
        refuse_own_pictures((), facts, Chair().items(Data.load("calibration", 1)))
    assert json.loads(path.read_text())["data"]["n"] == 6
    again = CliRunner().invoke(app, [*args, "--match", "x"])
    assert again.exit_code != 0 and "match: expected none or position, got 'x'" in again.output
