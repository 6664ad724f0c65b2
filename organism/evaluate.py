"""Does a model see, and does it invent as large models do? `python -m vlmfix.organism.evaluate MODEL [--scenes N]`.

CHAIR and POPE come from the harness, as `vlmfix eval` gives them; this adds what the harness does not ask: where in the
caption inventions stand, whether they follow co-occurrence, what is said without an image, and which keys get the
attention. `--write FOLDER` writes the scenes that settings are chosen on and those that are reported on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlmfix
from vlmfix.asking.asker import Asker
from vlmfix.eval.benchmarks.benchmark import benchmark
from vlmfix.eval.benchmarks.pope_building import question_text
from vlmfix.eval.pictures.data import Data
from vlmfix.eval.run.progress import PlainProgress
from vlmfix.eval.run.results import compare
from vlmfix.eval.run.runner import answer_all
from vlmfix.eval.scorers import chair
from vlmfix.organism import captions
from vlmfix.organism.scenes import CLASSES, Painter, conditional, frequency, object_sets
from vlmfix.organism.sets import write

TEST_SEED, CALIBRATION_SEED = 101, 102
"""Of the scenes that are reported on, from object sets of COCO's val split, and of those to choose settings on."""


def write_sets(folder: Path, n: int = 500, limit: int | None = None) -> None:
    """Write `test` and `calibration`, n scenes each or the first of them, with annotations, captions and
    `attributes.jsonl`.
    """
    for name, sets, seed in (
        ("test", object_sets("val"), TEST_SEED),
        ("calibration", object_sets("train"), CALIBRATION_SEED),
    ):
        write(folder / name, sets, seed, n, name, limit)
        questions = "".join(f"{line}\n" for line in attributes(sets, seed, n, name, limit))
        (folder / name / "attributes.jsonl").write_text(questions)


def attributes(
    sets: np.ndarray, seed: int, n: int, stem: str, limit: int | None = None, each: int = 3
) -> Iterable[str]:
    """Yes/no questions on number, place and relation of the scenes that `write` writes, as the benchmark yesno reads
    them: one line of JSON each.
    """
    painter, number = Painter(), 0
    rows = np.random.default_rng(seed).choice(len(sets), n, replace=False)[:limit]
    for index, row in enumerate(rows, start=1):
        scene = painter.scene(sets[row], seed, index)
        rng = np.random.default_rng([seed, index, 2])
        for question, answer, group in dict.fromkeys(captions.attribute(scene, rng) for _ in range(each)):
            number += 1
            line = {"id": number, "image": f"{stem}_{index:04d}.webp", "question": question}
            yield json.dumps(line | {"label": answer.lower(), "group": group})


def inventions(scores: Sequence[chair.CaptionScore]) -> dict[str, float]:
    """Where invented objects stand and how they go with what is shown.

    Returns:
        `late`: share of the inventions that stand in the later half of their caption's words; `late_true`: the same of
        true mentions. `rate_first`, `rate_last`: share of mentions that are invented, in the first and the last third.
        `rank6`: share of the inventions that are among the six absent classes which COCO shows most often with those
        on the picture; `lift`: how often they are with them, over the same for all absent classes.
    """
    invented_at: list[float] = []
    true_at: list[float] = []
    is_likely, chance, mean_chance = [], [], []
    for score in scores:
        shown = [CLASSES.index(name) for name in score.truth]
        with_shown = conditional()[shown].mean(0) if shown else np.zeros(len(CLASSES))
        absent = np.setdiff1d(np.arange(len(CLASSES)), shown)
        likeliest = absent[np.argsort(-with_shown[absent])[:6]]
        for mention in score.mentions:
            positions = true_at if mention.node in score.truth else invented_at
            positions.append(mention.start / len(score.caption))
        for mention in score.hallucinated:
            label = CLASSES.index(mention.node)
            is_likely.append(label in likeliest)
            chance.append(with_shown[label])
            mean_chance.append(with_shown[absent].mean())

    def share(positions: Sequence[float], low: float, high: float) -> float:
        return float(np.mean([low <= position < high for position in positions])) if positions else 0.0

    def rate(low: float, high: float) -> float:
        n_invented = len(invented_at) * share(invented_at, low, high)
        n_true = len(true_at) * share(true_at, low, high)
        return n_invented / max(1.0, n_invented + n_true)

    return {
        "late": share(invented_at, 0.5, 1),
        "late_true": share(true_at, 0.5, 1),
        "rate_first": rate(0, 1 / 3),
        "rate_last": rate(2 / 3, 1),
        "rank6": float(np.mean(is_likely)) if is_likely else 0.0,
        "lift": float(np.sum(chance) / np.sum(mean_chance)) if is_likely else 0.0,
    }


