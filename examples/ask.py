"""Ask a model about a picture: untouched, and under a method; then see what the method did.

    python examples/ask.py [PICTURE [QUESTION]]

The embedded model needs no download. For another, give `load` a Hub id: "llava-hf/llava-1.5-7b-hf".
"""

import sys
from importlib.resources import files

import vlmfix

SCENE = files("vlmfix.assets") / "organism" / "test" / "images" / "test_0023.webp"


def main(picture: str = str(SCENE), question: str = "Describe this image in detail.") -> None:
    """Print both answers, and what the method did."""
    model, processor = vlmfix.load("organism")
    untouched = vlmfix.ask(model, processor, picture, question)
    print(f"untouched: {untouched.text}")

    vlmfix.wrap(model, "vhr", processor)  # in place: `generate` and pipelines see it, too
    answer = vlmfix.ask(model, processor, picture, question)
    print(f"with VHR:  {answer.text}")
    (vhr,) = vlmfix.effects(model)  # one entry for each method in force
    for layer, facts in vhr["samples"][0]["layers"].items():
        print(f"    layer {layer}: heads {facts['heads']} amplified")

    vlmfix.unwrap(model)  # the model is as it was
    again = vlmfix.ask(model, processor, picture, question)
    print(f"unwrapped, the same answer as before: {again.token_ids == untouched.token_ids}")


if __name__ == "__main__":
    main(*sys.argv[1:])
