"""CHAIR as a task of lmms-eval, scored by this library's scorer:

python -m vlmfix.integrations.lmms_tasks DIR --data coco --images val2014 --limit 500
lmms-eval --model vlmfix --model_args pretrained=ID,method=var --tasks chair_vlmfix --include_path DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PROMPT = "Please describe this image in detail."
TASK = """\
task: chair_vlmfix
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function chair_vlmfix_utils.visual
doc_to_text: "{prompt}"
doc_to_target: image_id
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  do_sample: false
  num_beams: 1
  until: []
process_results: !function chair_vlmfix_utils.process_results
metric_list:
  - metric: CHAIR_S
    aggregation: !function chair_vlmfix_utils.chair_s
    higher_is_better: false
  - metric: CHAIR_I
    aggregation: !function chair_vlmfix_utils.chair_i
    higher_is_better: false
  - metric: recall
    aggregation: !function chair_vlmfix_utils.recall
    higher_is_better: true
metadata:
  - version: 1.0
"""
UTILS = '''\
"""Captions scored by vlmfix's CHAIR (rohrbach). Made by vlmfix.integrations.lmms_tasks."""

from vlmfix.eval.pictures.data import Data
from vlmfix.eval.scorers import chair

TRUTH = Data.load({data!r}, pictures={images!r}).truth


def visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    caption = {{"image_id": doc["image_id"], "caption": results[0]}}
    return {{"CHAIR_S": caption, "CHAIR_I": caption, "recall": caption}}


def _figure(results, name):
    scores = chair.score_captions({{each["image_id"]: each["caption"] for each in results}}, TRUTH)
    return float(chair.METRICS[name]({{key: values.sum() for key, values in chair.counts(scores).items()}}))


def chair_s(results):
    return _figure(results, "CHAIR_S")


def chair_i(results):
    return _figure(results, "CHAIR_I")


def recall(results):
    return _figure(results, "recall")
'''


def write(folder: Path, data: str, images: str | None, limit: int | None, max_new_tokens: int) -> Path:
    """The task's three files: pictures (parquet), YAML, and its functions. `ValueError` for data that is not there."""
    import datasets

    from vlmfix.eval.pictures.data import Data

    pictures = Data.load(data, limit, pictures=images)
    rows = [{"image_id": key, "image": str(path)} for key, path in pictures.images.items()]
    folder.mkdir(parents=True, exist_ok=True)
    parquet = folder.resolve() / "chair_vlmfix.parquet"
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(str(parquet))
    task = TASK.format(parquet=parquet, prompt=PROMPT, max_new_tokens=max_new_tokens)
    (folder / "chair_vlmfix.yaml").write_text(task, "utf-8")
    utils = UTILS.format(data=pictures.name, images=None if images is None else str(Path(images).resolve()))
    (folder / "chair_vlmfix_utils.py").write_text(utils, "utf-8")
    return folder / "chair_vlmfix.yaml"


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(prog="python -m vlmfix.integrations.lmms_tasks", description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--data", default="organism", help="as in vlmfix eval --data")
    options.add_argument("--images", help="folder of the pictures, where they are not with the data")
    options.add_argument("--limit", type=int)
    options.add_argument("--max-new-tokens", type=int, default=512)
    told = options.parse_args()
    try:
        path = write(told.folder, told.data, told.images, told.limit, told.max_new_tokens)
    except ValueError as error:
        sys.exit(f"vlmfix: {error}")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
