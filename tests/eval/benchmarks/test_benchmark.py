"""What holds of every benchmark: it owns its figures, its options and its way of reading files."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vlmfix.eval.benchmarks.benchmark import (
    BENCHMARKS,
    FileOptions,
    benchmark,
    benchmark_class,
    benchmark_for_files,
    is_better,
    scoring_by_benchmark,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_whole(name):
    cls, bench = benchmark_class(name), benchmark(name)
    assert cls.name == name and bench.title and bench.max_new_tokens > 0
    assert all(figure.meaning for figure in cls.figures.values())
    first = next(iter(cls.figures.values()))
    assert first.shown and first.better, "the first figure decides between a method and its controls"
    assert cls.running in ("", *cls.figures)
    assert {cls.scoring_option, "key"} <= set(cls.file_options) <= {field.name for field in fields(FileOptions)}
    assert list(bench.columns) == [name for name, figure in cls.figures.items() if figure.shown]
    assert bench.metrics.keys() == cls.figures.keys() and bench.facts[cls.scoring_option]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_lies_in_a_file_of_its_name(name):
    assert BENCHMARKS[name].startswith(f"vlmfix.eval.benchmarks.{name}:")
    assert (ROOT / "eval" / "benchmarks" / f"{name}.py").is_file()


def test_files_load_on_first_use():
    code = (
        "import sys; from vlmfix.eval.benchmarks.benchmark import BENCHMARKS, benchmark;"
        "here = lambda: {name for name in BENCHMARKS if f'vlmfix.eval.benchmarks.{name}' in sys.modules};"
        "assert here() == set(), here(); benchmark('mme'); assert here() == {'mme'}, here();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_misspelt_name_is_corrected():
    with pytest.raises(ValueError, match=r"unknown benchmark 'chiar'; did you mean 'chair'\?"):
        benchmark("chiar")
    with pytest.raises(ValueError, match="source is for pope; chair takes only variant, truth, synonyms, key"):
        benchmark_for_files("chair", FileOptions(source="coco"))


def test_which_way_is_better():
    assert [is_better("less", change) for change in (-1.0, 1.0, 0.0, None)] == [True, False, None, None]
    assert [is_better("more", change) for change in (-1.0, 1.0)] == [False, True] and is_better(None, 1.0) is None
    figures = benchmark_class("chair").figures
    assert figures["CHAIR_S"].is_better(-0.1) and not figures["recall"].is_better(-0.1)
    assert figures["words"].is_better(-0.1) is None


def test_each_benchmark_has_its_way_of_scoring():
    ways = scoring_by_benchmark(variant="strict", parser="sentence")
    assert ways["chair"] == "strict" and "amber_captions" not in ways
    assert {way for name, way in ways.items() if name != "chair"} == {"sentence"}
    assert scoring_by_benchmark() == {}
