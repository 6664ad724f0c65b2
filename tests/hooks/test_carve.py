"""CARVE: the maths against vectors, grids of real image processors, the looks on tiny models, the whole on photos."""

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BatchFeature,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlmfix
from tests import models, vectors
from vlmfix.asking.look import Look, Looked
from vlmfix.engine.attachment import attached
from vlmfix.hooks import CARVE
from vlmfix.hooks.carve import ONE_WORD
from vlmfix.hooks.parts import regions
from vlmfix.hooks.parts.refined import redraw, unpack
from vlmfix.hooks.parts.views import View, covered, view
from vlmfix.model.geometry import Geometry

ASSETS = Path(__file__).parents[2] / "assets"
PHOTOS = sorted((ASSETS / "photos" / "images").glob("*.jpg"))
SCENES = [ASSETS / "organism" / "test" / "images" / f"test_00{n}.webp" for n in (58, 77)]
SCENE = SCENES[0]
QUESTION = "Is there a person in the image?"

# ---- the maths, each step from the stored result of the step before --------------------------------------------------

ARRAYS, CASES, META = vectors.load("carve_maths")
ARRAYS = {k: v.numpy() for k, v in ARRAYS.items()}
BY_NAME = {case["name"]: case for case in CASES}
STEPS = {"first": "start", "all": "full", "uniform": "uniform", "end": "end"}
SCORES = {"attention_sum": "sum", "size": "size", "remove_small": "small"}


def fused(case, which):
    """The map over pixels of a case, from its attention maps, in the released code's geometry."""
    name, depth = case["name"], case["n_layers"]
    layers = [layer for layer in case["layers"] if layer < depth]
    q, g = (ARRAYS[f"{name}/{k}"][:, layers] for k in "qg")
    heat = regions.fuse(q, g, case["lam"], STEPS[which]).reshape(case["grid"])
    size = tuple(case["image_wh"])
    return regions.spread(heat, (0, 0, *size), size)


def refined(name, mask, size=None):
    picture = Image.fromarray(ARRAYS[f"{name}/image"])
    box = regions.bounds(mask)
    return np.asarray(regions.carve(picture, mask, box, size or regions.enlarged(box, picture.size, exact=False)))


@pytest.mark.parametrize("which", STEPS)
@pytest.mark.parametrize("name", BY_NAME)
def test_contrast_and_fusion(name, which):
    S, visible = fused(BY_NAME[name], which)
    np.testing.assert_allclose(S, ARRAYS[f"{name}/S_{which}"], rtol=1e-5)
    assert visible.all()


@pytest.mark.parametrize("name", BY_NAME)
def test_masks_and_boxes(name):
    for m in BY_NAME[name]["masks"]:
        S = ARRAYS[f"{name}/S_{m['S']}"]
        mask, tau, n = regions.select(S, S == S, m["p"], m["K"], m["regions"], SCORES[m["strategy"]])
        assert np.array_equal(mask, ARRAYS[m["key"]].astype(bool)), m["key"]
        assert (n, mask.sum(), list(regions.bounds(mask))) == (m["n_regions"], m["pixels"], m["bbox"]), m["key"]
        assert tau == pytest.approx(m["threshold"], rel=1e-5)


@pytest.mark.parametrize("name", BY_NAME)
def test_refined_picture(name):
    S, want = ARRAYS[f"{name}/S_all"], ARRAYS[f"{name}/pipeline/refined"]
    mask = regions.select(S, S == S, 0.2, 3, "official", "sum")[0]
    masked = ARRAYS[f"{name}/image"] * mask[..., None]
    assert np.array_equal(masked, ARRAYS[f"{name}/pipeline/masked"])
    got = refined(name, mask)
    assert got.shape == want.shape and np.abs(got.astype(int) - want).max() <= 2


@pytest.mark.parametrize("name", BY_NAME)
def test_end_to_end(name):
    case = BY_NAME[name]
    for m in case["masks"]:
        S, visible = fused(case, m["S"])
        mask = regions.select(S, visible, m["p"], m["K"], m["regions"], SCORES[m["strategy"]])[0]
        assert np.array_equal(mask, ARRAYS[m["key"]].astype(bool)), m["key"]
    S, visible = fused(case, "all")
    mask = regions.select(S, visible, 0.2, 3, "official", "sum")[0]
    want = ARRAYS[f"{name}/pipeline/refined"]
    assert np.abs(refined(name, mask).astype(int) - want).max() <= 2


@pytest.mark.parametrize("case", META["geometry"], ids=lambda c: c["name"])
def test_exact_geometry(case):
    name, size = f"geometry/{case['name']}", tuple(case["image_wh"])
    pad = case["kind"] == "pad_square"
    processor = LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=336, do_pad=pad)
    S, visible = regions.spread(ARRAYS[f"{name}/ratio"].reshape(case["grid"]), covered(processor, size), size)
    want, seen = ARRAYS[f"{name}/S"], ARRAYS[f"{name}/visible"].astype(bool)
    np.testing.assert_allclose(S, want, rtol=1e-5)
    assert np.array_equal(visible, seen)
    mask, tau, n = regions.select(want, seen, case["p"], case["K"], "max", "sum")
    assert np.array_equal(mask, ARRAYS[f"{name}/mask"].astype(bool))
    assert (n, list(regions.bounds(mask))) == (case["n_regions"], case["bbox"])
    assert tau == pytest.approx(case["threshold"], rel=1e-5)


