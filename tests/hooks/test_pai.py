"""PAI's attention edit against its formula, by hand and in a model."""

import torch

from tests.models import llava, picture_prompt
from vlmfix.hooks import PAI
from vlmfix.method.site import Site
from vlmfix.model.geometry import Geometry


def edited(alpha, s, image, rows):
    ones = torch.ones_like(image)
    site = Site(2, 4, Geometry(image, ones, ones), rows, 0, 0, {}, n_prompt=s.shape[2])
    return site.admit(PAI(alpha=alpha).scores(s, site), s)


def test_worked_row():
    s = torch.tensor([2.0, -1.0, 0.5, -2.0]).view(1, 1, 1, 4)
    image = torch.tensor([[False, True, True, False]])
    out = edited(0.5, s, image, torch.tensor([[True]]))
    assert out.flatten().tolist() == [2.0, -0.5, 0.75, -2.0]


def test_properties():
    g = torch.Generator().manual_seed(0)
    s = torch.randn(2, 3, 4, 9, generator=g)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[0, 2:6], image[1, 4:] = True, True
    rows = torch.tensor([[False, False, True, True], [False, True, False, True]])
    out = edited(0.7, s, image, rows)
    touched = (image[:, None] & rows[..., None])[:, None].expand_as(s)
    assert torch.equal(out[~touched], s[~touched]) and (out[touched] > s[touched]).all()
    mass = lambda x: (x.softmax(-1) * image[:, None, None]).sum(-1)  # noqa: E731
    assert (mass(out) >= mass(s)).all()
    assert torch.equal(edited(0.0, s, image, rows), s)
    assert torch.equal(edited(0.7, s, image & False, rows), s)


def test_equals_an_edit_of_the_whole_matrix():
    """The same rule in eager attention, written out over all queries and keys."""
    model = llava("eager")
    prompt = picture_prompt(model)
    image = (prompt["input_ids"] == 60)[0]
    module = model.get_decoder().layers[3].self_attn
    seen = {}

    def keep(_, args, kwargs):
        seen["x"] = (args or (kwargs["hidden_states"],))[0]
        seen["rotary"] = kwargs["position_embeddings"]

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True),
        module.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0])),
    ]
    with PAI(alpha=0.5, skip_first=3)(model), torch.no_grad():
        model(**prompt)
    [h.remove() for h in handles]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    with torch.no_grad():
        x = seen["x"]
        split = lambda y, n: y.view(1, -1, n, 8).transpose(1, 2)  # noqa: E731
        q, k, v = split(module.q_proj(x), 6), split(module.k_proj(x), 2), split(module.v_proj(x), 2)
        q, k = apply_rotary_pos_emb(q, k, *seen["rotary"])
        k, v = repeat_kv(k, 3), repeat_kv(v, 3)
        s = q @ k.transpose(-1, -2) / 8**0.5
        row = s[..., -1, :]
        s[..., -1, :] = torch.where(image, row + 0.5 * row.abs(), row)
        n = s.shape[-1]
        s = s.masked_fill(torch.arange(n) > torch.arange(n)[:, None], -torch.inf)
        want = (s.softmax(-1) @ v).transpose(1, 2).reshape(1, n, -1)
    torch.testing.assert_close(seen["out"], want, rtol=1e-4, atol=1e-5)


def test_control_turns_the_push_round():
    (control,) = PAI(alpha=0.3).controls()
    assert control.alpha == -0.3
