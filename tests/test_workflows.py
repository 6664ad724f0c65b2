"""The workflows are YAML that a host accepts, and run the commands of the README on every Python that the package names."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def load(name):
    content = yaml.safe_load(WORKFLOWS[name].read_text("utf-8"))
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return content


def commands(name):
    jobs = load(name)["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_there_are_three():
    assert set(WORKFLOWS) == {"tests", "transformers-main", "package"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_step_runs_something_pinned(name):
    workflow = load(name)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))


def test_commands_are_those_of_the_readme_and_targets_of_make():
    readme = (ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    run = commands("tests")
    assert run == ["make quickstart", "make test", "make test-apart", "make test-models", "make test-integrations"]
    for command in run:
        assert command in readme and command.removeprefix("make ") in targets
    assert {"make test", "make test-apart", "make test-models"} < set(commands("transformers-main"))


def test_pythons_are_those_that_the_package_supports():
    pythons = load("tests")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"], "quoted, or 3.10 is 3.1"
    assert f'requires-python = ">={pythons[0]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_a_release_is_built_checked_tried_and_published_without_secrets():
    text = WORKFLOWS["package"].read_text("utf-8")
    run = "\n".join(commands("package"))
    assert "python -m build" in run and "twine check" in run and "clean/bin/vlmfix eval" in run
    pythons = load("package")["jobs"]["pythons"]["strategy"]["matrix"]["python"]
    assert pythons == load("tests")["jobs"]["test"]["strategy"]["matrix"]["python"]
    publish = load("package")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == ["wheel", "pythons"]
    assert "refs/tags/v" in publish["if"] and "secrets." not in text and "password" not in text
