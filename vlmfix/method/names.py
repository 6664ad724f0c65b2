"""The registry: each method's name, and the file and class behind it. A new method is one line here.

Names are what users write; classes are imported on first use, since this module is read by `vlmfix --help`.
"""

from __future__ import annotations

REGISTRY = {
    "acg": "vlmfix.hooks.acg:ACG",
    "act": "vlmfix.hooks.act:ACT",
    "adaiat": "vlmfix.hooks.adaiat:AdaIAT",
    "adhh": "vlmfix.hooks.adhh:ADHH",
    "allpath": "vlmfix.hooks.allpath:AllPath",
    "beam": "vlmfix.hooks.beam:Beam",
    "carve": "vlmfix.hooks.carve:CARVE",
    "chunks": "vlmfix.hooks.chunks:Chunks",
    "contrast": "vlmfix.hooks.contrast:Contrast",
    "deco": "vlmfix.hooks.deco:DeCo",
    "dola": "vlmfix.hooks.dola:DoLa",
    "flb": "vlmfix.hooks.flb:FLB",
    "gift": "vlmfix.hooks.gift:GIFT",
    "headgain": "vlmfix.hooks.headgain:HeadGain",
    "hgai": "vlmfix.hooks.hgai:HGAI",
    "iat": "vlmfix.hooks.iat:IAT",
    "icd": "vlmfix.hooks.icd:ICD",
    "kvsmooth": "vlmfix.hooks.kvsmooth:KVSmooth",
    "lookback": "vlmfix.hooks.lookback:Lookback",
    "pai": "vlmfix.hooks.pai:PAI",
    "paint": "vlmfix.hooks.paint:PAINT",
    "pyramiddrop": "vlmfix.hooks.pyramiddrop:PyramidDrop",
    "rerank": "vlmfix.hooks.rerank:Rerank",
    "sparc": "vlmfix.hooks.sparc:SPARC",
    "spin": "vlmfix.hooks.spin:SPIN",
    "truncate": "vlmfix.hooks.truncate:Truncate",
    "tvai": "vlmfix.hooks.tvai:TVAI",
    "vaf": "vlmfix.hooks.vaf:VAF",
    "var": "vlmfix.hooks.var:VAR",
    "vcd": "vlmfix.hooks.vcd:VCD",
    "vhr": "vlmfix.hooks.vhr:VHR",
    "vista": "vlmfix.hooks.vista:VISTA",
    "zerotuning": "vlmfix.hooks.zerotuning:ZeroTuning",
}


def name_of(cls: type) -> str:
    """The name by which a method is found again: the registry's, or `package.module:Class` for all others, whatever
    their class calls itself."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    name: str = getattr(cls, "name", "")
    return name if REGISTRY.get(name) == path else path
