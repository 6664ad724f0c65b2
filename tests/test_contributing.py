"""What CONTRIBUTING says of the tree is true of the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FOLDERS = ("vlmfix/", "hooks/", "eval/", "demo/", "tests/", "tools/", "examples/")


def test_paths_exist():
    paths = {word for word in re.findall(r"`([^`\s]+)`", TEXT) if word.startswith(FOLDERS) and "<" not in word}
    paths |= set(re.findall(r"\]\(([^)]+)\)", TEXT))
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_names_are_in_the_files_that_are_said_to_hold_them():
    for name, path in re.findall(r"`([A-Z_]+|Task)` (?:in|of) `([\w/]+\.py)`", TEXT):
        assert re.search(rf"^(class )?{name}\b", (ROOT / path).read_text("utf-8"), re.MULTILINE), (name, path)


def test_commands_of_make_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {command for command in re.findall(r"`make ([\w-]+)", TEXT)} <= set(targets)
