"""What every test starts from: one thread, fixed seeds, no network, no file outside its own folder."""

from __future__ import annotations

from tests import environment  # first: sets what libraries read when they are imported

# isort: split
import random
import shutil
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import configuration, settings

from tests.guards import global_generators, only_loopback, running, wait_until

PATIENCE_S = 10.0

sys.addaudithook(only_loopback)

# Derandomised: a test fails for everybody or for nobody. No database, and no cache in the checkout.
configuration.set_hypothesis_home_dir(environment.SCRATCH / "hypothesis")
settings.register_profile("fedveil", derandomize=True, database=None, deadline=None)
settings.load_profile("fedveil")


def pytest_unconfigure() -> None:
    shutil.rmtree(environment.SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Give every test one thread and the same global generators, whichever tests ran before it."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def untouched_generators() -> Iterator[None]:
    """Fail a test that moves a global generator: ask for it where a docstring promises that nobody does."""
    before = global_generators()
    yield
    assert global_generators() == before, "a global generator moved; draw from fedml_core.randomness"


@pytest.fixture(scope="session")
def first_seen() -> dict[str, str]:
    """Return, for every leftover of a test file, the file after which it was seen first."""
    return {}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(first_seen: dict[str, str]) -> Iterator[None]:
    """Fail the session if a thread or a process that it started outlives it."""
    before = running()
    yield
    if not wait_until(lambda: not running() - before, PATIENCE_S):
        rows = [f"{item}, first seen after {first_seen.get(item, 'the last test')}" for item in running() - before]
        pytest.fail("tests left something running:\n" + "\n".join(sorted(rows)), pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def note_leftovers(request: pytest.FixtureRequest, first_seen: dict[str, str]) -> Iterator[None]:
    """Write down what runs after each test file, so that a leftover can be traced to its maker."""
    yield
    for item in running():
        first_seen.setdefault(item, request.node.nodeid)
