from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

from deploycc.passes import _memory

FREED_BETWEEN = """
import ctypes, json
import numpy as np
from deploycc.passes import _memory
from deploycc.runtime import host

ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: what has megabytes lies on the heap, as after a large free
pairs = [(np.ones(1 << 20, np.uint8), np.ones(1 << 16, np.uint8)) for _ in range(200)]
small = [pair[1] for pair in pairs]
del pairs
before = host.rss_bytes()
_memory.give_back()
print(json.dumps({"given": before - host.rss_bytes(), "whole": all(bool(item.all()) for item in small)}))
"""


def test_freed_memory_between_living_things_goes_back():
    if _memory._trim() is None:
        pytest.skip("the C library is not glibc")
    found = json.loads(subprocess.run([sys.executable, "-c", FREED_BETWEEN], capture_output=True, text=True, check=True).stdout)
    assert found["given"] > 150 << 20
    assert found["whole"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    _memory._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    try:
        _memory.give_back()
        assert _memory._trim() is None
    finally:
        _memory._trim.cache_clear()
