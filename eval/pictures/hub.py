"""Benchmarks from the Hugging Face Hub, laid out as the readers of original files expect them.

    folder = fetch("hf:lmms-lab/POPE", ["pope"])     # pip install vlmfix[datasets]

Needs the package `datasets`. Each row's picture is written once to the cache, with a file of questions beside it, so
that a run can be resumed, scored and reported without the network. Columns are those of lmms-eval's data sets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = "questions.jsonl"
_ASKED = re.compile(r"\s*(Answer the question using a single word or phrase|Please answer yes or no)\.?\s*$")


def fetch(name: str, benchmarks: Sequence[str]) -> Path:
    """The folder of a data set, `hf:REPO`, `hf:REPO@SPLIT` or `hf:REPO:CONFIG@SPLIT`; downloaded on first use.

    Raises:
        ValueError: `datasets` is not installed, the data set cannot be had, or has not the columns of the benchmark.
    """
    kinds = [benchmark for benchmark in benchmarks if benchmark in READERS]
    if len(benchmarks) != 1 or not kinds:
        raise ValueError(
            f"data {name!r}: from the Hub come {', '.join(READERS)}, one at a time; got {list(benchmarks)}"
        )
    folder = _cache() / re.sub(r"[^\w.@-]", "_", name.removeprefix("hf:")) / kinds[0]
    if not (folder / QUESTIONS).exists():
        lay_out(rows(name), kinds[0], folder)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlmfix"


def rows(name: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a data set, by `hf:REPO:CONFIG@SPLIT` (the split is `test` by default), or of a local folder."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data {name!r} needs the package datasets: pip install vlmfix[datasets]") from error
    place, _, split = name.removeprefix("hf:").partition("@")
    repo, _, config = place.partition(":")
    try:
        return datasets.load_dataset(repo, config or None, split=split or "test")
    except Exception as error:  # the library raises many kinds for what is missing, private, or not reachable
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data {name!r} cannot be loaded: {reason}") from error


def lay_out(data_rows: Iterable[Mapping[str, Any]], benchmark: str, folder: Path) -> None:
    """Write pictures and questions; the file of questions last, so that a folder that has one is whole."""
    questions: list[dict[str, Any]] = []
    for row in data_rows:
        try:
            file, question = READERS[benchmark](row)
            picture = row["image"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a row has the columns {', '.join(row)}; {benchmark} lacks {error}") from error
        if picture is not None:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                picture.convert("RGB").save(path, "PNG")  # no loss; the reader goes by the content, not by the ending
        if question is not None:
            questions.append(question)
    folder.mkdir(parents=True, exist_ok=True)
    rows_of_task: dict[str, list[str]] = {}  # MME's own files are a table for each task
    for question in questions:
        if "task" in question:
            cells = f"{question['image']}\t{question['text']}\t{question['label']}\n"
            rows_of_task.setdefault(question["task"], []).append(cells)
    for task, table in rows_of_task.items():
        (folder / f"{task}.txt").write_text("".join(table), "utf-8")
    temporary = folder / f"{QUESTIONS}.tmp"
    temporary.write_text("".join(json.dumps(question) + "\n" for question in questions), "utf-8")
    temporary.replace(folder / QUESTIONS)


def _name(text: object) -> str:
    """A file name below the folder, whatever the data set says."""
    parts = str(text).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _pope(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    file = f"{_name(row['image_source'])}.png"
    line = {"question_id": f"{row['category']}/{row['question_id']}", "image": file, "text": row["question"]}
    return file, {**line, "label": row["answer"].strip().lower(), "category": row["category"]}


def _mme(row: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    file = _name(row["question_id"])
    file = file if "." in file else f"{file}.png"
    task, _, picture = file.partition("/")
    text = _ASKED.sub(" Please answer yes or no.", row["question"]).strip()
    line = {"task": task, "image": picture, "text": text, "label": row["answer"].strip().lower()}
    return file, line if task in ("existence", "count", "position", "color") else None


def _hallusion(row: Mapping[str, Any]) -> tuple[str, None]:
    return _name(row["filename"] or "none.png"), None


def _own(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    file = f"{_name(row.get('image_id', row['id']))}.png"
    line = {"id": str(row["id"]), "image": file, "question": row["question"], "label": row["answer"].strip().lower()}
    return file, line | ({"group": row["category"]} if row.get("category") else {})


READERS = {"pope": _pope, "mme": _mme, "hallusionbench": _hallusion, "yesno": _own}
"""Benchmark -> from a row to the picture's file name and the line of its question, if it needs one."""