def test_constant_maps_keep_everything():
    for kind in ("zero", "const"):
        S = ARRAYS[f"degenerate/S_{kind}"]
        mask = regions.select(S, S == S, 0.2, 3, "official", "sum")[0]
        assert np.array_equal(mask, ARRAYS[f"degenerate/mask_{kind}"].astype(bool)) and mask.all()


def test_pixels_that_the_model_did_not_see_are_never_kept():
    visible = np.zeros((4, 6), bool)
    visible[:, 1:5] = True
    assert np.array_equal(regions.select(np.zeros((4, 6)), visible, 0.2, 3, "max", "sum")[0], visible)


def test_grid_that_the_released_code_guesses():
    for n, rows, columns, *want, used in ARRAYS["official_reshape/rows"].tolist():
        got = regions.official_grid(n, rows, columns)
        assert got == (None if used < 0 else tuple(want)) and (got is None or got[0] * got[1] == used)


@pytest.mark.parametrize("case", META["readout"], ids=lambda c: c["name"])
def test_read_out(case):
    rows, want = (torch.from_numpy(ARRAYS[f"readout/{case['name']}/{k}"]) for k in ("rows", "maps"))
    n, tokens = case["n_prompt"], ARRAYS[f"readout/{case['name']}/next_ids"].tolist()
    method, memo = CARVE(layers=tuple(range(case["layers"]))), {}
    for t in range(case["steps"]):
        for layer in range(case["layers"]):
            a = rows[t, layer, None, :, None, : n + t]
            assert method.weights(a, SimpleNamespace(layer=layer, first_key=0, memo=memo)) is a
    image = torch.zeros(1, n, dtype=torch.bool)
    image[:, case["image_start"] : case["image_end"]] = True
    prompt = torch.ones_like(image)
    maps = method._maps(Looked({}, tokens, True, "", memo, Geometry(image, prompt, prompt)))
    np.testing.assert_allclose(maps, want, atol=1e-6)


def test_layers_that_keep_a_window_show_nothing_of_keys_outside_it():
    image = torch.tensor([[False, True, True, True, False]])
    ones = torch.ones_like(image)
    memo = {"rows": {0: [(0, torch.arange(5.0)), (2, torch.tensor([20.0, 30.0, 40.0, 50.0]))]}}
    got = CARVE(layers=(0,))._maps(Looked({}, [7, 2], True, "", memo, Geometry(image, ones, ones)))
    assert got.tolist() == [[[1.0, 2.0, 3.0]], [[0.0, 20.0, 30.0]]]


# ---- properties -------------------------------------------------------------------------------------------------------

maps = st.builds(
    lambda seed, t, layers, n: np.random.default_rng(seed).uniform(1e-4, 0.3, (t, layers, n)).astype(np.float32),
    st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.just(30),
)  # fmt: skip
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


def heat_of(q, g, lam=0.0, steps="full"):
    return regions.fuse(q, g, lam, steps).reshape(5, 6)


@settings(max_examples=60, deadline=None)
@given(maps, maps, sizes, st.sampled_from(list(STEPS.values())), st.integers(0, 29))
def test_linear_in_the_question_and_monotone(q, g, size, steps, cell):
    layers = min(q.shape[1], g.shape[1])
    q, g = q[:, :layers], g[:, :layers]
    spread = lambda q, g: regions.spread(heat_of(q, g, steps=steps), (0, 0, *size), size)  # noqa: E731
    S, visible = spread(q, g)
    np.testing.assert_allclose(spread(4 * q, g)[0], 4 * S, rtol=1e-5)
    np.testing.assert_allclose(spread(q, g / 4)[0], 4 * S, rtol=1e-5)
    masks = [regions.select(c * S, visible, 0.3, 2, "max", "sum")[0] for c in (1, 0.25, 8)]
    assert np.array_equal(masks[0], masks[1]) and np.array_equal(masks[0], masks[2])
    more = q.copy()
    more[..., cell] *= 2
    assert (spread(more, g)[0] >= S).all()


@settings(max_examples=100, deadline=None)
@given(sizes, st.tuples(st.integers(1, 20), st.integers(1, 20)), st.floats(0, 1e6, width=32))
def test_a_constant_map_stays_constant(size, grid, value):
    S, _ = regions.spread(np.full(grid, value), (0, 0, *size), size)
    assert set(S.flat) == {np.float32(value)}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), sizes, st.floats(0.01, 1), st.integers(1, 4), st.sampled_from(["max", "official"]))
