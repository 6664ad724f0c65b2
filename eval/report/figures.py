"""How a figure is written: digits, intervals, signs, p. What is undefined is a dash."""

from __future__ import annotations

from vlmfix.eval.scorers.stats import Estimate

UNDEFINED = "–"


def number(x: float | None, factor: float, signed: bool = False, like: float | None = None) -> str:
    """`50.5`.

    Args:
        x: A share, or a number of its own; `None` where undefined.
        factor: 100 to write a share in percent, which has one digit; else 1.
        signed: With a plus before what is above 0.
        like: The number whose size decides on the digits, where it is not `x`: both ends of an interval have as many as
            the figure before it.
    """
    if x is None:
        return UNDEFINED
    size = abs((x if like is None else like) * factor)
    digits = 1 if factor == 100 or size >= 10 else 2
    rounded = round(x * factor, digits) or 0.0  # no minus before nothing
    sign = "+" if signed else ""
    return f"{rounded:{sign}.{digits}f}".replace("-", "−")


def interval(estimate: Estimate, factor: float, signed: bool = False) -> str:
    """`[50.5, 60.3]`."""
    low = number(estimate.low, factor, signed, estimate.value)
    high = number(estimate.high, factor, signed, estimate.value)
    return f"[{low}, {high}]"


def figure(estimate: Estimate, factor: float, signed: bool = False) -> str:
    """`55.8 [50.5, 60.3]`."""
    if estimate.value is None:
        return UNDEFINED
    return f"{number(estimate.value, factor, signed)} {interval(estimate, factor, signed)}"


def difference(estimate: Estimate, factor: float, unit: str) -> str:
    """`−11.7 points [−15.8, −8.0]`; figures that are no percentages have no points."""
    text = figure(estimate, factor, signed=True)
    return text.replace(" [", " points [", 1) if unit == "%" else text


def p_text(p: float | None) -> str:
    """`p = .042`, `p < .001`."""
    if p is None:
        return "p unknown"
    if p < 0.001:
        return "p < .001"
    if p > 0.9995:
        return "p = 1"
    return f"p = {p:.3f}".replace("0.", ".")
