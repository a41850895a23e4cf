"""What pytest gives to every test."""

import pytest
import torch as th
from helpers import VALUE_BASED

# The networks of the tests are tiny: more threads only wait for each other
th.set_num_threads(1)


@pytest.fixture(params=VALUE_BASED.values(), ids=VALUE_BASED)
def algorithm(request):
    """Each value-based algorithm of the package."""
    return request.param


@pytest.fixture
def float64():
    """Networks that are built in float64; for observations too, see ``helpers.Float64Extractor``."""
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)
