"""What methods may cost, by counts that are the same on every machine: operations, memory and arithmetic."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.test_contract import INTERVENTIONS
from vlmfix.engine.wrap import wrapped
from vlmfix.eval.bench import shapes
from vlmfix.eval.bench.naive import naively
from vlmfix.hooks import VHR, HeadGain

LAYERS, IMAGE, TEXT = 4, 64, 20
SINGLE_PASS = {name: one for name, one in INTERVENTIONS.items() if name in ("var", "pai", "zerotuning", "act")}
SINGLE_PASS |= {"lookback": INTERVENTIONS["lookback"], "heads": HeadGain(head_list="L1H2/L2H0", gain=2.0)}
ALL_ROWS = ("zerotuning", "act")
"""Methods that edit every row of the prompt: in pieces."""


class Ledger(TorchDispatchMode):
    """Notes of every operation the shapes and dtypes of the tensors that it makes, views left out."""

    def __init__(self):
        super().__init__()
        self.made, self.n = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        self.n += 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made.append((str(func), tuple(x.shape), x.dtype))
        return out


@pytest.fixture(scope="module")
def model():
    return shapes.build("tiny", LAYERS, torch.bfloat16, "cpu")


@torch.no_grad()
def passes(model, method, mode):
    """What `mode` sees of a prefill and of one new token."""
    found, prompt = [], shapes.build_prompt(model, "tiny", 1, TEXT)
    with wrapped(model, method):
        with mode() as seen:
            out = model(**prompt, use_cache=True)
        found.append(seen)
        cache = out.past_key_values
        model(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache)  # the first one builds masks
        with mode() as seen:
            model(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache)
        found.append(seen)
    return found


@pytest.mark.parametrize("method", SINGLE_PASS)
def test_no_queries_x_keys_and_no_float32_copy_of_a_cache(model, method, monkeypatch):
    """Beyond what the untouched model makes. Methods that edit all rows do it in pieces of rows."""
    monkeypatch.setattr("vlmfix.engine.attention.PIECE", 16)
    monkeypatch.setattr("vlmfix.engine.attention.FLOATS", {"cpu": 2 * 16 * 8})  # 8 keys at a time
    n, decoding = IMAGE + TEXT, IMAGE + TEXT + 2
    prefill, token = passes(model, SINGLE_PASS[method], Ledger)
    square = [one for one in prefill.made if one[1][-2:] == (n, n) and len(one[1]) > 2]
    assert not square, "queries x keys, per head"
    whole = 2 * 16 * decoding  # key heads x size x keys
    floats = [m for m in token.made if m[2] == torch.float32 and torch.Size(m[1]).numel() >= whole]
    floats = [m for m in floats if m[1][-1] != 256]  # logits
    assert not floats, "a float32 copy of all keys or values of a layer"


def test_the_ledger_sees_what_it_must_not_see(model, monkeypatch):
    """The naive edit makes both."""
    method = [SINGLE_PASS["var"]]
    monkeypatch.setattr("tests.contract.test_costs.wrapped", naively)
    prefill, token = passes(model, method, Ledger)
    n = IMAGE + TEXT
    assert any(shape[-2:] == (n, n) and len(shape) > 2 for _, shape, _ in prefill.made)
    assert any(dtype == torch.float32 and shape == (1, 2, n + 2, 16) for _, shape, dtype in token.made)


@pytest.mark.parametrize(
    ("method", "most_operations"),
    {"var": 20, "pai": 18, "zerotuning": 23, "act": 50, "lookback": 53, "heads": 2, "vhr": 3}.items(),
)
def test_operations_per_token_and_layer(model, method, most_operations):
    """What the Python and the launches cost on a fast GPU: operations beyond those of the untouched model."""
    one = {**SINGLE_PASS, "vhr": INTERVENTIONS["vhr"]}[method]
    plain, ours = (passes(model, m, Ledger)[1].n for m in ([], [one]))
    assert (ours - plain) / LAYERS <= most_operations


class Flops(FlopCounterMode):
    def __init__(self):
        super().__init__(display=False)


@pytest.mark.parametrize(
    ("method", "prefill", "token"),
    [("var", 1.02, 1.06), ("pai", 1.01, 1.06), ("heads", 1.0, 1.0), ("vhr", 1.26, 1.0), ("lookback", 1.01, 1.06)],
)
def test_arithmetic(method, prefill, token):
    """Products only, as counted by torch, at a width where they tell: 1,024 with 2 layers. VHR adds a pass over the
    text tokens in proportion to their number, 20 of 84."""
    shape = shapes.SHAPES["tiny"]
    text = {**shape.text, "hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8}
    wide = shapes.Shape(shape.model_type, {**text, "num_key_value_heads": 8}, IMAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", wide)
        model = shapes.build("tiny", 2, torch.bfloat16, "cpu")
        one = VHR(layers=(0, 1)) if method == "vhr" else SINGLE_PASS.get(method)
        one = HeadGain(head_list="L0H2/L1H0", gain=2.0) if method == "heads" else one
        plain, ours = ([mode.get_total_flops() for mode in passes(model, m, Flops)] for m in ([], [one]))
    assert 1 <= ours[0] / plain[0] <= prefill and 0.9 <= ours[1] / plain[1] <= token, (
        ours[0] / plain[0],
        ours[1] / plain[1],
    )
