"""Reports: words, verdicts, files and the page, from small runs written by hand against the embedded scenes. No model."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlmfix.cli import app
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.report import figures, gallery, html, latex, markdown, mistakes, plots, tables, terminal, words
from vlmfix.eval.report.csv_json import to_csv, to_json
from vlmfix.eval.report.latex import to_latex
from vlmfix.eval.report.markdown import to_markdown
from vlmfix.eval.report.study import find_runs, study
from vlmfix.eval.report.verdicts import is_real
from vlmfix.eval.run.protocols import find_protocol
from vlmfix.eval.run.results import Run, compare
from vlmfix.eval.scorers import stats
from vlmfix.eval.scorers.chair import score_captions
from vlmfix.eval.scorers.stats import Difference

ROOT = Path(__file__).parents[2]
N = 48
DATA = Data.load(limit=N)
HOSTILE = (
    '</div></dl><script>alert(1)</script><img src=x onerror=alert(2)> a dog & a "zebra" \' \x00\x1b[2J \u202egnp.exe '
    "\ud800 `code` ]]> <!-- \U0001f600 [a](javascript:alert(6)) {{ 7 * 7 }} {% raw %}"
)


def caption(image, invented=(), skip=0):
    named = sorted(DATA.truth[image])[skip:]
    return " ".join(f"There is a {name}." for name in [*named, *invented]) or "A picture."


def absent(image, name="giraffe"):
    return [name] if name not in DATA.truth[image] else ["zebra"]


def captions(invent, skip=lambda k: 0):
    """Captions of all pictures; the k-th invents an object where `invent(k)`."""
    return {
        str(image): caption(image, absent(image) if invent(k) else (), skip(k)) for k, image in enumerate(DATA.images)
    }


def write(folder, label, texts, bench="chair", **identity):
    """A run folder as `vlmfix eval` writes them."""
    folder = folder / f"{bench}-{label.replace('/', '_')}-{len(list(folder.glob('*')))}"
    folder.mkdir(parents=True)
    method = [] if label == "none" else [{"name": label, "facts": {}}]
    found = {
        "benchmark": bench, "model": "toy", "method": method, "data": "organism", "data_digest": DATA.digest, "limit": N,
        "max_new_tokens": 64, "vlmfix": "0", **identity,
    }  # fmt: skip
    environment = {"command": "vlmfix eval", "started": "2026-01-02T03:04:05+00:00"}
    header = {"label": label, "fingerprint": "00c0ffee", "identity": found, "environment": environment}
    (folder / "run.json").write_text(json.dumps(header))
    records = [{"id": key, "text": text, "effects": [{"acted": True}], "finish": "stop"} for key, text in texts.items()]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def studies(*folders):
    return [study(c) for c in compare(find_runs(folders), 400)]


def pope_answers(wrong):
    """Right answers, but for the questions where `wrong(question)`."""
    bench = benchmark("pope")
    other = {"yes": "No", "no": "Yes"}
    return {bench.item_id(q): other[q.label] if wrong(q) else q.label.title() for q in bench.questions(DATA)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untouched: invents in three pictures of four. Method `good`: in one of four, else the same."""
    out = tmp_path_factory.mktemp("runs")
    base = captions(lambda k: k % 4)
    almost = dict(base)
    almost[next(iter(base))] += " There is a zebra."
    return {
        "none": write(out, "none", base),
        "good": write(out, "good", captions(lambda k: k % 4 == 1)),
        "same": write(out, "same", base),
        "almost": write(out, "almost", almost),
        "brief": write(out, "brief", {key: " ".join(text.split()[:10]) for key, text in base.items()}),
    }


@pytest.fixture(scope="module")
def chair(folders):
    return studies(*(folders[name] for name in ("none", "good", "same", "almost")))[0]


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    out = tmp_path_factory.mktemp("pope")
    none = write(out, "none", pope_answers(lambda q: q.object == "person"), "pope")
    timid = write(out, "timid", pope_answers(lambda q: q.label == "yes" and q.object in ("person", "car")), "pope")
    return studies(none, timid)[0]


