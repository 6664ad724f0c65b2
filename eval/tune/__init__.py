"""Choosing heads and settings on pictures that no result is reported on.

Tools give every attention head a score (`vlmfix heads`, `registry.py`):

| tool | question |
|---|---|
| `vhd` | whose output changes most when the image is taken away? |
| `ablate` | which head, switched off, changes what the model says next? |
| `subspace` | which head, switched off, turns the last hidden states of many prompts most? |
| `visual` | which head looks at the object that the model is about to name? |
| `separate` | whose lookback ratio tells true object words from invented ones? |
| `gains` | how loud should each head be, by the gradients of the model's own captions? |
| `random` | none: the control of the others |

Calibrations choose the settings of one method (`vlmfix calibrate`): `act` its heads, `zerotuning` its heads and gamma,
`lookback` its detector of invented words. None of them mends anything; methods read the files that they write.
"""
