"""A device and a network for the tests of gpu.py."""

import pytest
from gpu_fakes import Stamp, capture, prepared


@pytest.fixture
def gpu(script):
    return script("_gpu_clock").Gpu("cpu", Stamp, lambda: None, capture, lambda: 5)


@pytest.fixture(scope="module")
def tiny(script, tmp_path_factory):
    return prepared(script, tmp_path_factory.mktemp("gpu"))
