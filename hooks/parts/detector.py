"""A detector of words that were not looked up: logistic regression on lookback ratios, kept as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Detector:
    """P(grounded) = sigmoid(w . v + b), where v is the mean of R over the tokens of a word. A JSON file."""

    model: str
    """Name of the model that it was fitted on; it fits no other."""
    preset: str
    agg: str
    exclude_sinks: bool
    layers: int
    heads: int
    """L and H; w has L*H entries, that of head h in layer l at l*H + h."""
    w: tuple[float, ...]
    b: float
    threshold: float
    """P below which words of the calibration pictures are best called invented (Youden's index)."""
    n_images: int
    """Pictures that it was fitted on."""
    ids: tuple[str, ...]
    """The `picture_id` of each: no result may be reported on these."""
    auroc: dict[str, Any]
    """On held-out pictures: figures with 95 % intervals, with what they are compared to."""

    @classmethod
    def read(cls, path: str | Path) -> Detector:
        """From its file. `ValueError` if there is none or it is something else."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            return cls(**{**data, "w": tuple(map(float, data["w"])), "ids": tuple(data["ids"])})
        except OSError as error:
            raise ValueError(
                f"detector {path} cannot be read ({error.strerror}); see vlmfix calibrate lookback"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"{path} is no detector: expected a JSON object with {names}") from error

    def write(self, path: str | Path) -> None:
        """To a file. `ValueError` if that cannot be."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(asdict(self)) + "\n", "utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error

    def check(self, file: str, here: dict[str, Any]) -> None:
        """`ValueError` if it was fitted on something other than what is `here`: values of some of its fields."""
        apart = [key for key in here if getattr(self, key) != here[key]]
        if apart:
            theirs = ", ".join(f"{key} {getattr(self, key)}" for key in apart)
            ours = ", ".join(f"{key} {here[key]}" for key in apart)
            raise ValueError(f"detector {file} was fitted on {theirs}; here: {ours}. Calibrate it anew")
        n_heads = self.layers * self.heads
        if len(self.w) != n_heads:
            raise ValueError(f"detector {file} has {len(self.w)} weights, expected {n_heads}")

    def score(self, r: Tensor) -> Tensor:
        """P(grounded) of spans of tokens: r (..., T, L, H) gives (...)."""
        return (features(r) @ r.new_tensor(self.w) + self.b).sigmoid()


def features(r: Tensor) -> Tensor:
    """Means over the tokens of spans: r (..., T, L, H) gives (..., L*H). Heads that a layer does not have count 0;
    all are NaN where there was nothing to compare."""
    v = r.nanmean(-3).flatten(-2)
    return v.where(v.isnan().all(-1, keepdim=True), v.nan_to_num(0.0))