@torch.no_grad()
def attention_shares(model: Any, processor: Any, pictures: Sequence[Path], prompt: str) -> dict[str, Any]:
    """Where the last prompt token looks, and how large activations get; means over pictures.

    Returns:
        Per layer: `first`, share of attention on the first token; `image`, on image tokens, and `largest_image`, on the
        image token that gets most. `massive_first`, `massive_image`: the largest |activation| of a layer input over the
        median, on the first token and on image tokens.
    """
    own_implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    sums: dict[str, Any] = dict.fromkeys(("first", "image", "largest_image", "massive_first", "massive_image"), 0.0)
    try:
        for picture in pictures:
            inputs = Asker(model, processor).inputs([(picture, prompt)])
            out = model(**inputs, output_attentions=True, output_hidden_states=True)
            image = inputs["input_ids"][0] == model.config.image_token_id
            rows = torch.stack([weights[0, :, -1].float().mean(0) for weights in out.attentions])  # (layers, keys)
            states = torch.stack(out.hidden_states)[1:-1, 0].float().abs()
            median = states.flatten(1).median(1).values
            sums["first"] += rows[:, 0].numpy()
            sums["image"] += rows[:, image].sum(1).numpy()
            sums["largest_image"] += rows[:, image].amax(1).numpy()
            sums["massive_first"] += float((states[:, 0].amax(1) / median).max())
            sums["massive_image"] += float((states[:, image].amax((1, 2)) / median).max())
    finally:
        model.set_attn_implementation(own_implementation)
    return {key: np.round(np.asarray(value, float) / len(pictures), 3).tolist() for key, value in sums.items()}


def without_image(model: Any, processor: Any, prompt: str) -> dict[str, Any]:
    """What is said where there is no image: a caption, and how many classes are said to be there.

    `frequency` is COCO's mean frequency of those classes over that of the others; None if all answers are the same.
    """

    def answer(question: str, max_new_tokens: int) -> str:
        inputs = processor.tokenizer(f"USER: \n{question} ASSISTANT:", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        sequence = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
        new_tokens = sequence[inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()

    says_yes = np.array([answer(question_text(name), 2).lower().startswith("yes") for name in CLASSES])
    relative_frequency = None
    if 0 < says_yes.sum() < len(says_yes):
        relative_frequency = float(frequency()[says_yes].mean() / frequency()[~says_yes].mean())
    return {"caption": answer(prompt, 100), "yes": int(says_yes.sum()), "frequency": relative_frequency}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m vlmfix.organism.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", default="organism", help="folder of a model, or an embedded one")
    parser.add_argument("--write", type=Path, help="write the sets `test` and `calibration` here, and do nothing else")
    parser.add_argument(
        "--data", default="organism", help="data as for `vlmfix eval` (default: the shipped test scenes)"
    )
    parser.add_argument("--scenes", type=int, default=None, help="only the first N")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    if options.write:
        write_sets(options.write, limit=options.scenes)
        return
    model, processor = vlmfix.load(options.model)
    data = Data.load(options.data, limit=options.scenes)
    benchmarks = [benchmark("chair", "strict"), benchmark("pope")]
    progress = PlainProgress()
    runs = [answer_all(model, processor, (), each, data, options.output, progress=progress) for each in benchmarks]
    out: dict[str, Any] = {}
    for comparison in compare(runs):
        for row in comparison.rows:
            figures = {}
            for column in comparison.benchmark.columns:
                estimate = row.estimates[column]
                bounds = (estimate.value, estimate.low, estimate.high)
                figures[column] = [bound if bound is None else round(bound, 4) for bound in bounds]
            out[f"{comparison.benchmark.name} {row.group}".strip()] = figures
    scores = compare(runs[:1])[0].groups[0][0].scores
    prompt = benchmarks[0].prompt
    out["words"] = np.percentile([score.words for score in scores], [5, 50, 95]).tolist()
    out["inventions"] = inventions(scores)
    out["attention"] = attention_shares(model, processor, list(data.images.values())[:20], prompt)
    out["without_image"] = without_image(model, processor, prompt)
    sys.stdout.write(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