def test_mask_and_box(seed, size, p, K, rule):
    from scipy import ndimage

    width, height = size
    S = np.random.default_rng(seed).permutation(width * height).reshape(height, width).astype(float)
    mask, tau, n = regions.select(S, S == S, p, K, rule, "sum")
    assert mask.any() and not (mask & (tau > S)).any()
    assert (tau <= S).mean() <= p + 1 / S.size + 1e-9
    kept = ndimage.label(mask)[1]
    assert kept == min(n, K if rule == "max" else max(K, int(n * p)))
    x0, y0, x1, y1 = box = regions.bounds(mask)
    inside = mask[y0:y1, x0:x1]
    assert inside.sum() == mask.sum() and all(
        edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    )
    for exact in (True, False):
        w, h = regions.enlarged(box, size, exact)
        assert w >= width - (not exact) and h >= height - (not exact)
        s = max(width / (x1 - x0), height / (y1 - y0))
        assert abs(w - s * (x1 - x0)) <= 1 and abs(h - s * (y1 - y0)) <= 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_thin_boxes_are_widened_and_others_left_alone(data):
    size = data.draw(st.tuples(st.integers(1, 400), st.integers(1, 400)))
    starts = [data.draw(st.integers(0, s - 1)) for s in size]
    stops = [data.draw(st.integers(a + 1, s)) for a, s in zip(starts, size, strict=True)]
    box = (*starts, *stops)
    wide = regions.widened(box, size)
    for i in (0, 1):
        assert 0 <= wide[i] <= box[i] < box[i + 2] <= wide[i + 2] <= size[i]
        assert wide[i + 2] - wide[i] == max(box[i + 2] - box[i], -(-size[i] // 16))


def test_thin_boxes_are_widened_about_their_centre():
    assert regions.widened((100, 0, 101, 160), (160, 160)) == (96, 0, 106, 160)
    assert regions.widened((0, 158, 4, 160), (160, 160)) == (0, 150, 10, 160)


def test_hand_computed_contrast_mask_and_picture():
    """A 1 x 2 grid over 4 x 2 pixels: bilinear weights 0, 1/4, 3/4, 1 from left to right."""
    q = np.float32([[[0.1, 0.4]], [[0.2, 0.2]], [[0.1, 0.1]]])
    g = np.float32([[[0.1, 0.1]], [[0.1, 0.2]]])
    heat = regions.fuse(q, g, 0.0, "full")
    np.testing.assert_allclose(heat, [1 * 1 + 2 * 2, 1 * 4 + 2 * 1], rtol=1e-6)
    np.testing.assert_allclose(regions.fuse(q, g, 0.0, "uniform"), [3, 5], rtol=1e-6)
    np.testing.assert_allclose(regions.fuse(q, g, 0.1, "start"), [0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(regions.fuse(q, g, 0.0, "end"), [1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(regions.fuse(q, g, 0.0, "end", ended=(True, False)), [2, 1], rtol=1e-6)
    np.testing.assert_allclose(regions.fuse(q[:1], g, 0.0, "end", ended=(True, True)), [1, 4], rtol=1e-6)
    S, visible = regions.spread(heat.reshape(1, 2), (0, 0, 4, 2), (4, 2))
    np.testing.assert_allclose(S, [[5, 5.25, 5.75, 6]] * 2)
    mask, tau, n = regions.select(S, visible, 0.5, 1, "max", "sum")
    assert tau == pytest.approx(5.5) and n == 1 and mask.tolist() == [[False, False, True, True]] * 2
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    crop = regions.carve(picture, mask, regions.bounds(mask), (2, 2))
    assert np.array_equal(np.asarray(crop), np.arange(24).reshape(2, 4, 3)[:, 2:])
    hole = mask.copy()
    hole[0, 3] = False
    assert np.asarray(regions.carve(picture, hole, (2, 0, 4, 2), (2, 2)))[0, 1].tolist() == [0, 0, 0]


def test_regions_touch_by_edges_and_ties_go_to_the_first():
    S = np.float64([[9, 1, 1, 1], [1, 9, 1, 9], [1, 1, 1, 1]])
    mask, _, n = regions.select(S, S > 0, 0.25, 1, "max", "sum")
    assert n == 3 and np.argwhere(mask).tolist() == [[0, 0]]
    S[2, 3] = 8.0
    assert regions.select(S, S > 0, 0.33, 1, "max", "size")[0].sum() == 2
    S[0, 0] = 90
    assert np.argwhere(regions.select(S, S > 0, 0.33, 1, "max", "sum")[0]).tolist() == [[0, 0]]

    board = np.indices((10, 20)).sum(0) % 2 == 0
    kept = np.argwhere(regions.select(board * 1.0, board >= 0, 0.5, 3, "max", "size")[0])
    assert kept.tolist() == [[0, 0], [0, 2], [0, 4]], "of a hundred equal regions"
    S = board * np.random.default_rng(0).integers(1, 4, board.shape) * 1.0
    kept = np.argwhere(regions.select(S, board >= 0, 0.5, 60, "max", "sum")[0]).tolist()
    assert kept == sorted(sorted(np.argwhere(board).tolist(), key=lambda at: -S[tuple(at)])[:60])


def test_a_contrast_that_is_not_finite_is_named():
    q = np.ones((3, 2, 4), np.float32)
    g = q.copy()
    g[1, 1, 2] = 0
    with pytest.raises(ValueError, match="not finite at step 1 of layer 25"):
        regions.fuse(q, g, 0.0, "full", layers=(20, 25))
    assert np.isfinite(regions.fuse(q, g, 1e-8, "full")).all()


def test_sharpest_box_by_hand():
    """4 x 4 cells of 100 pixels; all heat in the cell at row 2, column 1."""
    heat = np.zeros((4, 4))
    heat[2, 1] = 1.0
    assert regions.sharpest_box(heat, (0, 0, 400, 400), (400, 400), 100) == (100, 200, 200, 300)
    assert regions.sharpest_box(heat, (100, 0, 500, 400), (700, 400), 100) == (200, 200, 300, 300)
    heat[3, 1] = heat[2, 2] = heat[3, 2] = (
        1.0  # now the window of 2 x 2 cells at ratio 2 stands out as well: 4 - 2 over 4
    )
    heat[2, 1] = 0.9  # one cell: 1 - (1 + 1 + 0)/3; the first in x, then y: (3, 1), whose neighbours are 0.9, 1 and 0
    assert regions.sharpest_box(heat, (0, 0, 400, 400), (400, 400), 100) == (100, 200, 300, 400)
    assert regions.sharpest_box(heat, (0, 0, 400, 400), (400, 400), 400) is None
    cross = np.zeros((4, 4))
    cross[[0, 2, 1, 1], [1, 1, 0, 2]], cross[1, 1] = 0.5, 1.0  # one cell: 1 - 0.5; 2 x 2 cells: (2 - 2) / 4
    assert regions.sharpest_box(cross, (0, 0, 400, 400), (400, 400), 100) == (100, 100, 200, 200)
    assert regions.sharpest_box(np.eye(4), (0, 0, 400, 100), (400, 100), 200) == (0, 0, 200, 100), "cut at the borders"


# ---- grids of real image processors and models ------------------------------------------------------------------------


def qwen3_vl(n_layers=4):
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
            "out_hidden_size": 48, "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "initializer_range": 0.2,
        },
        text_config={
            **models.TEXT, "num_hidden_layers": n_layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        image_token_id=models.IMAGE, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip
    return models._finish(Qwen3VLForConditionalGeneration(config), "sdpa")


def internvl(n_layers=4):
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [32, 32], "patch_size": [4, 4], "initializer_range": 0.2,
        },
        text_config=LlamaConfig(**models.TEXT, num_hidden_layers=n_layers).to_dict(),
        image_token_id=models.IMAGE, image_seq_length=16,
    )  # fmt: skip
    return models._finish(InternVLForConditionalGeneration(config), "sdpa")


def smolvlm(n_layers=4):
    torch.manual_seed(0)
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 4, "initializer_range": 0.2,
        },
        text_config=LlamaConfig(**models.TEXT, num_hidden_layers=n_layers).to_dict(),
        image_token_id=models.IMAGE, scale_factor=2,
    )  # fmt: skip
    return models._finish(SmolVLMForConditionalGeneration(config), "sdpa")


QWEN = Qwen2VLImageProcessorPil(
    patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
)
CLIP = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
PAD = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_pad=True)
NEXT = LlavaNextImageProcessorPil(
    size={"shortest_edge": 16},
    crop_size={"height": 16, "width": 16},
    image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
)
TILES = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4)
SPLIT = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
FAMILIES = {
    "llava": (models.llava, CLIP),
    "llava-pad": (models.llava, PAD),
    "llava_next": (models.llava_next, NEXT),
    "qwen2_5_vl": (models.qwen2_5_vl, QWEN),
    "qwen3_vl": (qwen3_vl, QWEN),
    "internvl": (internvl, TILES),
    "smolvlm": (smolvlm, SPLIT),
}


