"""The instance of each method that the contract looks at: its defaults, unless those do nothing on a tiny model.

A new method needs a line here only in that case, or where the contract should know that it reads without editing or
runs on some architectures only.
"""

from vlmfix.hooks import (
    ACG,
    ACT,
    ADHH,
    FLB,
    GIFT,
    IAT,
    ICD,
    PAI,
    PAINT,
    REGISTRY,
    SPARC,
    SPIN,
    TVAI,
    VAF,
    VAR,
    VCD,
    VHR,
    VISTA,
    AdaIAT,
    AllPath,
    Contrast,
    HeadGain,
    KVSmooth,
    ZeroTuning,
)
from vlmfix.method.registry import method_class
from vlmfix.method.stages import ASK_STAGES

BITING = {
    "acg": ACG(gamma=2.0),
    "act": ACT(alpha=1.5, beta=0.0, layers=(1, 2, 3)),
    "adaiat": AdaIAT(ratio=3.0, threshold=100.0, alpha=4.0, layers=(0, 1, 2, 3)),
    "adhh": ADHH(head_list="L0H0/L1H0/L1H2/L2H0/L3H1", tau=0.0),
    "allpath": AllPath(bad="L1H2", good="L2H0", gain=3.0),
    "contrast": Contrast(gamma=2.0, beta=0.01),
    "flb": FLB(gamma=3.0, lam=1.0, beta=1e-4),
    "gift": GIFT(alpha=8.0),
    "headgain": HeadGain(head_list="L1H2/L2H0", gain=3.0),
    "icd": ICD(words=(5, 8, 13), beta=1e-4),
    "iat": IAT(alpha=4.0, layers=(0, 1, 2, 3)),
    "kvsmooth": KVSmooth(ref=0.5, layers=(0, 1, 2, 3)),
    "pai": PAI(alpha=2.0, skip_first=1),
    "paint": PAINT(alpha=0.5, beta=4.0, rho=1.0, layers=(0, 1, 2, 3)),
    "sparc": SPARC(alpha=4.0, tau=-0.5),
    "spin": SPIN(r=0.5, eps=0.0),
    "tvai": TVAI(alpha=2.0, beta=2.0, text_layers=(0, 1, 2, 3), image_layers=(0, 1, 2, 3)),
    "vaf": VAF(enh=4.0, sup=0.5, layers=(0, 1, 2, 3)),
    "var": VAR(dims=(7,), tau=3.0, rho=0.0, min_visual_mass=0.0, skip_first=1),
    "vcd": VCD(t=999, beta=0.01),
    "vhr": VHR(layers=(1, 2, 3)),
    "vista": VISTA(lam=1.0, gamma=0.5),
    "zerotuning": ZeroTuning(gamma=8.0),
}
"""Settings that change the answers of models with four layers and random weights."""
READERS = {"lookback"}
"""Methods that read and change nothing: logits stay bit-identical."""
ONLY = {"paint": {"llava"}}
"""Methods that refuse other architectures; that they do is in their own tests."""

INTERVENTIONS = {}
for name in REGISTRY:
    cls = method_class(name)
    if not set(ASK_STAGES) & set(cls.stages()):  # these are under the contract of tests/asking/test_ask_stages.py
        INTERVENTIONS[name] = BITING.get(name) or cls()

STEPWISE = {name for name, one in INTERVENTIONS.items() if one.traits.stepwise or one.acts_at("cache")}
"""Methods that go by the pass over the token before. Without a cache there is none; a pass over a prompt shows nothing
of them, and they bite at the third token."""
