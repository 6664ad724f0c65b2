"""Keeps the answers of the main job for `make readme` and the tests.

`vlmfix eval`, then `python -m tools.main_job runs`. Of each record only what was asked, the answer, and what it cost.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from vlmfix.eval.report.study import find_runs
from vlmfix.eval.run.results import HEADER, RECORDS, Run

FILE = Path(__file__).parent.parent / "tests" / "data" / "main_job.json.gz"
KEYS = ("id", "image", "prompt", "text")
COSTS = ("passes", "seconds")
"""Kept for captions, with the number of tokens: the table has passes per token."""


def keep(runs: Path) -> None:
    """Write the file from a folder of runs."""
    kept = []
    for run in find_runs([runs]):
        header = {key: value for key, value in run.header.items() if key != "task"}
        captions = header["identity"]["benchmark"] == "chair"
        records = []
        for record in run.records:
            brief = {key: record[key] for key in KEYS}
            if captions:
                brief |= {key: record[key] for key in COSTS}
                brief["n_tokens"] = len(record["token_ids"])
            records.append(brief)
        kept.append({"header": header, "records": records})
    FILE.write_bytes(gzip.compress(json.dumps(kept, ensure_ascii=False).encode(), mtime=0))


def restore(folder: Path) -> list[Run]:
    """The runs again, as folders."""
    runs = []
    for number, run in enumerate(json.loads(gzip.decompress(FILE.read_bytes()))):
        path = folder / str(number)
        path.mkdir()
        records = [{**record, "token_ids": [0] * record.get("n_tokens", 0)} for record in run["records"]]
        (path / HEADER).write_text(json.dumps(run["header"]), "utf-8")
        (path / RECORDS).write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
        runs.append(Run.read(path))
    order = {run.label: place for place, run in enumerate(runs)}
    from vlmfix.eval.tour import CONTROLS, METHODS

    names = [name for method in METHODS for name in (method, CONTROLS.get(method)) if name in order]
    return sorted(runs, key=lambda run: (run.header["identity"]["benchmark"], names.index(run.label)))


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
