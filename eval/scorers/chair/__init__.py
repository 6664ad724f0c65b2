"""CHAIR: which objects a caption names, and which of them are not in the picture.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156. The literature holds several
CHAIRs, which differ in how words are brought to one form (`variants.py`). Captions and ground truth must go
through the same variant, and its `label` stands beside every figure. `rohrbach` reproduces LisaAnne/Hallucination and
Maxlinn/CHAIR-metric-standalone, `opera` shikiw/OPERA, known defects included (under `rohrbach`, "bus" becomes "bu" and
never counts).

    truth = coco_truth("rohrbach")  # or ground_truth("instances_val2014.json", "captions_val2014.json")
    scores = score_captions([("COCO_val2014_000000000042.jpg", "A dog on a couch.")], truth, variant="rohrbach")
    sums = {name: column.sum() for name, column in counts(scores).items()}
    METRICS["CHAIR_S"](sums), METRICS["CHAIR_I"](sums)
    explain(scores[0])
"""

from vlmfix.eval.scorers.chair.captions import mentions, prefix_objects
from vlmfix.eval.scorers.chair.coco import image_key, instance_categories, read_coco
from vlmfix.eval.scorers.chair.scores import METRICS, CaptionScore, clusters, counts, explain, score_captions
from vlmfix.eval.scorers.chair.truth import (
    GroundTruth,
    coco_truth,
    ground_truth,
    images_without_instances,
    label,
    load_masks,
)
from vlmfix.eval.scorers.chair.variants import check_variant
from vlmfix.eval.scorers.chair.vocabulary import Mention, Vocabulary

__all__ = [
    "METRICS",
    "CaptionScore",
    "GroundTruth",
    "Mention",
    "Vocabulary",
    "check_variant",
    "clusters",
    "coco_truth",
    "counts",
    "explain",
    "ground_truth",
    "image_key",
    "images_without_instances",
    "instance_categories",
    "label",
    "load_masks",
    "mentions",
    "prefix_objects",
    "read_coco",
    "score_captions",
]
