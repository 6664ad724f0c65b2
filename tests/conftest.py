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


def pytest_addoption(parser):
    parser.addoption("--all-models", action="store_true", help="run the contract over every model type")


def pytest_generate_tests(metafunc):
    if "model_type" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_zoo"):
        from tests import zoo

        types = zoo.SUPPORTED if metafunc.config.getoption("--all-models") else zoo.SLICE
        marked = [pytest.param(t, marks=pytest.mark.xdist_group(t)) for t in types]
        metafunc.parametrize("model_type", marked, scope="module")
