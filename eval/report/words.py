"""What a comparison says, in words: which differences are real, and what to know before believing them. No torch.

Which differences are real is decided in `verdicts` and only repeated here. Names stand between backticks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmfix.eval.report import figures
from vlmfix.eval.report.figures import number
from vlmfix.eval.report.study import Entry, Selection, Study
from vlmfix.eval.report.verdicts import RULE, Verdict
from vlmfix.eval.run.results import Comparison
from vlmfix.eval.scorers.stats import Difference, Estimate

MORE_REPETITION = 0.01
"""Share of the captions by which repetition may rise without a warning."""
OTHER_LENGTH = 0.3
"""Share by which captions may be longer or shorter without a warning."""
CUT_SHORT = 0.05
"""Share of the captions that the token budget may cut without a warning."""


def meaning(study: Study, metric: str) -> str:
    """What a figure counts; empty for figures whose name says it."""
    return study.comparison.benchmark.figures[metric].meaning


# Titles and legends


def title(comparison: Comparison, group: str = "") -> str:
    """`POPE, random`."""
    return f"{comparison.title}, {group}" if group else comparison.title


def heading(study: Study) -> str:
    """`CHAIR (rohrbach), model organism`; says so if it is for testing only."""
    model = f", model {study.comparison.model}" if study.comparison.model else ""
    return f"{study.comparison.title}{model}{study.comparison.testing}"


MARKS = "marks: paper (its own table), paper:X (in X's), code, issue, measured (from released answers), second-hand"
INTERVALS = "95 % intervals: bootstrap over pictures."
DIFFERENCES = "Second figures: paired difference to {baseline}; {mark} a real one. " + RULE
AT_EQUAL_RECALL = (
    "At equal recall: difference to the captions of {baseline}, cut after so many words that their recall is the same."
)


def legend(study: Study, mark: str = "* marks") -> list[str]:
    """What the figures in the tables of a terminal and a paper are, and what the mark on a difference means."""
    sentences = [INTERVALS]
    baseline = plain(study.baseline)
    if study.verdicts:
        sentences.append(DIFFERENCES.format(baseline=baseline, mark=mark))
    if any(study.controls):
        sentences.append(AT_EQUAL_RECALL.format(baseline=baseline))
    return sentences


def counted(amount: int, what: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{amount} {what}" if amount == 1 else f"{amount} {what}s"


def plain(text: str) -> str:
    """Without the backticks around names."""
    return text.replace("`", "")


# In short

VERBS = {"CHAIR_S": ("invents less", "invents more"), "Hal": ("invents less", "invents more")}
"""What a change for the better and for the worse in a first figure means; `does better` and `does worse` for others."""


def in_short(study: Study) -> list[str]:
    """Which methods do better, whether they see as much, and whether they beat their controls: up to three sentences.
    A difference that is not real is never said to be none."""
    metric = study.comparison.benchmark.headline_figures[0]
    controls = {control for _, control in study.pairs}
    runs = study.comparison.runs
    methods = [name for run, name in enumerate(study.names) if run not in controls and not runs[run].untouched]
    verdicts = [verdict for verdict in study.verdicts if verdict.method in methods and verdict.metric == metric]
    if not verdicts:
        return []
    n_groups = len({verdict.group for verdict in verdicts})
    better, worse = VERBS.get(metric, ("does better", "does worse"))
    parts = [
        _listed(f"{better} than {study.baseline} ({metric})", [v for v in verdicts if v.real and v.better], n_groups),
        _listed(worse, [v for v in verdicts if v.real and v.better is False], n_groups),
    ]
    apart_from = "it" if any(parts) else f"{study.baseline} ({metric})"
    parts.append(_listed(f"not told apart from {apart_from}", [v for v in verdicts if not v.real], n_groups))
    sentences = [_sentence(parts)]
    better_methods = [verdict.method for verdict in verdicts if verdict.real and verdict.better]
    return [*sentences, *_sees_as_much(study, better_methods), *_beats_controls(study, methods)]


def _sees_as_much(study: Study, methods: Sequence[str]) -> Iterator[str]:
    """Of methods that invent less: whether they name fewer of the objects that are there, and whether that is all."""
    seen = [verdict for verdict in study.verdicts if verdict.method in methods and verdict.metric == "recall"]
    cut = [study.cut_verdicts[name, "CHAIR_S"] for name in methods if (name, "CHAIR_S") in study.cut_verdicts]
    if not seen or not cut:
        return
    as_much = [verdict for verdict in seen if not (verdict.real and verdict.better is False)]
    parts = [
        _listed("of these, no loss of recall is told for", as_much),
        _listed("sees less", [verdict for verdict in seen if verdict not in as_much]),
        _listed("does more than saying less (at equal recall)", [v for v in cut if v.real and v.better]),
        _listed("is not told apart from saying less", [v for v in cut if not (v.real and v.better)]),
    ]
    yield _sentence(parts)


def _beats_controls(study: Study, methods: Sequence[str]) -> Iterator[str]:
    """Whether methods do better than all of their negative controls, in every group of answers."""
    of_method: dict[str, list[Selection]] = {name: [] for name in methods}
    for selection in study.against_controls:
        of_method.get(selection.method, []).append(selection)
    beats = [name for name, own in of_method.items() if own and all(each.real and each.better for each in own)]
    fails = [name for name, own in of_method.items() if own and name not in beats]
    parts = [
        f"better than its own negative control: {_names(beats)}" if beats else "",
        f"not told apart from it, or worse: {_names(fails)}" if fails else "",
    ]
    if beats or fails:
        yield _sentence(parts)


def _listed(what: str, verdicts: Sequence[Verdict], n_groups: int = 1) -> str:
    """`invents less: a, b`; groups of answers are named where it holds in some only. Empty without verdicts."""
    groups: dict[str, list[str]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.method, []).append(verdict.group)
    names = [f"`{name}`" + (f" ({', '.join(own)})" if len(own) < n_groups else "") for name, own in groups.items()]
    return f"{what}: {', '.join(names)}" if names else ""


def _names(methods: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in methods)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[:1].upper()}{text[1:]}."


# Summary


def summary(study: Study) -> list[str]:
    """What the figures say, a paragraph for each method."""
    if study.base is None:
        return [f"No run of {study.baseline} is among these, so there is nothing to tell a difference from."]
    methods = [place for place, run in enumerate(study.comparison.runs) if not run.untouched]
    if not methods:
        return [f"There is only {study.baseline}, and nothing to compare it with."]
    return [_paragraph(study, method) for method in methods]


def _paragraph(study: Study, method: int) -> str:
    name = study.names[method]
    if study.same_answers(method):
        times = len(study.comparison.runs[method].records)
        return f"`{name}` answers word for word as {study.baseline} does, all {times} times: it changes nothing here."
    shown = [verdict for verdict in study.verdicts if verdict.method == name and verdict.metric in study.headline]
    for selection in study.against_controls:
        if selection.control == name:
            first_figure = [verdict for verdict in shown if verdict.metric == shown[0].metric]
            changes = _changes(study, first_figure)
            return f"`{name}`, a negative control of `{selection.method}`: {changes} to {study.baseline}."
    sentences = [
        f"`{name}`: {_real_differences(study, shown)}.",
        _against_cut_captions(study, method),
        *_against_controls(study, name),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _real_differences(study: Study, verdicts: Sequence[Verdict]) -> str:
    """`really better in CHAIR_S ...; not told apart from the untouched model in recall, F1`."""
    real = [verdict for verdict in verdicts if verdict.real]
    unreal = _metric_names([verdict for verdict in verdicts if not verdict.real], verdicts)
    if not real:
        return f"no difference is real ({unreal})"
    parts = []
    for kind, better in (("really better", True), ("really worse", False), ("really changed", None)):
        of_kind = [verdict for verdict in real if verdict.better is better]
        if of_kind:
            parts.append(f"{kind} in {_changes(study, of_kind)}")
    if unreal:
        parts.append(f"not told apart from {study.baseline} in {unreal}")
    return "; ".join(parts)


def _changes(study: Study, verdicts: Sequence[Verdict]) -> str:
    """`CHAIR_S −11.7 points [−15.8, −8.0]`, or for several splits `accuracy (random −0.1, popular +0.3 points)`."""
    changes = []
    for metric in dict.fromkeys(verdict.metric for verdict in verdicts):
        unit, factor = study.columns[metric]
        of_metric = [verdict for verdict in verdicts if verdict.metric == metric]
        texts = [figures.difference(verdict.difference, factor, unit) for verdict in of_metric]
        if len(of_metric) == 1 and not of_metric[0].group:
            changes.append(f"{metric} {texts[0]}")
        else:
            by_group = [f"{verdict.group or 'all'} {text}" for verdict, text in zip(of_metric, texts, strict=True)]
            changes.append(f"{metric} ({', '.join(by_group)})")
    return ", ".join(changes)


def _metric_names(verdicts: Sequence[Verdict], every_verdict: Sequence[Verdict]) -> str:
    """`recall, F1`; groups are named where a figure is meant in some of them only: `yes_ratio (popular)`."""
    names = []
    for metric in dict.fromkeys(verdict.metric for verdict in verdicts):
        groups = [verdict.group for verdict in verdicts if verdict.metric == metric]
        all_groups = [verdict.group for verdict in every_verdict if verdict.metric == metric]
        names.append(metric if len(groups) == len(all_groups) else f"{metric} ({', '.join(groups)})")
    return ", ".join(names)


def _against_controls(study: Study, name: str) -> Iterator[str]:
    """Whether a method does better than its negative controls."""
    for selection in study.against_controls:
        if selection.method != name:
            continue
        metric, difference = selection.metric, selection.difference
        unit, factor = study.columns[metric]
        standing = "better than" if selection.better else "worse than"
        if not selection.real:
            standing = "not told apart from"
        where = f" in {selection.group}" if selection.group else ""
        text = figures.difference(difference, factor, unit)
        yield f"It is {standing} its negative control `{selection.control}`{where} ({metric} {text})."


def _against_cut_captions(study: Study, method: int) -> str:
    """Whether the method does more than saying less."""
    control = study.controls[method]
    if control is None:
        return ""
    if control.status == "outside":
        return f"Its recall is below that of every cut of {study.baseline}'s captions: there is no fair comparison."
    if control.status == "inside":
        against = f"captions of {study.baseline} cut to the same recall (about {control.cut_words or 0:.0f} words)"
    else:
        against = f"{study.baseline}'s whole captions, whose recall is lower still"
    verdict = study.cut_verdicts[study.names[method], "CHAIR_S"]
    change = figures.difference(verdict.difference, 100, "%")
    if verdict.real and verdict.better:
        return f"Set against {against}, CHAIR_S is lower by more than chance ({change}): it does more than saying less."
    if verdict.real:
        return f"Set against {against}, CHAIR_S is higher ({change}): merely saying less would do better."
    return (
        f"Set against {against}, CHAIR_S differs by {change}: no more than saying less would do, as far as can be told."
    )


# What the judgement rests on


def rule(study: Study) -> str:
    """What "real" means."""
    methods = max((verdict.methods for verdict in study.verdicts), default=0)
    adjusted = f"adjusted for {methods} methods" if methods > 1 else "one method, so nothing to adjust for"
    exact = "; CHAIR_S by McNemar's exact test" if any(verdict.discordant for verdict in study.verdicts) else ""
    return f"{RULE} Here it is {adjusted}{exact}."


def resolution(study: Study) -> str:
    """What so many pictures can tell: the widest interval of a difference, in the benchmark's first figures."""
    widths = []
    for metric in study.headline[:2]:
        unit, factor = study.columns[metric]
        half_widths = [_half_width(verdict.difference) for verdict in study.verdicts if verdict.metric == metric]
        widest = max(half_widths, default=0.0)
        if widest:
            widths.append(f"±{number(widest, factor)}{' points' if unit == '%' else ''} in {metric}")
    if not widths:
        return ""
    return (
        f"With {study.pictures} pictures, differences are known to about {' and '.join(widths)}; smaller ones cannot "
        "be told from chance. Four times the pictures would halve that."
    )