class Page(HTMLParser):
    """Tags with attributes, and all text; complains about tags that are not closed."""

    void = frozenset({"meta", "img", "br", "use"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.said, self.open = [], [], []
        self.feed(page)
        assert not self.open, self.open
        self.text = "".join(self.said)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def safe(page):
    """Nothing in a page runs, loads or links to anything outside of it."""
    parsed = Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "a:script"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), value
            if name == "src":
                assert value.startswith("data:image/png;base64,")
    assert not re.search(r"url\((?!#)|@import", page)
    return parsed


# Words


def test_real_differences_are_called_real(chair):
    said = {text.split("`")[1]: text for text in words.summary(chair)}
    assert list(said) == ["good", "same", "almost"]
    assert said["good"].startswith("`good`: really better in CHAIR_S −50.0 points [")
    assert "really changed in objects −" in said["good"] and ", words −" in said["good"]
    assert "really worse" not in said["good"]
    assert "not told apart from the untouched model in recall, repetition" in said["good"]
    assert "it does more than saying less" in said["good"]


def test_unreal_differences_are_not(chair):
    said = {text.split("`")[1]: text for text in words.summary(chair)}
    assert said["same"] == (
        f"`same` answers word for word as the untouched model does, all {N} times: it changes nothing here."
    )
    assert said["almost"].startswith(
        "`almost`: no difference is real (CHAIR_S, CHAIR_I, CHAIR_I_unique, recall, F1, objects, words, repetition)."
    )
    assert "no more than saying less" in said["almost"]


def test_for_the_worse(folders):
    (turned,) = studies(folders["none"], folders["good"])
    swapped = replace(turned, verdicts=[replace(v, difference=mirrored(v.difference)) for v in turned.verdicts])
    (said,) = words.summary(swapped)
    assert said.startswith("`good`: really worse in CHAIR_S +50.0 points [")


def mirrored(d):
    return replace(d, value=-d.value, low=-d.high, high=-d.low)


def test_holm_takes_back_what_one_comparison_would_give(tmp_path):
    base = captions(lambda k: k < 40)
    some = captions(lambda k: 6 <= k < 40)  # six cured, none spoiled: p = .031
    one = [write(tmp_path / "one", "none", base), write(tmp_path / "one", "some", some)]
    many = [write(tmp_path / "many", "none", base)]
    many += [write(tmp_path / "many", name, some) for name in ("some", "more")]
    alone, together = (
        next(v for v in studies(*folders)[0].verdicts if (v.method, v.metric) == ("some", "CHAIR_S"))
        for folders in (one, many)
    )
    assert (alone.discordant.only_base, alone.discordant.only_method) == (6, 0)
    assert alone.p == together.p == alone.p_holm == 2 / 2**6 and alone.real
    assert together.p_holm == 4 / 2**6 and together.difference.clear and not together.real
    assert "really better in CHAIR_S" in words.summary(studies(*one)[0])[0]
    assert "really better in CHAIR_S" not in words.summary(studies(*many)[0])[0]


def test_an_interval_that_holds_0_is_never_real(chair):
    for v in chair.verdicts:
        if not v.difference.clear:
            assert not replace(v, p_holm=0.0).real


def test_what_n_can_resolve(chair):
    told = words.resolution(chair)
    widest = max(v.difference.high - v.difference.low for v in chair.verdicts if v.metric == "CHAIR_S") / 2
    assert told.startswith(f"With {N} pictures, differences are known to about ±{100 * widest:.1f} points in CHAIR_S")


def test_without_the_untouched_model(folders):
    (one,) = studies(folders["good"])
    assert "nothing to tell a difference from" in words.summary(one)[0] and not one.verdicts
    assert "Differences are paired" not in html.page([one])
    (bare,) = studies(folders["none"])
    assert words.summary(bare) == ["There is only the untouched model, and nothing to compare it with."]
    safe(html.page([bare]))


def test_merely_shorter_captions_are_on_the_curve(folders):
    (one,) = studies(folders["none"], folders["brief"])
    control = one.controls[1]
    assert control.status == "inside" and control.chair_s.value == pytest.approx(0) and not control.below_curve
    assert control.cut_words == pytest.approx(one.comparison.rows[1].estimates["words"].value)
    assert "no more than saying less would do" in words.summary(one)[0]
    assert any("shorter than the untouched model's" in flag for flag in words.warnings(one))


# What else must be said


def test_runs_that_differ_in_more_than_the_method(tmp_path, folders):
    other = write(tmp_path, "other", captions(lambda k: False), dtype="float16")
    (one,) = studies(folders["none"], other)
    assert any('in dtype: `none` null, `other` "float16"' in flag for flag in words.warnings(one))
    for asked in ({"max_new_tokens": 32}, {"decoding": "beam5"}, {"template": "pai"}, {"asking": {"prompt": "What?"}}):
        apart = studies(folders["none"], write(tmp_path, "apart", captions(lambda k: False), **asked))
        assert len(apart) == 2 and not any(one.verdicts for one in apart), "asked otherwise, so never compared"
    assert not any("Runs differ" in flag for flag in words.warnings(studies(folders["none"], folders["good"])[0]))


def test_loops_and_cut_captions_are_flagged(tmp_path, folders):
    loop = {key: f"{text} " + "There is a dog. " * 9 for key, text in captions(lambda k: False).items()}
    folder = write(tmp_path, "loop", loop)
    lines = (folder / "records.jsonl").read_text().replace('"finish": "stop"', '"finish": "length"')
    (folder / "records.jsonl").write_text(lines)
    flags = " ".join(words.warnings(studies(folders["none"], folder)[0]))
    assert "`loop` repeats itself" in flags and "the token budget cut 100% of the captions" in flags
    assert "longer than the untouched model's" in flags


def test_naming_fewer_objects_more_often_is_flagged(tmp_path):
    some = {str(i): caption(i) for i in DATA.images}
    first = {str(i): f"{caption(i).split('.')[0]}. " * 8 for i in DATA.images}
    (one,) = studies(write(tmp_path, "none", some), write(tmp_path, "again", first))
    assert any("look at CHAIR_I_unique" in flag for flag in words.warnings(one))


def test_pictures_with_one_answer_are_counted(tmp_path, folders):
    fewer = write(tmp_path, "fewer", dict(list(captions(lambda k: False).items())[:-5]))
    (one,) = studies(folders["none"], fewer)
    assert any("`fewer`: 5 pictures lack one of the two answers" in flag for flag in words.warnings(one))
    assert one.controls[1].images == N - 5
    assert len(re.findall("Drawn at random", html.page([one]))) == 1


def test_two_runs_with_one_name_are_told_apart(tmp_path, folders):
    twins = [write(tmp_path, "good", captions(lambda k: False), seed=k) for k in range(2)]
    (one,) = studies(folders["none"], *twins)
    assert one.names == ["none", "good (00c0ffee) #2", "good (00c0ffee) #3"]
    assert {v.method for v in one.verdicts} == set(one.names[1:])


# One rule


def row_below(text, start, rows=1):
    """The line so many lines below the one that starts so."""
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith(start)) + rows]


