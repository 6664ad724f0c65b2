"""Several methods on the same pictures: how much each invents and sees, with intervals over the pictures.

    python examples/compare_methods.py [NUMBER OF PICTURES]

Differences are paired: the same pictures, drawn the same way, for a method and for the untouched model. An interval
that holds 0 says that so few pictures do not tell the two apart.
"""

import sys
from tempfile import TemporaryDirectory

from vlmfix.eval.api import Task, compare, evaluate

METHODS = ("none", "vhr", "pai")
FIGURES = ("CHAIR_S", "recall", "F1")


def main(pictures: int = 16) -> None:
    """Print a line per method and figure."""
    with TemporaryDirectory() as folder:  # answers are kept there; name one of yours to go on later
        task = Task(
            model="organism", methods=METHODS, benchmarks="chair", data="organism", limit=pictures, output=folder
        )
        (comparison,) = compare(evaluate(task))
    for name in FIGURES:
        print(f"\n{name} in percent, {pictures} pictures")
        for row in comparison.rows:
            print(f"    {row.method:6} {interval(row.estimates[name])}", end="")
            print(f"   difference {interval(row.differences[name], '+')}" if row.differences else "")


def interval(estimate, sign: str = "") -> str:
    """A figure with its 95 % interval, as in "56.5 [51.5, 61.5]"."""
    value, low, high = (format(100 * number, f"{sign}.1f") for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
