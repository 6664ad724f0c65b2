"""Settings of the whole test run."""

import gc
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network; set before transformers is imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores

_MODES = []


def _set_inference_mode(on):
    mode = torch.inference_mode(on)
    mode.__enter__()
    _MODES.append(mode)  # it ends with the object


STATE = {
    "inference mode": (torch.is_inference_mode_enabled, _set_inference_mode),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}
"""What torch keeps for the whole thread or process, and how it is read and set; inference mode sets gradients, too."""


@pytest.fixture(autouse=True)
def _as_found():
    """The same random numbers in every test, whatever ran before it; and what a test changes in torch for all tests
    after it fails that test, and is put back."""
    torch.manual_seed(0)
    before = {name: read() for name, (read, _) in STATE.items()}
    yield
    after = {name: read() for name, (read, _) in STATE.items()}
    for name, (read, put) in STATE.items():
        if read() != before[name]:
            put(before[name])
    left = [f"{name} {after[name]} instead of {before[name]}" for name in STATE if after[name] != before[name]]
    if left:
        hint = "put it back, and hold no such mode where a generator yields"
        pytest.fail(f"the test left torch with {', '.join(left)}; {hint}", pytrace=False)


@pytest.fixture(scope="module")
def organism():
    """The embedded model and its processor."""
    import vlmfix

    return vlmfix.load("organism")


@pytest.fixture
def unwrapped(organism):
    """The embedded model comes out of a test as it came in."""
    yield
    import vlmfix

    vlmfix.unwrap(organism[0])


def pytest_addoption(parser):
    parser.addoption(
        "--all-models",
        action="store_true",
        help="run the contract over every model type, and each method on every family",
    )
    parser.addoption("--screenshots", action="store_true", help="take the demo's pictures, into build/demo")
    parser.addoption("--method", help="run only the tests that are parametrised by this method")


def pytest_collection_modifyitems(config, items):
    method = config.getoption("--method")
    if method is not None:
        chosen = [item for item in items if "callspec" in vars(item) and item.callspec.params.get("method") == method]
        if not chosen:
            raise pytest.UsageError(f"no test is parametrised by the method {method!r}")
        items[:] = chosen
    elif not config.getoption("--all-models") and not any("::" in argument for argument in config.args):
        kept = families_in_turn(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def families_in_turn(items):
    """Of the contract's tests for each method on each of several families, one family a method, the next for the next
    method: a run by default. `--all-models` runs all of them, and so does a test that is named."""
    families, methods, kept = {}, {}, set()
    for item in items:
        params = item.callspec.params if "contract" in item.path.parts and hasattr(item, "callspec") else {}
        method = next((params[key] for key in ("method", "name", "stage") if key in params), None)
        family = next((params[key] for key in ("architecture", "model_type", "family") if key in params), None)
        if method is None or family is None:
            kept.add(item)
            continue
        test = item.path, item.originalname
        of_test = families.setdefault(test, {})
        number = methods.setdefault(test, {}).setdefault(str(method), len(methods[test]))
        of_test.setdefault(number, {}).setdefault(str(family), []).append(item)
    for by_method in families.values():
        for number, by_family in by_method.items():
            kept.update(list(by_family.values())[number % len(by_family)])
    return kept


def pytest_generate_tests(metafunc):
    if "model_type" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_zoo"):
        from tests import zoo

        types = zoo.SUPPORTED if metafunc.config.getoption("--all-models") else zoo.SLICE
        marked = [pytest.param(t, marks=pytest.mark.xdist_group(t)) for t in types]
        metafunc.parametrize("model_type", marked, scope="module")


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
