"""What every test runs under: no network, an empty hub cache, one thread, the same seed."""

import gc
import os
import random
import tempfile

# Before torch and the hub's client are imported: both read their settings once, at import.
_hub = tempfile.TemporaryDirectory(prefix="inarch-tests-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _hub.name,  # a test that passes because of a model in the developer's own cache would fail elsewhere
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizers' threads do not survive a fork
}

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, and no deadline: a busy machine is not a bug.
settings.register_profile("inarch", deadline=None, derandomize=True, database=None)
settings.load_profile("inarch")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state and may ask for the seed."""
    value = 0
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  libraries under test use the global generator
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def little_garbage():
    """The trainer collects garbage at every start, which takes longer than little trainings."""
    gc.freeze()
    yield
    gc.unfreeze()
