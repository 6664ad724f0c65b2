"""A method of one's own in one file: written, wrapped around a model, and checked.

    python examples/own_method.py

`Louder` multiplies the attention that image tokens get. On the command line a method in a file of yours is named by
module and class: vlmfix ask PICTURE "What is this?" --method own_method:Louder
"""

from dataclasses import dataclass
from importlib.resources import files

import vlmfix

SCENE = str(files("vlmfix.assets") / "organism" / "test" / "images" / "test_0023.webp")
QUESTION = "Describe this image in detail."


@dataclass(frozen=True)
class Louder(vlmfix.Intervention):
    """Attention weights of the rows that predict the next token."""

    gain: float = 2.0
    """What the attention to each image token is multiplied by, before the row is made to sum to 1 again."""

    def weights(self, a, site):
        """`a` is (batch, heads, rows, keys), after the softmax; the masks of `site` say which key is what."""
        image = site.geometry.image[:, None, None]  # (batch, 1, 1, keys)
        louder = a.where(~image, self.gain * a)
        louder = louder / louder.sum(-1, keepdim=True)
        seen = (a * image).sum(-1).mean(), (louder * image).sum(-1).mean()
        site.memo["seen"] = [share.item() for share in seen]  # memo is the state of one generation
        return louder

    def effects(self, memo):
        """What `vlmfix.effects` tells of each sample."""
        return [{"acted": True, "image_share": memo["seen"]}]


def main() -> None:
    """Print what the method changes, and that it comes off without a trace."""
    model, processor = vlmfix.load("organism")
    before = vlmfix.ask(model, processor, SCENE, QUESTION)
    for gain in (1.0, 1.2, 2.0):
        with Louder(gain)(model):
            answer = vlmfix.ask(model, processor, SCENE, QUESTION)
            (louder,) = vlmfix.effects(model)
        plain, edited = louder["samples"][0]["image_share"]
        print(f"gain {gain:g}: attention to the image {plain:.2f} -> {edited:.2f}: {answer.text}")
    after = vlmfix.ask(model, processor, SCENE, QUESTION)
    print(f"taken off, the same answer as before: {after.token_ids == before.token_ids}")


if __name__ == "__main__":
    main()
