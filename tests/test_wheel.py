"""The package that users install: built through an sdist, unpacked elsewhere, used away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the built wheel was installed in."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out / "dist", ROOT], check=True, capture_output=True)
    (wheel,) = (out / "dist").glob("*.whl")
    target = out / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    return wheel, target


def test_wheel_holds_one_package_and_its_data(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    assert {n.split("/")[0] for n in names} == {"vlmfix", next(n for n in names if ".dist-info" in n).split("/")[0]}
    assert {f"vlmfix/{f}" for f in ("eval/report/templates/page.html.j2", "demo/templates/leaderboard.html.j2")} <= {
        *names
    }
    for needed in (
        "hooks/var.py",
        "eval/scorers/chair/scores.py",
        "demo/app.py",
        "organism/train.py",
        "py.typed",
        "assets/organism/test/instances.json",
    ):
        assert f"vlmfix/{needed}" in names
    scenes = {
        folder: sum(f"assets/organism/{folder}/images/" in n for n in names) for folder in ("test", "calibration")
    }
    assert scenes == {"test": 500, "calibration": 120}
    for needed in ("organism/model/model.safetensors", "organism/qwen/model.safetensors", "LICENSE"):
        assert any(n.endswith(needed) for n in names)
    assert installed[0].stat().st_size < 26e6


def test_everything_imports_and_runs_from_the_wheel(installed, tmp_path):
    code = (
        "import importlib, pkgutil, vlmfix;"
        f"assert vlmfix.__file__.startswith({str(installed[1])!r}), vlmfix.__file__;"
        "names = [m.name for m in pkgutil.walk_packages(vlmfix.__path__, 'vlmfix.')];"
        "[importlib.import_module(n) for n in names if not n.endswith(('__main__', 'lmms_model'))]; print(len(names))"
    )
    env = {**os.environ, "PYTHONPATH": str(installed[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and int(done.stdout) > 100, done.stderr
    command = [sys.executable, "-m", "vlmfix", "eval", "--limit", "2", "--benchmark", "chair", "--method", "none,vhr"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "CHAIR (rohrbach), model organism, 2 pictures" in done.stdout, done.stderr
    assert (tmp_path / "runs" / "chair" / "organism").is_dir()


def test_the_parts_of_the_package_are_links_and_no_module_has_a_second_name():
    for part in ("hooks", "eval", "demo", "organism", "assets"):
        assert (ROOT / "vlmfix" / part).readlink() == Path("..") / part
    code = "import importlib.util, vlmfix; assert importlib.util.find_spec('vlmfix.vlmfix') is None"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