def _half_width(estimate: Estimate) -> float:
    if estimate.low is None or estimate.high is None:
        return 0.0
    return (estimate.high - estimate.low) / 2


def judgement(study: Study) -> str:
    """Rule and resolution in one paragraph; empty where nothing is compared."""
    if not study.verdicts:
        return ""
    return " ".join(filter(None, [rule(study), resolution(study)]))


# What a reader must know


def notes(study: Study) -> list[str]:
    """All that a reader must know before believing a figure."""
    comparison = study.comparison
    return [*filter(None, [deviations(comparison)]), *warnings(study), *comparison.notes]


def deviations(comparison: Comparison) -> str:
    """How the runs stand to their protocol; empty without one."""
    protocol = comparison.protocol
    if protocol is None:
        return ""
    if comparison.deviations:
        standing = f"Deviates from protocol {protocol.name} in {'; '.join(comparison.deviations)}"
    else:
        standing = f"As protocol {protocol.name} has it"
    stand_in = f". {protocol.stand_in[0].upper()}{protocol.stand_in[1:]}" if protocol.stand_in else ""
    return f"{standing} (source: {protocol.source}){stand_in}"


def warnings(study: Study) -> list[str]:
    """What makes figures look better than captions are, and comparisons that compare more than the methods."""
    of_methods = [sentence for entry in study.entries for sentence in warnings_of(study, entry)]
    return [*_unlike_runs(study), *of_methods, *_cut_by_the_budget(study)]


