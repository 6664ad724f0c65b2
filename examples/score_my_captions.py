"""Captions of one's own, in a file, against the ground truth of COCO 2014: which objects are there, and which invented.

    python examples/score_my_captions.py [CAPTIONS.jsonl]

A line of the file is {"image_id": 42, "caption": "A dog on a couch."}; names of files such as
COCO_val2014_000000000042.jpg go as well. Needs neither the pictures nor torch. `vlmfix score` prints more.
"""

import sys
from pathlib import Path

from vlmfix.eval.scorers import chair, stats
from vlmfix.eval.scorers.reading import read_captions


def main(path: str = str(Path(__file__).parent / "captions.jsonl")) -> None:
    """Print a verdict on each caption, then the figures with their intervals."""
    truth = chair.coco_truth("rohrbach", "val")
    scores = chair.score_captions(read_captions(path), truth, variant="rohrbach")
    for score in scores:
        print(f"{score.image_id}: {score.caption}")
        for mention in chair.explain(score)["mentions"]:
            print(f"    {mention['verdict']:8} {mention['text']} ({mention['node']})")

    estimates = stats.estimates(chair.counts(scores), chair.METRICS)
    print(f"\n{len(scores)} captions, read as {scores[0].variant}; in brackets the 95 % interval over pictures")
    for name in ("CHAIR_S", "CHAIR_I", "recall", "F1"):
        figure = estimates[name]
        print(f"{name:8} {figure.value:6.1%} [{figure.low:.1%}, {figure.high:.1%}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
