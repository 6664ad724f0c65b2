"""Protocols: named set-ups of published evaluations, and the figures that others report for them. No torch.

The same nominal setting gives LLaVA-1.5-7B a CHAIR_S between 42 and 55 in the literature, since images, prompt,
template, token budget, decoding and scorer differ. A protocol fixes all of these; a run that differs in one of them is
called `pai-512+images`, and the report names the difference. `stand_in` says what of the source cannot be repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vlmfix.method.settings import did_you_mean

if TYPE_CHECKING:
    from vlmfix.eval.benchmarks.benchmark import Benchmark

_FILE = files("vlmfix.assets") / "protocols" / "published.json"

PROMPTS = {
    "P1": "Please help me describe the image in detail.",
    "P2": "Please describe this image in detail.",
    "P3": "Please describe the picture in detail.",
}

_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {whose} questions."
)
_DEVILS = _SYSTEM.format(who="user", whose="human's")
_USER, _HUMAN = _SYSTEM.format(who="user", whose="user's"), _SYSTEM.format(who="human", whose="human's")


def _template(before: str, between: str) -> str:
    """A chat template for one question: pictures first, each followed by `between`, then the text."""
    return (
        before
        + "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>"
        + between
        + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    )


TEMPLATES = {
    "vicuna_v1": _template(f"{_USER} USER: ", "\n"),
    "llava_v1": _template(f"{_HUMAN} USER: ", "\n"),
    "devils": _template(f"{_DEVILS} USER: ", "\n"),
    "pai": _template(f"{_USER}USER: ", " "),
    "opera": _template("USER: ", " "),
    "bare": _template("USER: ", "\n"),
}
"""Texts around prompt and picture that papers on LLaVA-1.5 use. `model` is the processor's own, for all models."""
MODEL = "model"


def generation(decoding: str) -> dict[str, Any]:
    """What `generate` is told: `greedy`, `beam5`, `sample`, `sample:temperature=0.7,top_p=0.9`, or `checkpoint` (the
    model's own settings). `ValueError` for anything else.
    """
    name, _, text = decoding.partition(":")
    beams = re.fullmatch(r"beam([1-9]\d?)", decoding)
    if decoding == "greedy":
        return {"do_sample": False, "num_beams": 1}
    if decoding == "checkpoint":
        return {"do_sample": None}
    if beams:
        return {"do_sample": False, "num_beams": int(beams[1])}
    if name == "sample":
        settings: dict[str, Any] = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        for item in filter(None, text.split(",")):
            key, _, value = item.partition("=")
            if key not in ("temperature", "top_p", "top_k") or not re.fullmatch(r"\d+(\.\d+)?", value):
                raise ValueError(f"decoding: {item!r} is no setting; expected temperature=1, top_p=0.9 or top_k=50")
            settings[key] = int(value) if key == "top_k" else float(value)
        return settings
    raise ValueError(f"decoding: expected greedy, beam5, sample, sample:top_p=0.9 or checkpoint, got {decoding!r}")


@dataclass(frozen=True)
class Protocol:
    """A named set-up."""

    name: str
    benchmark: str
    images: str | None
    """List of images of COCO val2014; None for POPE's own."""
    prompt: str
    template: str
    """One of `TEMPLATES`, or `model`."""
    max_new_tokens: int
    decoding: str
    scoring: tuple[str, ...]
    """Variants of CHAIR, or parsers; each gives a table."""
    source: str
    seed: int = 0
    stand_in: str = ""
    """What cannot be repeated, and what takes its place."""

    def deviations(self, header: Mapping[str, Any], bench: Benchmark) -> tuple[str, ...]:
        """In what a run, or how it is scored, differs: `images: organism instead of paint500`, ..."""
        identity, data = header["identity"], header.get("data") or {}
        images = f"{identity['data']} {data.get('which') or ''}".strip()
        if identity.get("limit"):
            images += f", the first {identity['limit']} pictures"
        pairs: list[tuple[str, Any, Any]] = [
            ("images", images, f"coco {self.images or ''}".strip()),
            ("prompt", identity.get("asking", {}).get("prompt"), self.prompt),
            ("template", identity.get("template", MODEL), self.template),
            ("budget", f"{identity['max_new_tokens']} tokens", f"{self.max_new_tokens} tokens"),
            ("decoding", identity.get("decoding", "greedy"), self.decoding),
            ("scorer", bench.scoring, bench.scoring if bench.scoring in self.scoring else " and ".join(self.scoring)),
        ]
        if "sample" in self.decoding:
            pairs.append(("seed", identity.get("seed", 0), self.seed))
        return tuple(f"{what}: {actual} instead of {wanted}" for what, actual, wanted in pairs if actual != wanted)


def _captions(
    name: str, images: str, prompt: str, template: str, tokens: int, decoding: str, source: str, **more: Any
) -> Protocol:
    scoring = more.pop("scoring", ("opera",))
    return Protocol(name, "chair", images, PROMPTS[prompt], template, tokens, decoding, scoring, source, **more)


def _pope(
    name: str, ending: str, template: str, decoding: str, tokens: int, parser: str, source: str, **more: Any
) -> Protocol:
    scoring = more.pop("scoring", (parser,))
    return Protocol(name, "pope", None, "{question}" + ending, template, tokens, decoding, scoring, source, **more)


_LISTDIR = "the source draws from os.listdir, which cannot be repeated; {} stand in"
_PAINT = _LISTDIR.format("the images of PAINT's files, one draw of the same recipe,")
_SORTED = _LISTDIR.format("sorted-seed-42")
_WORD = " Please answer this question with one word."