def test_one_rule_decides_on_stars_bold_colours_and_words(tmp_path):
    """Holm takes back CHAIR_S of two equal methods that one method alone would have: so it is marked nowhere."""
    base = captions(lambda k: k < 40)
    some = captions(lambda k: 6 <= k < 40)
    folders = [write(tmp_path, "none", base), *(write(tmp_path, name, some) for name in ("some", "more"))]
    for methods, real in ((folders, False), (folders[:2], True)):
        (one,) = studies(*methods)
        verdict = next(v for v in one.verdicts if (v.method, v.metric) == ("some", "CHAIR_S"))
        assert verdict.difference.clear and verdict.real is real
        (table,) = tables.comparison_tables(one)
        cell = next(line for line in table.lines if line.label == "CHAIR_S %").cells[1]
        assert cell.verdict is verdict and cell.real is real
        change = cell.change
        row = row_below(drawn_in(one, 200), "some ", 0)
        first_figure = row.partition("]")[0]
        assert cell.change_interval in row and (f"{cell.change_number}*" in first_figure) is real
        assert (f"**{change}**" in row_below(to_markdown([one]), "| CHAIR_S % |", 0)) is real
        assert (rf"\textbf{{{latex.escape(change)}}}" in row_below(to_latex([one]), r"CHAIR\_S \% & ")) is real
        page = html.page([one])
        kind = "real good" if real else "unreal"
        assert f'<span class="{kind}">{cell.change_number}</span><small>{cell.change_interval}, p = ' in page
        line = next(
            x for x in csv.DictReader(io.StringIO(to_csv([one]))) if (x["method"], x["metric"]) == ("some", "CHAIR_S")
        )
        assert line["real"] == str(real)
        assert ("really better in CHAIR_S" in words.summary(one)[0]) is real


