"""Loading where torchvision is missing."""

import pytest
import torch
from PIL import Image

import vlmfix
from vlmfix.model import loading
from vlmfix.organism import dynamic
from vlmfix.organism.recipe import Dynamic, Language, Recipe


def test_without_torchvision_pictures_are_taken_and_videos_refused(tmp_path, monkeypatch):
    small = Language(vocabulary=400, read=4, width=32, layers=1, heads=4, shared_heads=2, inner=48)
    recipe = Recipe(language=small, dynamic=Dynamic(width=32, layers=1, heads=2, inner=48))
    dynamic.save(dynamic.build(recipe), recipe, tmp_path)
    monkeypatch.setattr(loading, "is_torchvision_available", lambda: False)
    model, processor = vlmfix.load(tmp_path)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    asked = processor(images=Image.new("RGB", (160, 120)), text="<image> Is it?", return_tensors="pt")
    assert asked["image_grid_thw"].tolist() == [[1, 12, 16]]
    assert (asked["input_ids"] == model.config.image_token_id).sum() == 48
    with pytest.raises(ImportError, match="pictures only; for videos, install torchvision"):
        processor(videos=torch.zeros(1, 2, 3, 40, 40), text="Is it?")
