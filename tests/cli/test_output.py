"""Every command prints on every stream; errors are short."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.cli.console import SIGNS, print_in_any_encoding

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "assets" / "organism" / "test" / "images" / "test_0058.webp"
ENCODINGS = ["ascii", "cp1252", "gbk", "latin-1", "utf-8", "shift_jis"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters() | st.sampled_from(sorted(SIGNS))), encoding=st.sampled_from(ENCODINGS))
def test_any_text_on_any_stream(text, encoding):
    content = io.BytesIO()
    streams = sys.stdout, sys.stderr
    sys.stdout = stream = io.TextIOWrapper(content, encoding, newline="")
    try:
        print_in_any_encoding()
        sys.stdout.write(text)
        stream.flush()
    finally:
        sys.stdout, sys.stderr = streams
    printed = content.getvalue().decode(encoding)
    if all(sign.isascii() for sign in text):
        assert printed == text
    for sign, plain in SIGNS.items():
        assert sign not in text or sign in printed or plain in printed


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_characters_in_json_stay_what_they_are(text):
    content = io.BytesIO()
    streams, stream = sys.stdout, io.TextIOWrapper(content, "ascii", newline="")
    sys.stdout = stream
    try:
        print_in_any_encoding()
        kept = "".join(sign for sign in text if sign not in SIGNS)
        sys.stdout.write(json.dumps(kept, ensure_ascii=False))
        stream.flush()
    finally:
        sys.stdout = streams
    assert json.loads(content.getvalue()) == kept


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
@pytest.mark.parametrize(
    "command",
    [["methods"], ["methods", "headgain"], ["protocols"], ["score", "a.jsonl", "b.jsonl", "--benchmark", "chair"]],
)
def test_commands_on_streams_that_are_not_utf_8(tmp_path, command, encoding):
    for name, caption in {"a": "A dog and a cat.", "b": "A motorcycle."}.items():
        rows = [{"image_id": number, "caption": caption} for number in (42, 73)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True}
    done = subprocess.run([sys.executable, "-m", "vlmfix", *command], check=False, **options)
    assert done.returncode == 0 and done.stdout.decode(encoding), done.stderr


@pytest.mark.parametrize("image", ["data:image/png;base64," + "A" * 5000, "A" * 5000, "x/" * 3000])
@pytest.mark.parametrize("prompt", [[], ["What?"]])
def test_errors_are_short(image, prompt):
    done = CliRunner().invoke(app, ["ask", image, *prompt])
    assert done.exit_code == 1 and len(done.stderr) < 500 and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["vlmfix methods > /dev/full", "vlmfix methods >&-", "vlmfix methods var >&- 2>&-"])
def test_an_output_that_takes_nothing_is_no_traceback(command):
    if not Path("/dev/full").exists():
        pytest.skip("no such device here")
    shell = command.replace("vlmfix", f"{sys.executable} -m vlmfix", 1)
    done = subprocess.run(["sh", "-c", shell], check=False, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    if "full" in command:
        assert done.returncode == 1 and done.stderr.startswith("vlmfix: the output cannot be written: ")