# Tables


def drawn_in(one, width):
    """Its tables in a terminal."""
    console = Console(width=width, file=io.StringIO())
    terminal.show(console, [one])
    return console.file.getvalue()


TWELVE = {
    "none": lambda k: k < 40,
    "truncate:words=40": lambda k: k < 20,
    "var": lambda k: 6 <= k < 40,
    "var:select=random": lambda k: 2 <= k < 40,
    "var:p=0.9,rho=0.3": lambda k: k < 10,
    "var:p=0.9,rho=0.3,select=random": lambda k: k < 36,
    "vhr": lambda k: k < 12,
    "vhr:select=random": lambda k: k < 12,
    "headgain:gain=1.5,head_list=L1H2/L3H4/L5H6/L7H8": lambda k: False,
    "headgain:gain=1.5,head_list=L1H2/L3H4/L5H6/L7H8,select=random": lambda k: k < 40,
    "pai:alpha=0.2": lambda k: k < 15,
    "pai:alpha=-0.2": lambda k: True,
}
"""Method -> on which pictures it invents."""


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twelve")
    return [write(folder, label, captions(invents)) for label, invents in TWELVE.items()]


@pytest.mark.parametrize("width", [80, 100, 160, 240])
@pytest.mark.parametrize("full", [False, True])
def test_a_terminal_of_any_width_cuts_nothing(twelve, width, full, monkeypatch):
    """In a pseudo-terminal: every name whole, every interval whole, no line wider than the terminal."""
    arguments = ["score", *twelve, *(["--full"] if full else [])]
    lines = in_terminal(arguments, width, monkeypatch).split("The first")[0].splitlines()
    rule = next(place for place, line in enumerate(lines) if line.startswith("──"))
    end = next(place for place, line in enumerate(lines) if line.startswith("Invents less"))
    table = lines[:end]
    assert max(map(len, table)) <= width and "…" not in "".join(table)
    (one,) = map(study, compare(find_runs(twelve)))
    (wanted,) = tables.method_tables(one, full)
    parts = sum(line.startswith("──") for line in table)
    for name, is_control in zip(wanted.names, wanted.is_control, strict=True):
        starts = [line for line in table if line.startswith("  " * is_control + name)]
        assert len(starts) >= parts, name
    body = " ".join(table[rule:])
    for column in wanted.columns:
        for cell in column.cells:
            shown = cell.change_interval or cell.interval
            assert shown in body and cell.change_number in body and cell.number in body
    assert wanted.names[:4] == ["none", "truncate:words=40", "var", "control: select=random"]


def in_terminal(arguments, width, monkeypatch):
    """What a command prints in a pseudo-terminal of so many columns, without colours. It runs in this process, since
    another one would take seconds to start."""
    pty = pytest.importorskip("pty")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    blocks = []

    def read():
        with contextlib.suppress(OSError):  # nobody writes any more
            while block := os.read(controller, 65536):
                blocks.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    own = [os.dup(fd) for fd in range(3)]
    try:
        for fd in range(3):
            os.dup2(terminal, fd)
        with open(terminal, "w") as screen, contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            app([str(each) for each in arguments], standalone_mode=False)
    finally:
        for fd, kept in enumerate(own):
            os.dup2(kept, fd)
            os.close(kept)
    reader.join()
    os.close(controller)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(blocks).decode()).replace("\r", "")


