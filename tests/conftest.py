"""No test looks for a hub, whose look-ups would wait for a network; every test starts from the same random state."""

import gc
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests.tiers import SLOW

TESTS = Path(__file__).parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Property tests draw the same examples on every machine, and no clock decides them. `make explore` draws fresh ones.
_CLOCKLESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_CLOCKLESS)
settings.register_profile("explore", derandomize=False, max_examples=2000, print_blob=True, **_CLOCKLESS)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, for its fixtures, except those marked as spread; mark those of slow files."""
    for item in items:
        if str(item.path.relative_to(TESTS).with_suffix("")) in SLOW:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("spread") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_collection_finish() -> None:
    """Leave what is loaded by now, libraries and tests, out of every later collection: walking it takes 0.5 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start every test from the same random state, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
