"""Settings of the whole test run."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)
