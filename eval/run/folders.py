"""Run folders on disk: one per method and identity, with a header and one line per finished answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vlmfix.eval.benchmarks.benchmark import Item
from vlmfix.eval.run.results import ERRORS, HEADER, RECORDS, Run, read_errors, read_lines

LONGEST_LABEL = 60
"""Characters of a method's label in the name of its folder."""
LONGEST_VALUE = 160
"""Characters of a value in a message."""


def fingerprint(identity: dict[str, Any]) -> str:
    """Eight characters that tell identities apart."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def begin(parent: Path, header: dict[str, Any], *, beside: bool, writes: bool) -> Path:
    """The folder of the run that a header describes, made if it is not there yet; where `writes`, with the header in
    it. `ValueError` if the same method has an unfinished run in `parent` that was asked otherwise, unless `beside`."""
    name = f"{header['label'][:LONGEST_LABEL]}-{header['fingerprint']}"
    folder = parent / "".join(letter if letter.isalnum() or letter in "._=-" else "_" for letter in name)
    if not (folder / HEADER).exists():
        if not beside:
            refuse_other(parent, header)
        folder.mkdir(parents=True, exist_ok=True)
        if writes:
            write(folder / HEADER, json.dumps(header, indent=2, ensure_ascii=False))
    return folder


def refuse_other(parent: Path, header: dict[str, Any]) -> None:
    """`ValueError`, with what differs, if the same method has an unfinished run that was asked otherwise."""
    identity = header["identity"]
    for path in sorted(parent.glob(f"*/{HEADER}")):
        folder = path.parent
        other = Run.read_header(folder)
        its_identity = other["identity"]
        if other["label"] != header["label"] or its_identity.get("limit") != identity["limit"]:
            continue
        if other["fingerprint"] == header["fingerprint"]:  # begun by another process this moment
            continue
        n_done = len(answers_in(folder))
        if n_done + len(read_errors(folder)) >= other.get("n", 0):
            continue
        differences = []
        for key in {**its_identity, **identity}:
            there, here = its_identity.get(key), identity.get(key)
            if there != here:
                differences.append(f"{key} {_short(there)} there, {_short(here)} here")
        command = other.get("environment", {}).get("command", "vlmfix eval")
        raise ValueError(
            f"{folder} is unfinished ({n_done} of {other['n']} answers) and was asked otherwise: "
            f"{'; '.join(differences)}. Go on with it as it was asked ({command}), delete it, or add --beside to start "
            f"another run beside it"
        )


def answers_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Question -> record of a run folder, of its whole file and of pieces that several processes wrote."""
    records = {}
    for path in _pieces(folder):
        lines, _ = read_lines(path)
        records.update({record["id"]: record for record in lines})
    return records


def merge(folder: Path, items: Sequence[Item]) -> None:
    """Make one file of answers and one of failures, in the order of the questions, of what one process or several
    wrote."""
    _merge_errors(folder, items)
    pieces, records = _pieces(folder), answers_in(folder)
    ordered = [item.id for item in items if item.id in records]
    if pieces == [folder / RECORDS] and ordered == list(records):
        return
    write(folder / RECORDS, "\n".join(json.dumps(records[key], ensure_ascii=False) for key in ordered))
    for path in pieces:
        if path.name != RECORDS:
            path.unlink()


def note_failures(folder: Path, rank: int, failures: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down which questions could not be asked, and why."""
    if failures:
        lines = [json.dumps({"id": key, **failure}, ensure_ascii=False) for key, failure in failures.items()]
        write(folder / f"errors.{rank}.jsonl", "\n".join(lines))


def _merge_errors(folder: Path, items: Sequence[Item]) -> None:
    """One file of the questions that could not be asked; none where all were."""
    answered, failures = answers_in(folder), {failure["id"]: failure for failure in read_errors(folder)}
    failed = [item.id for item in items if item.id in failures and item.id not in answered]
    for path in folder.glob("errors.*jsonl"):
        path.unlink()
    if failed:
        write(folder / ERRORS, "\n".join(json.dumps(failures[key], ensure_ascii=False) for key in failed))


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """A file of answers, open at its end and cut back to its last whole line."""
    if path.exists():
        _, length = read_lines(path)
        os.truncate(path, length)
    with path.open("a", encoding="utf-8") as file:
        yield file


def write(path: Path, text: str) -> None:
    """Write under a temporary name, then rename, so that no half file is ever read."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(path)


def _pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("records*.jsonl"))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