def test_in_short_says_no_more_than_the_intervals(twelve, folders):
    (one,) = studies(*twelve)
    first, *others = words.in_short(one)
    real = {v.method for v in one.verdicts if v.metric == "CHAIR_S" and v.real and v.better}
    assert real and set(first.split("; ")[0].partition(": ")[2].rstrip(".").split(", ")) == {f"`{n}`" for n in real} - {
        f"`{one.names[control]}`" for _, control in one.pairs
    }
    assert "Better than its own negative control" in others[-1] and "not told apart from it, or worse" in others[-1]
    (same,) = studies(folders["none"], folders["same"])
    assert words.in_short(same) == ["Not told apart from the untouched model (CHAIR_S): `same`."]


def test_nothing_is_real_of_few_pictures():
    for n, real in ((5, False), (6, True)):
        assert is_real(Difference(-1.0, -1.0, -1.0, 0.0, n, 0), 0.0) is real


def test_a_long_name_goes_on_in_the_next_line(tmp_path, folders):
    label = "vhr:layers=" + "/".join(map(str, range(40)))
    (one,) = studies(folders["none"], write(tmp_path, label, captions(lambda k: False)))
    lines = drawn_in(one, 80).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("vhr:"))
    assert "".join(lines[start : start + 2]) == label


def test_runs_with_unlike_numbers_of_answers_say_so(tmp_path, folders):
    fewer = write(tmp_path, "fewer", dict(list(captions(lambda k: False).items())[:-5]))
    (table,) = tables.comparison_tables(studies(folders["none"], fewer)[0])
    assert table.lines[0].label == "captions" and [cell.value for cell in table.lines[0].cells] == [str(N), str(N - 5)]
    assert table.lines[0].cells[1].change == f"{N - 5} images in common"
    (whole,) = tables.comparison_tables(studies(folders["none"], folders["good"])[0])
    assert whole.lines[0].label == "CHAIR_S %"