def warnings_of(study: Study, entry: Entry) -> list[str]:
    """What must be known of one method's answers beside the baseline's."""
    if entry.row.differences is None:
        return []
    base = next((e for e in study.entries if e.run == study.base and e.row.group == entry.row.group), None)
    return list(_entry_warnings(entry, entry.row.differences, base, study.baseline))


def _entry_warnings(
    entry: Entry, differences: Mapping[str, Difference], base: Entry | None, baseline: str
) -> Iterator[str]:
    name = entry.method
    repetition = differences.get("repetition")
    if repetition is not None and (repetition.value or 0) > MORE_REPETITION:
        yield f"`{name}` repeats itself in {number(repetition.value, 100, True)} points more of its captions."
    words = _value(entry, "words")
    base_words = None if base is None else _value(base, "words")
    if words is not None and base_words:
        longer = words / base_words - 1
        if abs(longer) > OTHER_LENGTH:
            length = "longer" if longer > 0 else "shorter"
            yield f"`{name}` writes captions {abs(longer):.0%} {length} than {baseline}'s."
    objects, mentions = differences.get("objects"), differences.get("mentions")
    if objects and mentions and (objects.high or 0) < 0 < (mentions.low or 0):
        yield (
            f"`{name}` names fewer objects, but names them more often, which lowers CHAIR_I without a better "
            "caption: look at CHAIR_I_unique."
        )
    left_out = max(difference.left_out for difference in differences.values())
    if left_out:
        where = f" ({entry.row.group})" if entry.row.group else ""
        yield f"`{name}`{where}: {left_out} pictures lack one of the two answers and are not compared."


