"""The table of model types is made from the installed transformers, and the page that shows it is up to date."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import zoo
from vlmfix.cli import app
from vlmfix.engine import support

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return support.table()


def test_page_is_what_the_command_makes(rows):
    assert (ROOT / "docs" / "models.md").read_text() == support.to_markdown(rows)


def test_the_command_has_a_line_an_entry(rows, monkeypatch):
    monkeypatch.setattr(
        support, "table", lambda names=support.MODEL_TYPES: [row for row in rows if row.model_type in names]
    )
    models = lambda *args: CliRunner().invoke(app, ["models", *args])  # noqa: E731
    lines = models().stdout.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == len(rows) + 2
    name = lines[0].split()[0]
    about = models(name).stdout
    assert about.startswith(name) and len(about.splitlines()) >= 3
    assert json.loads(models("mllama", "--json").stdout)[0]["model_type"] == "mllama"
    unknown = models("nothing-of-the-kind")
    assert unknown.exit_code == 1 and "unknown model type 'nothing-of-the-kind'" in unknown.stderr


def test_one_type_is_told_alone(rows):
    assert support.table(("llava",)) == [row for row in rows if row.model_type == "llava"]


def test_summary_in_the_readme(rows):
    supported = [row for row in rows if row.stages]
    said = re.search(r"(\d+) of (\d+) model types", (ROOT / "README.md").read_text())
    assert said and [int(n) for n in said.groups()] == [len(supported), len(rows)]
    tested = re.search(r"(\d+) of them pass the whole contract", (ROOT / "README.md").read_text())
    assert tested and int(tested[1]) == len(zoo.SUPPORTED)


def test_what_is_under_contract_is_supported_and_the_rest_has_a_reason(rows):
    found = {row.model_type: row for row in rows}
    assert set(zoo.MAPPING) == set(found)
    assert all(found[name].stages for name in zoo.SUPPORTED)
    assert all(row.note for row in rows if not row.stages) and all(row.image_tokens for row in rows if row.stages)
    assert "cross-attention" in found["mllama"].note and "encoder-decoder" in found["florence2"].note
    assert "layer inputs" not in found["glm5_next"].stages and "8 of 32 layers" in found["qwen3_5"].note
    assert json.loads(json.dumps([row.to_json() for row in rows]))[0]["supported"]
