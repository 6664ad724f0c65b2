"""A baked folder in a process that cannot import the library (make test-apart, since that takes seconds to start)."""

import json

import pytest
import torch

import vlmfix
from tests.carry.test_bake import logits


def test_a_folder_is_checked_without_the_library_and_loads_as_a_model(organism, unwrapped, tmp_path):
    """One format in a fresh process, which takes seconds to start; two questions instead of ten."""
    pytest.importorskip("peft")
    from vlmfix.carry.export import FORMATS, export
    from vlmfix.eval.pictures.data import Data

    model, processor = organism
    pictures = list(Data.load("calibration", 2).images.values())
    questions = [(picture, "Please describe this image in detail.") for picture in pictures]
    spec = "headgain:head_list=L1H0/L3H2/L4H5/L5H1,gain=2"
    inputs = vlmfix.Asker(model, processor).inputs(questions[:1])
    plain = logits(model, inputs)
    wrapped = vlmfix.Asker(model, processor, spec).forward(inputs)[0].logits
    assert (wrapped - plain).abs().max() > 0.1
    for format in FORMATS:
        checked = format == "ia3"
        folder = tmp_path / format
        done = export(
            model, processor, spec, folder, name="organism", format=format, questions=questions, checked=checked
        )
        assert done.exact and done.heads == ["L1H0 x2", "L3H2 x2", "L4H5 x2", "L5H1 x2"]
        card = (folder / "README.md").read_text()
        assert spec in card and "Prompts without a picture are changed, too" in card
        assert json.loads((folder / "head_gains.json").read_text())["model"] == "organism"
        if checked:
            assert done.verdict.difference == 0 and done.verdict.same_answers == 2 and "2 questions" in card
        loaded, its_processor = vlmfix.load(folder, dtype=torch.float32)
        assert loaded.config._name_or_path == str(folder)
        its_inputs = vlmfix.Asker(loaded, its_processor).inputs(questions[:1])
        torch.testing.assert_close(logits(loaded, its_inputs), wrapped, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="there already"):
        export(model, processor, spec, tmp_path / "ia3", name="organism", checked=False)