def _value(entry: Entry, metric: str) -> float | None:
    estimate = entry.row.estimates.get(metric)
    return None if estimate is None else estimate.value


def _cut_by_the_budget(study: Study) -> Iterator[str]:
    if not study.captions:
        return
    for run, name in zip(study.comparison.runs, study.names, strict=True):
        cut = run.cut_by_the_budget
        if cut > CUT_SHORT * len(run.records):
            yield f"`{name}`: the token budget cut {cut / len(run.records):.0%} of the captions short."


def _unlike_runs(study: Study) -> Iterator[str]:
    """Settings other than the method in which runs differ: such runs should not be compared."""
    identities = [run.header["identity"] for run in study.comparison.runs]
    settings = dict.fromkeys(key for identity in identities for key in identity)
    settings.pop("method", None)
    for key in settings:
        values = [json.dumps(identity.get(key), sort_keys=True) for identity in identities]
        if len(set(values)) > 1:
            by_name = ", ".join(f"`{name}` {value}" for name, value in zip(study.names, values, strict=True))
            yield f"Runs differ in more than the method, in {key}: {by_name}. Differences are not the method's alone."


# Every answer


def explanations(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """How each answer was read and judged, ready for JSON; a question in several groups stands once."""
    for run, groups in zip(comparison.runs, comparison.groups, strict=True):
        explained = set()
        for score in (score for group in groups for score in group.scores):
            if id(score) not in explained:
                explained.add(id(score))
                yield {"benchmark": comparison.title, "method": run.label, **comparison.benchmark.explain(score)}