_ALL = (
    _captions("pai-512", "paint500", "P1", "pai", 512, "greedy", "code of LALBJ/PAI", seed=927, stand_in=_PAINT),
    _captions("paint-512", "paint500", "P1", "pai", 512, "greedy", "code of hasanar1f/PAINT"),
    _captions("devils-512", "devils500", "P1", "devils", 512, "greedy", "code of Devils"),
    _captions("opera-512", "opera500", "P2", "opera", 512, "beam5", "code of shikiw/OPERA; its baseline is greedy"),
    _captions(
        *("vhr-512", "+".join(f"sorted-seed-{seed}" for seed in range(5)), "P2", "bare", 512, "greedy", "paper"),
        scoring=("inflect",),
        stand_in="its five draws follow the order of captions_val2014.json (--list coco-seed-0@FILE+...), for which "
        "sorted ids stand in; they are pooled, each image once, where the paper has mean and deviation of five",
    ),
    _captions("allpath-512", "allpath500", "P1", "llava_v1", 512, "greedy", "code of SooLab/AllPath"),
    _captions("adaiat-512", "first500", "P3", "vicuna_v1", 512, "greedy", "code of AdaIAT"),
    _captions("vista-512", "paint500", "P1", "pai", 512, "greedy", "code of VISTA", seed=1994, stand_in=_PAINT),
    _captions("pti-512", "paint500", "P1", "pai", 512, "greedy", "code of PTI", stand_in=_PAINT),
    _captions("sparc-512", "sorted-seed-42", "P2", "vicuna_v1", 512, "greedy", "code of SPARC", stand_in=_SORTED),
    _captions("sid-512", "sorted-seed-42", "P2", "opera", 512, "sample", "code of SID", stand_in=_SORTED),
    _captions("shield-512", "opera500", "P2", "llava_v1", 512, "sample", "code of hukcc/SHIELD"),
    _captions(
        *("memvr-1024", "sorted-seed-42", "P2", "vicuna_v1", 1024, "greedy", "code of MemVR"),
        stand_in="the source's list of images is missing; sorted-seed-42 stands in",
    ),
    _captions(
        *("adhh-128", "sorted-seed-42", "P2", "vicuna_v1", 128, "greedy", "code of AD-HH"),
        stand_in="its draw follows the order of captions_val2014.json (--list coco-seed-42@FILE); sorted ids stand in",
    ),
    _captions("only-128", "sorted-seed-42", "P2", "llava_v1", 128, "sample", "code of ONLY", stand_in=_SORTED),
    _captions("short-64", "first500", "P2", "bare", 64, "greedy", "ours; the budget of Nullu, HALC, HulluEdit"),
    _captions("mid-256", "first500", "P2", "bare", 256, "greedy", "ours; the budget of AIR"),
    _captions(
        *("vlmfix-512", "first500+sorted-seed-0+sorted-seed-1+sorted-seed-2", "P2", MODEL, 512, "greedy", "ours"),
        scoring=("opera", "rohrbach"),
    ),
    _pope("vcd-pope", _WORD, "llava_v1", "sample", 1024, "vcd", "code of VCD", seed=55),
    _pope("allpath-pope", _WORD, "llava_v1", "sample", 512, "vcd", "code of SooLab/AllPath", seed=42),
    _pope("shield-pope", _WORD, "llava_v1", "sample", 1024, "vcd", "code of hukcc/SHIELD", seed=42),
    _pope("vaf-pope", " Please just answer yes or no.", "vicuna_v1", "checkpoint", 1024, "vaf", "code of VAF"),
    _pope("opera-pope", "", "opera", "beam5", 10, "negword", "code of shikiw/OPERA"),
    _pope("sid-pope", "", "opera", "greedy", 10, "negword", "code of SID"),
    _pope("only-pope", "", "llava_v1", "sample", 8, "negword", "code of ONLY, also RITUAL", seed=42),
    _pope("pai-pope", "", "pai", "greedy", 512, "negword", "code of LALBJ/PAI; each question asked alone"),
    _pope("icd-pope", "", "llava_v1", "sample", 1024, "icd", "code of ICD"),
    _pope(
        *("llava-pope", "\nAnswer the question using a single word or phrase.", "vicuna_v1", "greedy", 128, "pope"),
        "parser: code of LLaVA; ending and budget second-hand",
    ),
    _pope("vlmfix-pope", _WORD, MODEL, "greedy", 8, "", "ours", scoring=("strict", "margin")),
)
PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str | None) -> Protocol | None:
    """A protocol by name; None for None. `ValueError` if there is none."""
    if name is not None and name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return None if name is None else PROTOCOLS[name]


@dataclass(frozen=True)
class Published:
    """Figures that somebody reports for a protocol, in percent. LLaVA-1.5-7B."""

    method: str
    decoding: str
    figures: Mapping[str, Mapping[str, float]]
    """Group of answers -> metric -> percent."""
    mark: str
    """The evidence: paper, paper:X (re-run or quoted there), code, issue, measured, second-hand."""


def published(protocol: str) -> list[Published]:
    """What is reported for a protocol; see `assets/protocols/README.md` for the marks."""
    return [
        Published(entry["method"], entry["decoding"], entry["figures"], entry["mark"])
        for entry in _published()
        if protocol in entry["protocols"]
    ]


@cache
def _published() -> list[dict[str, Any]]:
    return json.loads(_FILE.read_text("utf-8"))