def test_markdown_rows_stay_rows(tmp_path, folders):
    (one,) = studies(folders["none"], write(tmp_path, "a|b\nc", captions(lambda k: False)))
    rows = [row for row in markdown.tables(one).splitlines() if row.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1 and r"`a\|b c`" in rows[0]


# LaTeX


def test_latex_of_captions(chair, pope):
    text = to_latex([chair, pope])
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 1 + 3
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 4
    for table in re.findall(r"\\begin\{tabular\}\{(l?r*)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [row for row in table[1].splitlines() if row.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table[0]) - 1}, "as many cells as columns"
    assert r"CHAIR\_I\_unique \% & " in text and r"\textbf{$-$50.0 [$-$" in text
    assert "Scorer: CHAIR (rohrbach). " in text and "Scorer: POPE, parser pope. " in text
    assert "bold marks a real one. A difference is real if its 95" in text


def test_latex_names_the_protocol_and_what_others_report(tmp_path, folders):
    (one,) = studies(folders["none"], folders["good"])
    preset = find_protocol("pai-512")
    asked = replace(one.comparison, protocol=preset, deviations=("images: scenes instead of coco",))
    text = to_latex([study(asked)])
    assert "Deviates from protocol pai-512 in images: scenes instead of coco" in text
    assert "Published for pai-512, LLaVA-1.5-7B" in text


def test_latex_obeys_no_text(tmp_path):
    mean = r"\input{/etc/passwd} $x_1^2$ 50% & #1 ~ {a} --limit \\ [b]" + "\n\x1b\ud800"
    escaped = latex.escape(mean)
    assert escaped == (
        r"\textbackslash{}input\{/etc/passwd\} \$x\_1\textasciicircum{}2\$ 50\% \& \#1 \textasciitilde{} \{a\} -{}-limit "
        r"\textbackslash{}\textbackslash{} [b]"
    )
    (one,) = studies(
        write(tmp_path, "none", captions(lambda k: True)), write(tmp_path, mean[:-2], captions(lambda k: False))
    )
    assert r"\input" not in to_latex([one])


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(chair, pope, tmp_path):
    (tmp_path / "tables.tex").write_text(to_latex([chair, pope]), "utf-8")
    paper = r"\documentclass{article}\usepackage[margin=2cm]{geometry}\usepackage{booktabs}\begin{document}\input{tables}\end{document}"
    (tmp_path / "paper.tex").write_text(paper)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout[-2000:]


# Numbers


def test_figures_are_those_of_the_comparison(folders, chair):
    wanted = [folders[name] for name in ("none", "good", "same", "almost")]
    (comparison,) = compare([Run.read(f) for f in wanted], 400)
    lines = list(csv.DictReader(io.StringIO(to_csv([chair]))))
    (data,) = json.loads(to_json([chair]))
    shown = Page(html.page([chair])).text
    for at, row in enumerate(comparison.rows):
        for metric, e in row.estimates.items():
            assert chair.comparison.rows[at].estimates[metric] == e
            (line,) = (x for x in lines if (x["method"], x["metric"]) == (row.method, metric))
            assert (float(line["value"]), float(line["low"]), float(line["high"])) == (e.value, e.low, e.high)
            assert data["rows"][at]["estimates"][metric]["value"] == e.value
            factor = chair.columns[metric][1]
            assert f"{figures.number(e.value, factor)}{figures.interval(e, factor)}" in shown
            if row.differences:
                d = row.differences[metric]
                assert float(line["difference"]) == d.value and float(line["difference_low"]) == d.low
                assert d.value == 0 or figures.interval(d, factor, True) in shown
    assert set(chair.columns) == {*comparison.rows[0].estimates, "objects", "mentions"}


def test_objects_and_mentions_a_caption(chair):
    none = chair.comparison.rows[0].estimates
    scores = chair.captions[0].values()
    assert none["objects"].value == pytest.approx(sum(len(s.objects) for s in scores) / N)
    assert none["mentions"].value == pytest.approx(sum(len(s.mentions) for s in scores) / N)


def test_mcnemar_decides_on_chair_s(chair):
    v = next(v for v in chair.verdicts if (v.method, v.metric) == ("good", "CHAIR_S"))
    assert (v.discordant.only_base, v.discordant.only_method) == (N // 2, 0)
    assert v.p == stats.mcnemar(0, N // 2) and v.methods == 3
    other = next(v for v in chair.verdicts if (v.method, v.metric) == ("good", "F1"))
    assert other.p == other.difference.p and other.discordant is None


def test_position_of_inventions_by_hand():
    (score,) = score_captions([(1, "a dog b c d e f g a cat")], {1: frozenset({"dog"})})
    assert [e.value for e in mistakes.by_position({1: score}, 10)] == [0.0, None, None, None, 1.0]


def test_rates_of_objects_by_hand(chair):
    invented, missed = mistakes.object_rates(chair)
    giraffes = sum("giraffe" not in DATA.truth[i] for i in DATA.images)
    times = sum("giraffe" not in DATA.truth[i] for k, i in enumerate(DATA.images) if k % 4)
    assert invented["giraffe"][0] == mistakes.Rate(times, giraffes) and next(iter(invented)) == "giraffe"
    assert all(any(r.times for r in rates) for rates in missed.values())
    assert all(r.times <= r.of for rates in missed.values() for r in rates)
    assert len({r.of for r in invented["giraffe"]}) == 1, "also for a method that never names it"


def test_an_object_can_only_be_invented_where_it_is_not(tmp_path):
    people = write(tmp_path, "none", {str(i): "There is a person." for i in DATA.images})
    invented, missed = mistakes.object_rates(studies(people)[0])
    without = sum("person" not in DATA.truth[i] for i in DATA.images)
    assert invented == {"person": [mistakes.Rate(without, without)]} and 0 < without < N
    assert "person" not in missed and missed["car"][0].share == 1


def test_confusion_and_objects_of_questions(pope):
    bench = pope.comparison.benchmark
    asked = [q for q in bench.questions(DATA) if q.split == "adversarial"]
    table = mistakes.confusion(pope)["adversarial"]
    wrong = [q for q in asked if q.object == "person"]
    assert table[0]["fn"] == sum(q.label == "yes" for q in wrong) and table[0]["fp"] == sum(
        q.label == "no" for q in wrong
    )
    assert table[1]["fp"] == 0 and table[1]["fn"] > table[0]["fn"]
    assert sum(table[0][k] for k in ("tp", "fn", "tn", "fp")) == len(asked)
    invented, denied = mistakes.object_rates(pope)
    assert invented["person"][0].share == 1 and invented["person"][1].times == 0
    assert set(denied) == {"person", "car"} and denied["car"][1].share == 1
    shown = Page(html.page([pope])).text
    assert "Denied most" in shown and "adversarial" in shown and "Truncation control" not in shown


# The page


def test_page_is_whole_and_needs_nothing_else(chair, pope):
    page = html.page([chair, pope])
    parsed = safe(page)
    assert page.startswith("<!DOCTYPE html>") and "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and 'name="viewport"' in page
    assert "http://" not in page and "https://" not in page
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 3 and sum(tag == "img" for tag, _ in parsed.tags) > 8
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids)), "plots do not share ids"
    assert {a["href"] for tag, a in parsed.tags if tag == "a"} == {"#part1", "#part2"} <= {f"#{i}" for i in ids}
    assert parsed.text.count("Provenance") == 2 and "00c0ffee" in parsed.text
    assert "Model toy; methods none, good, same, almost, timid;" in parsed.text
    for said in words.summary(chair):
        assert said.replace("`", "") in parsed.text
    assert html.page([chair, pope]) == page, "the same answers, the same page"


def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
    texts = dict.fromkeys(captions(lambda k: False), HOSTILE)
    mean = [
        write(tmp_path, "none", texts),
        write(tmp_path, "<b onclick=alert(3)>&\"'`x` $\\frac{1}{0}$", captions(lambda k: True)),
    ]
    header = json.loads((mean[1] / "run.json").read_text())
    header["environment"]["command"] = HOSTILE
    header["identity"]["revision"] = "<script>alert(4)</script>"
    (mean[1] / "run.json").write_text(json.dumps(header))
    found = studies(*mean)
    page = html.page(found)
    parsed = safe(page)
    assert not any(tag == "b" and attributes for tag, attributes in parsed.tags)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)> a " in parsed.text
    assert "[a](javascript:alert(6)) {{ 7 * 7 }} {% raw %}" in parsed.text, "text is no template"
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", page)
    page.encode("utf-8")
    safe(html.page(found, gallery=0, sample=0))
    to_markdown(found), json.loads(to_json(found)), to_csv(found)


def drawn(macro, *args):
    """A part of the page by itself."""
    return str(getattr(html.environment().get_template("pictures.html.j2").module, macro)(*args))


def test_words_are_marked_where_they_stand():
    (score,) = score_captions([(1, 'A "dog" <and> two cats near a dog.')], {1: frozenset({"dog", "car"})})
    assert drawn("caption", gallery.marked(score)) == (
        'A &#34;<span class="present" title="dog">dog</span>&#34; &lt;and&gt; two '
        '<del class="invented" title="cat">cats</del> near a <span class="present" title="dog">dog</span>.'
    )
    answer = gallery.Answer(["none"], gallery.marked(score), sorted(score.missed))
    assert "<small>missed: car</small>" in drawn("cards", [gallery.Card(1, "", None, [answer])])
    (empty,) = score_captions([(1, "")], {1: frozenset()})
    assert "an empty answer" in drawn("caption", gallery.marked(empty))


def test_pictures_where_methods_differ_most_come_first(tmp_path):
    base, mine = captions(lambda k: False), captions(lambda k: k == 3)
    *_, last = mine
    mine[last] += " There is a zebra. There is a giraffe."
    (one,) = studies(write(tmp_path, "none", base), write(tmp_path, "mine", mine))
    shown = re.findall('alt="([^"]+)"', html.page([one], gallery=8, sample=0))
    assert shown == [DATA.images[int(last)].name, DATA.images[list(DATA.images)[3]].name], "and equal ones are left out"


def test_gallery(chair):
    worst = max(DATA.images, key=lambda i: (gallery.spread(chair, i), -i))
    page = html.page([chair], gallery=1, sample=3, seed=5)
    names = re.findall(r'<img src="[^"]+" alt="([^"]+)"', page)
    assert names[0] == DATA.images[worst].name and len(names) == 4
    assert re.findall('alt="([^"]+)"', html.page([chair], gallery=1, sample=3, seed=5)) == names
    assert re.findall('alt="([^"]+)"', html.page([chair], gallery=1, sample=3, seed=6)) != names
    assert "<code>none</code> = <code>same</code>" in page, "equal captions are shown once"


def test_pictures_that_cannot_be_read(chair, tmp_path):
    assert gallery.thumbnail(tmp_path / "none.png") is None
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    assert gallery.thumbnail(tmp_path / "broken.png") is None
    assert "none.png is not on this machine" in drawn("picture", gallery.Card(1, "none.png", None, []))


def test_without_matplotlib(chair, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plots.available()
    page = html.page([chair])
    safe(page)
    assert page.count("pip install vlmfix[plots]") == 1 and "<svg" not in page and "Truncation control" in page


def test_plots_take_the_colours_of_the_page(chair):
    svg = plots.trade_off(chair)
    assert "currentColor" in svg and "#010203" not in svg and "#000000" not in svg and "none = same" in svg
    assert svg.startswith('<svg role="img" aria-label="CHAIR_S') and "xmlns" not in svg


def test_runs_without_answers(tmp_path):
    nothing = [write(tmp_path, "none", {}), write(tmp_path, "some", {})]
    found = studies(*nothing)
    safe(html.page(found))
    json.loads(to_json(found)), to_markdown(found)
    safe(html.page([]))


# Files and the command


def test_markdown_holds_words_tables_and_notes(chair):
    text = to_markdown([chair])
    assert markdown.tables(chair).strip() in text and words.summary(chair)[0] in text
    assert "| against the untouched model cut to the same recall |" in text and "- testing only: the first" in text


def test_no_minus_before_nothing():
    assert figures.figure(stats.Estimate(-0.0001, -0.01, 0.0), 100, signed=True) == "+0.0 [−1.0, +0.0]"
    assert (
        figures.p_text(0.0004) == "p < .001" and figures.p_text(0.0421) == "p = .042" and figures.p_text(1.0) == "p = 1"
    )


def test_runs_are_found_in_folders(folders):
    found = find_runs([folders["none"].parent, folders["good"]])
    assert len(found) == len(folders) and found[0].untouched
    assert [r.folder for r in find_runs([folders["good"] / "records.jsonl"])] == [folders["good"]]


def test_command(folders, tmp_path):
    out = tmp_path / "deep" / "report.html"
    args = ["report", str(folders["none"]), str(folders["good"]), "--output", str(out)]
    for kind in ("markdown", "csv", "json", "latex"):
        args += [f"--{kind}", str(tmp_path / f"report.{kind}")]
    code = "import sys; from vlmfix.cli import app; app(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    safe(out.read_text("utf-8"))
    assert json.loads((tmp_path / "report.json").read_text())[0]["methods"] == ["none", "good"]
    assert (tmp_path / "report.csv").read_text().startswith("benchmark,model,") and done.stderr.count("written: ") == 5
    assert "`good`: really better" in (tmp_path / "report.markdown").read_text("utf-8")
    assert (tmp_path / "report.latex").read_text("utf-8").count(r"\toprule") == 1


def test_score_writes_the_same_files(folders, chair, tmp_path):
    files = {kind: tmp_path / f"table.{kind}" for kind in ("markdown", "csv", "latex")}
    args = [str(folders[name]) for name in ("none", "good", "same", "almost")]
    for kind, path in files.items():
        args += [f"--{kind}", str(path)]
    done = CliRunner().invoke(app, ["score", *args])
    assert done.exit_code == 0 and done.stderr.count("written: ") == 3, done.output
    for kind, render in (("markdown", to_markdown), ("csv", to_csv), ("latex", to_latex)):
        lines = files[kind].read_text("utf-8").splitlines()
        assert len(lines) == len(render([chair]).splitlines()), "the tables of the report, with more resamples"
    assert "CHAIR_S %" in done.stdout and "* marks a real one" in done.stdout
    again = CliRunner().invoke(app, ["score", *args, "--json"])
    assert json.loads(again.stdout)[0]["benchmark"] == "chair" and "written: " in again.stderr


def test_mistakes_end_in_a_sentence(folders, tmp_path):
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 1 and "expected a run folder of `vlmfix eval`" in done.stderr
    done = CliRunner().invoke(app, ["report", str(folders["none"]), "--output", str(tmp_path)])
    assert done.exit_code == 1 and "cannot write" in done.stderr and done.stderr.count("\n") == 1
