"""The launcher, against a stub of VLMEvalKit's interface: `vlmeval.config.supported_VLM`, `BaseModel`, and a `run.py`
that builds the models it was told and asks them."""

import sys

import pytest

import vlmfix
from vlmfix.eval.pictures.data import Data
from vlmfix.integrations import vlmevalkit

RUN = """
import argparse, json
from vlmeval.config import supported_VLM
options = argparse.ArgumentParser()
options.add_argument("--model", nargs="+")
options.add_argument("--data")
options.add_argument("--out")
told = options.parse_args()
message = [{"type": "image", "value": told.data}, {"type": "text", "value": "Is there a cow in the image?"}]
answers = {name: supported_VLM[name]().generate(message) for name in told.model}
json.dump(answers, open(told.out, "w"))
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    package = tmp_path / "kit" / "vlmeval"
    (package / "vlm").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "vlm" / "__init__.py").touch()
    (package / "config.py").write_text("supported_VLM = {}\n")
    base = "class BaseModel:\n    def generate(self, message, dataset=None):\n        return self.generate_inner(message, dataset)\n"
    (package / "vlm" / "base.py").write_text(base)
    run = tmp_path / "kit" / "run.py"
    run.write_text(RUN)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        del sys.modules[name]


def test_run_py_asks_models_with_methods(toolkit, tmp_path, organism):
    import json

    picture = next(iter(Data.load("organism", 1).images.values()))
    out = tmp_path / "answers.json"
    models = ["organism", "organism+vhr:alpha=1.5"]
    vlmevalkit.main([str(toolkit), *models, "--", "--data", str(picture), "--out", str(out)])
    answers = json.loads(out.read_text())
    asked = [
        vlmfix.Asker(*organism, method).ask(picture, "Is there a cow in the image?")
        for method in ("none", "vhr:alpha=1.5")
    ]
    assert answers == {"organism": asked[0].text, "organism+vhr_alpha_1.5": asked[1].text}


def test_mistakes_are_one_line(toolkit):
    for arguments, message in (([], "usage"), ([str(toolkit), "organism+vahr"], "unknown method 'vahr'")):
        with pytest.raises(SystemExit, match=message):
            vlmevalkit.main(arguments)