@torch.no_grad()
def features(model, inputs):
    """(N, D): what the model makes of one picture's pixels, one row per image token."""
    wanted = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
    found = model.model.get_image_features(**wanted, return_dict=True).pooler_output
    found = found if isinstance(found, torch.Tensor) else torch.cat(list(found))
    return found.reshape(-1, found.shape[-1])


class Stub:
    """A processor with a real image processor and no words: the text is read as letters, and pictures come first."""

    def __init__(self, model, image_processor):
        self.model, self.image_processor, self.image_token = model, image_processor, "<"

    def pixels(self, picture):
        nested = [[picture]] if self.image_processor is SPLIT else [picture]
        return dict(self.image_processor(nested, return_tensors="pt"))

    def __call__(self, text, images, return_tensors, padding, padding_side):
        rows, several = [], [self.pixels(p) for one in images for p in one]
        counts = iter([len(features(self.model, inputs)) for inputs in several])
        for line, pictures in zip(text, images, strict=True):
            ids = [1]
            for _ in pictures:
                ids += [58, *[models.IMAGE] * next(counts), 59]
            rows.append(ids + [3 + ord(letter) % 50 for letter in line if letter != "<"])
        width = max(map(len, rows))
        inputs = {
            "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        }
        for key in ("pixel_values", "image_grid_thw", "image_sizes"):
            if key in several[0]:
                values = [one[key] for one in several]
                most = max(v.shape[1] for v in values)  # of views of a picture; these models want them padded
                if key == "pixel_values" and values[0].dim() == 5:
                    values = [torch.cat([v, v.new_zeros(1, most - v.shape[1], *v.shape[2:])], dim=1) for v in values]
                inputs[key] = torch.cat(values)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == models.IMAGE).int()
        return BatchFeature(inputs)

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def photo(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", [(96, 64), (60, 97), (64, 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_covers_the_pixels_that_it_says(family, size):
    """Paint over one cell of the grid, and the token of that cell changes most."""
    build, image_processor = FAMILIES[family]
    model, picture = build(), photo(*size)
    with torch.no_grad():  # no attention between patches: a token sees its own pixels
        for name, module in model.named_modules():
            if "vis" in name and name.endswith(("attn.out_proj", "attn.proj", "attention.projection_layer")):
                module.weight.zero_()
    stub = Stub(model, image_processor)
    inputs = stub.pixels(picture)
    plain = features(model, inputs)
    seen = view(model.config, stub, inputs, size, len(plain))
    assert seen.box == {
        ("llava", (96, 64)): (16, 0, 80, 64),
        ("llava", (60, 97)): (0, 18, 60, 78),
        ("llava-pad", (96, 64)): (0, -16, 96, 80),
        ("llava-pad", (60, 97)): (-18, 0, 79, 97),
    }.get((family, size), (0, 0, *size))
    x0, y0, x1, y1 = seen.box
    checked = 0
    for row in range(seen.rows):
        for column in range(seen.columns):
            left, right = (x0 + (x1 - x0) * (column + d) / seen.columns for d in (0.1, 0.9))
            top, bottom = (y0 + (y1 - y0) * (row + d) / seen.rows for d in (0.1, 0.9))
            area = [round(v) for v in (left, top, right, bottom)]
            if area[0] < 0 or area[1] < 0 or area[2] > size[0] or area[3] > size[1]:
                continue  # padding cannot be painted
            painted = picture.copy()
            painted.paste((255, 0, 255), area)
            change = (features(model, stub.pixels(painted)) - plain).norm(dim=-1)[seen.first :][
                : seen.rows * seen.columns
            ]
            checked += 1
            assert int(change.argmax()) == row * seen.columns + column, (row, column)
    assert checked >= 8


def test_grids_that_are_not_known_are_refused():
    qwen = SimpleNamespace(model_type="qwen2_5_vl", vision_config=SimpleNamespace(spatial_merge_size=2))
    grid = {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    assert view(qwen, None, grid, (30, 20), 6) == View(2, 3, 0, (0, 0, 30, 20))
    with pytest.raises(ValueError, match="expected at least 2 x 3 image tokens of the picture, got 7"):
        view(qwen, None, grid, (30, 20), 7)
    other = SimpleNamespace(model_type="gemma3", vision_config=None)
    with pytest.raises(TypeError, match="cut the picture into 3 tiles, and their order is not known"):
        view(other, CLIP, {"pixel_values": torch.zeros(3, 3, 8, 8)}, (8, 8), 12)
    with pytest.raises(TypeError, match="lie on no grid"):
        view(other, CLIP, {"pixel_values": torch.zeros(1, 3, 8, 8)}, (8, 8), 12)
    with pytest.raises(TypeError, match="the 0 image tokens of a gemma3 model lie on no grid"):
        view(other, CLIP, {"pixel_values": torch.zeros(1, 3, 8, 8)}, (8, 8), 0)
    with pytest.raises(TypeError, match="cannot tell the grid of image tokens of a fuyu model"):
        view(SimpleNamespace(model_type="fuyu"), CLIP, {}, (8, 8), 4)
    with pytest.raises(TypeError, match="Q-Former"):
        view(SimpleNamespace(model_type="blip-2", qformer_config=object()), None, {}, (8, 8), 16)
    flat = SimpleNamespace(image_processor=SimpleNamespace(do_center_crop=False))
    assert covered(flat, (9, 5)) == (0, 0, 9, 5)
    wider = LlavaImageProcessorPil(size={"shortest_edge": 20}, crop_size=16)
    assert covered(wider, (100, 60)) == (26, 6, 74, 54), "a crop smaller than the short side"


# ---- the looks on tiny models -----------------------------------------------------------------------------------------


@torch.no_grad()
def eager_maps(model, stub, picture, text, layers, n):
    """The maps by transformers' own eager attention, from all weights, with or without cache."""
    inputs = stub([f"<\n{text}"], [[picture]], "pt", True, "left")
    image = inputs["input_ids"][0] == models.IMAGE
    model.set_attn_implementation("eager")
    found = []
    for cache in (True, False):
        out = model.generate(
            **inputs,
            max_new_tokens=n,
            do_sample=False,
            use_cache=cache,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        steps = [[a[layer][0, :, -1, : len(image)][:, image].mean(0) for layer in layers] for a in out.attentions]
        found.append(np.array([[row.numpy() for row in step] for step in steps]))
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_looks_read_what_eager_attention_shows(family, monkeypatch):
    build, image_processor = FAMILIES[family]
    model, picture = build(), photo(96, 64)
    model.generation_config.suppress_tokens = [58, 59, 60, 61]
    stub = Stub(model, image_processor)
    plain = vlmfix.ask(model, stub, picture, QUESTION, max_new_tokens=3)
    seen, fuse = [], regions.fuse
    monkeypatch.setattr(regions, "fuse", lambda q, g, *a: seen.append((q, g)) or fuse(q, g, *a))
    carve = CARVE(layers=(1, 3), look_tokens=4)
    with carve(model):
        record = vlmfix.ask(model, stub, picture, QUESTION, max_new_tokens=3)
    for got, text in zip(seen[0], (QUESTION, carve.general), strict=True):
        cached, uncached = eager_maps(model, stub, picture, text, (1, 3), 4)
        assert got.shape == cached.shape and got.shape[0] == 4
        np.testing.assert_allclose(got, cached, atol=1e-5)
        np.testing.assert_allclose(got, uncached, atol=1e-5)
    (did,) = record.effects
    assert did["acted"] and did["T_Q"] == did["T_G"] == 4
    refined = redraw(did, picture)
    twice = vlmfix.ask(model, stub, [picture, refined], QUESTION, max_new_tokens=3)
    assert record.token_ids == twice.token_ids, "the answer is the plain model's, from both pictures"
    assert vlmfix.ask(model, stub, picture, QUESTION, max_new_tokens=3).token_ids == plain.token_ids
    rows, columns = len(did["heat"]), len(did["heat"][0])
    first = len(seen[0][0][0, 0]) - rows * columns if family in ("internvl", "smolvlm") else 0
    heat = fuse(*seen[0], 1e-8, "full")[first : first + rows * columns]
    np.testing.assert_allclose(np.ravel(did["heat"]), heat, rtol=1e-3)
    S, visible = regions.spread(np.array(did["heat"]), tuple(did["covers"]), picture.size)
    assert rows * columns >= 6 and (unpack(did["mask"]) <= visible).all()
    assert S[unpack(did["mask"])].mean() > S[visible].mean()


# ---- the whole, on the embedded model and photos ----------------------------------------------------------------------


def said(record):
    return record.text, record.token_ids, record.effects


def test_photos_end_to_end(organism):
    model, processor = organism
    kept = []
    with CARVE()(model):
        for path in PHOTOS:
            record = vlmfix.ask(model, processor, path, QUESTION)
            (did,) = json.loads(record.to_json())["effects"]
            picture = Image.open(path).convert("RGB")
            x0, y0, x1, y1 = did["covers"]
            assert x1 - x0 == y1 - y0 == min(picture.size), "the centre of the photo is what the model saw"
            mask, refined = unpack(did["mask"]), redraw(did, path)
            assert refined.size == tuple(did["size"]) and all(
                a >= b for a, b in zip(refined.size, picture.size, strict=True)
            )
            assert mask.shape == picture.size[::-1] and not mask[:, :x0].any() and not mask[:, x1:].any()
            assert abs(mask[y0:y1, x0:x1].mean() - did["area"]) < 1e-4 and did["area"] <= 0.4 + 1e-4
            assert did["area"] < did["share"] < 1 and did["first"] in ("Yes", "No")
            assert np.array(did["heat"]).shape == (10, 10)
            pixels = np.asarray(refined.convert("L"))
            kept.append((pixels > 16).mean())
            with pytest.raises(ValueError, match="record is of a picture of"):
                redraw(did, picture.resize((50, 50)))
    assert 0.2 < np.mean(kept) < 0.9, "part black, part picture"


def test_general_instruction_is_asked_once_per_picture(organism):
    model, processor = organism
    other = "Is there a dog in the image?"
    with CARVE(look_tokens=100)(model):
        fresh = vlmfix.ask(model, processor, SCENE, other)
    with CARVE(look_tokens=100)(model):
        vlmfix.ask(model, processor, SCENE, QUESTION)
        again = vlmfix.ask(model, processor, SCENE, other)
        kept = attached(model).kept[0]
        assert said(fresh) == said(again) and fresh.passes > again.passes and len(kept) == 1
        assert next(iter(kept.values()))[1] is True, "the look ended by itself"
        one, two = (said(vlmfix.ask(model, processor, path, QUESTION)) for path in SCENES)
        for n in range(70):
            kept[n] = None
        vlmfix.ask(model, processor, SCENE, QUESTION)
        assert len(kept) == 64 and list(kept)[:2] == [7, 8], "what was used last stays"
    with CARVE(look_tokens=100)(model):
        assert two == said(vlmfix.ask(model, processor, SCENES[1], QUESTION)) != one, "each has its own"
    assert attached(model) is None


@pytest.mark.parametrize(
    ("method", "suffix", "budget"),
    [
        (CARVE(look_tokens=5), "", 5),
        (CARVE(variant="official", layers=(4,)), " " + ONE_WORD, 32),
        (CARVE(steps="start"), "", 1),
    ],
    ids=["paper", "official", "start"],
)
def test_what_the_looks_ask(organism, monkeypatch, method, suffix, budget):
    model, processor = organism
    asked, look = [], Look.__call__
    monkeypatch.setattr(Look, "__call__", lambda self, *a: asked.append(a) or look(self, *a))
    with method(model):
        vlmfix.ask(model, processor, SCENE, QUESTION)
    prompts = [(prompt, n) for _, prompt, n in asked]
    assert prompts == [(QUESTION + suffix, budget), (method.general + suffix, budget)]
    assert all(len(images) == 1 and images[0].size == (120, 120) for images, *_ in asked)


@pytest.mark.parametrize("rule", ["max", "official"])
def test_settings_reach_the_maths(organism, monkeypatch, rule):
    model, processor = organism
    seen, fuse, select = [], regions.fuse, regions.select
    monkeypatch.setattr(regions, "fuse", lambda *a: seen.append(a) or fuse(*a))
    monkeypatch.setattr(regions, "select", lambda *a: seen.append(a) or select(*a))
    with CARVE(steps="end", look_tokens=100, lam=0.02, layers=(1, 3), p=0.3, K=4, regions=rule, score="size")(model):
        (did,) = vlmfix.ask(model, processor, SCENE, QUESTION).effects
    (q, g, *how), (_, _, *which) = seen
    assert how == [0.02, "end", (True, True), (1, 3)] and which == [0.3, 4, rule, "size"]
    assert (len(q), len(g)) == (did["T_Q"], did["T_G"]) and len(q) > 1 < len(g), "both looks end with an end token"
    want = (q[-2] / (g[-2] + np.float32(0.02))).sum(0).reshape(10, 10)
    np.testing.assert_allclose(did["heat"], want, rtol=1e-3)


@pytest.mark.parametrize("geometry", ["exact", "official"])
def test_thin_boxes_of_pictures(organism, geometry, monkeypatch):
    model, processor = organism
    exact, enlarged = [], regions.enlarged
    monkeypatch.setattr(regions, "enlarged", lambda *a: exact.append(a[2]) or enlarged(*a))
    with CARVE(p=1e-5, K=1, geometry=geometry)(model):
        (did,) = vlmfix.ask(model, processor, PHOTOS[0], QUESTION).effects
    x0, y0, x1, y1 = did["box"]
    width, height = Image.open(PHOTOS[0]).size
    wide = x1 - x0 >= width / 16 and y1 - y0 >= height / 16
    assert exact == [geometry == "exact"] == [wide] and unpack(did["mask"]).sum() < 20


def test_the_looks_leave_no_trace_and_others_act_in_the_answer_alone(organism):
    model, processor = organism
    with CARVE(final="refined")(model):
        carved = vlmfix.ask(model, processor, SCENE, QUESTION)
    refined = redraw(carved.effects[0], SCENE)
    with vlmfix.engine.wrap.wrapped(model, "vhr"):
        want = vlmfix.ask(model, processor, refined, QUESTION, num_beams=2, max_new_tokens=12)
    with vlmfix.engine.wrap.wrapped(model, [CARVE(final="refined"), *vlmfix.method.registry.parse("vhr")]):
        got = vlmfix.ask(model, processor, SCENE, QUESTION, num_beams=2, max_new_tokens=12)
    assert got.token_ids == want.token_ids and got.effects[0] == carved.effects[0]


def test_looks_are_greedy_whatever_the_models_settings(organism):
    model, processor = organism
    before = model.generation_config.num_beams
    with CARVE()(model):
        want = vlmfix.ask(model, processor, SCENE, QUESTION).effects
    try:
        model.generation_config.num_beams = 3
        with CARVE()(model):
            assert vlmfix.ask(model, processor, SCENE, QUESTION, do_sample=True, seed=1).effects == want
    finally:
        model.generation_config.num_beams = before


def test_random_place_keeps_size_and_shape(organism):
    model, processor = organism
    (control,) = CARVE().controls()
    facts = []
    for one in (CARVE(), control):
        with one(model):
            facts.append([vlmfix.ask(model, processor, path, QUESTION).effects[0] for path in PHOTOS])
    boxes = []
    for a, b in zip(*facts, strict=True):
        assert [b["size"], b["area"]] == [a["size"], a["area"]] and b["heat"] == a["heat"]
        masks = [unpack(d["mask"])[d["box"][1] : d["box"][3], d["box"][0] : d["box"][2]] for d in (a, b)]
        assert np.array_equal(*masks)
        assert (
            unpack(b["mask"])[b["covers"][1] : b["covers"][3], b["covers"][0] : b["covers"][2]].sum()
            == unpack(a["mask"]).sum()
        )
        boxes.append(a["box"] != b["box"])
    with control(model):
        assert [vlmfix.ask(model, processor, path, QUESTION).effects[0] for path in PHOTOS] == facts[1], (
            "the same each time"
        )
    assert any(boxes)
    mask = np.zeros((5, 7), bool)
    mask[1, 2:4] = True
    places = {regions.moved(mask, (2, 1, 4, 2), (1, 1, 6, 5), random.Random(n))[1] for n in range(200)}
    assert places == {(x, y, x + 2, y + 1) for x in range(1, 5) for y in range(1, 5)}


def test_vicrop(organism):
    model, processor = organism
    method = CARVE(variant="vicrop")
    assert (method.lam, method.steps, method.region, method.geometry) == (0.0, "start", "box", "official")
    with method(model):
        records = [vlmfix.ask(model, processor, path, QUESTION) for path in PHOTOS]
        settings = records[0].method[0]
    assert settings["layers"] == [4] and settings["side"] == 120, "14 of 32 layers; the side of the model's input"
    for path, record in zip(PHOTOS, records, strict=True):
        (did,) = record.effects
        x0, y0, x1, y1 = did["box"]
        whole = Image.open(path).convert("RGB")
        assert record.passes == 2 + len(record.token_ids) and did["mask"] is None and did["T_Q"] == did["T_G"] == 1
        assert x1 - x0 == y1 - y0 in {round(120 * r) for r in regions.RATIOS}
        assert np.array_equal(np.asarray(redraw(did, path)), np.asarray(whole.crop((x0, y0, x1, y1))))
    with method(model):
        (did,) = vlmfix.ask(model, processor, SCENE, QUESTION).effects
    assert not did["acted"] and redraw(did, SCENE).size == (120, 120), "no window is smaller than the picture"


def test_official_variant(organism):
    model, processor = organism
    method = CARVE(variant="official")
    assert (method.p, method.K, method.regions, method.geometry, method.final) == (
        0.2,
        3,
        "official",
        "official",
        "both",
    )
    with pytest.warns(UserWarning, match=r"layers \[20, 21, 22, 23, 24, 25\], and this model has 8"):
        vlmfix.wrap(model, method)
    assert vlmfix.ask(model, processor, SCENE, QUESTION).effects == [{"acted": False}]
    with replace(method, layers=(4, 5, 9))(model):
        record = vlmfix.ask(model, processor, PHOTOS[0], QUESTION)
    (did,) = record.effects
    assert record.method[0]["layers"] == [4, 5] and record.prompt == QUESTION
    assert did["question"] == QUESTION + " Answer the question using a single word or phrase."
    assert did["covers"] == [0, 0, *Image.open(PHOTOS[0]).size]
    plain = [Image.open(PHOTOS[0]), redraw(did, PHOTOS[0])]
    vlmfix.unwrap(model)
    assert vlmfix.ask(model, processor, plain, did["question"]).token_ids == record.token_ids
    with replace(method, layers=(4, 5))(model):
        again = vlmfix.ask(model, processor, PHOTOS[0], did["question"])
    assert "question" not in again.effects[0] and again.token_ids == record.token_ids


def test_nothing_to_cut_asks_with_the_picture_alone(organism):
    model, processor = organism
    plain = vlmfix.ask(model, processor, PHOTOS[0], QUESTION)
    with CARVE(p=1.0)(model):
        record = vlmfix.ask(model, processor, PHOTOS[0], QUESTION)
    assert record.token_ids == plain.token_ids and not record.effects[0]["acted"]
    same = CARVE(general=QUESTION, lam=0.0, captions=True)
    with same(model):
        record = vlmfix.ask(model, processor, PHOTOS[0], QUESTION)
    assert record.token_ids == plain.token_ids and not record.effects[0]["acted"], "equal looks, lam 0: S is constant"


def test_what_is_refused(organism):
    model, processor = organism
    vlmfix.wrap(model, "carve")
    for prompt in (
        "Please describe this image in detail.", "Describe the image.", "Can you describe this picture?",
        "Provide a one-sentence caption for the provided image.", "What is in the image?", "What do you see in this photo?",
        "Write a general description of the image.", "Write a short description.",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="asks about all of the picture"):
            vlmfix.ask(model, processor, SCENE, prompt)
    for prompt in (
        QUESTION, "What is the man holding in the image?", "Describe the man on the left.", "What is written on the sign?",
        "Is this a good caption for the image: a dog?", "How many dogs are in the image?", "What color is the scene's sky?",
    ):  # fmt: skip
        vlmfix.ask(model, processor, SCENE, prompt, max_new_tokens=1)
    with pytest.raises(ValueError, match="one image per question; got 2"):
        vlmfix.ask(model, processor, [SCENE, SCENE], QUESTION)
    vlmfix.wrap(model, CARVE(captions=True))
    assert vlmfix.ask(model, processor, SCENE, "Describe the image.", max_new_tokens=4).effects[0]["acted"]
    vlmfix.unwrap(model)
    for bad, message in [
        ({"p": 0.0}, "p: expected"), ({"p": 1.5}, "p: expected"), ({"K": 0}, "K: expected 1 or more"),
        ({"lam": -1.0}, "lam: expected 0 or more"), ({"general": " "}, "general: expected"), ({"steps": "all"}, "steps:"),
        ({"layers": (-1,)}, "layers: expected"), ({"layers": ()}, "layers: expected"), ({"variant": "best"}, "variant:"),
        ({"lam": float("nan")}, "lam: expected"), ({"look_tokens": 0}, "look_tokens: expected"), ({"score": "x"}, "score:"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            CARVE(**bad)
    with pytest.raises(ValueError, match=r"layers: expected numbers in 0..7, got \[8\]"):
        vlmfix.wrap(model, CARVE(layers=(7, 8)))


def test_default_layers():
    assert CARVE()._default_layers(26, "llava") == (20, 21, 22, 23, 24, 25)
    assert CARVE()._default_layers(25, "llava") == (16, 17, 18, 19, 20) and CARVE()._default_layers(1, "x") == (0,)
    crop = CARVE(variant="vicrop")
    assert crop._default_layers(32, "llava") == (14,) and crop._default_layers(28, "qwen2_5_vl") == (22,)
    assert asdict(CARVE(layers=4))["layers"] == (4,)
