"""The driver through ctypes, on a stand-in."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from fake_tensorrt import Driver

from deploycc.errors import BundleError, MismatchError
from deploycc.runtime import cuda


def test_the_library_is_used_only_with_a_gpu(monkeypatch):
    drivers = {"libcuda.so.1": Driver(devices=0), "libcuda.so": Driver()}

    def load(name):
        if name not in drivers:
            raise OSError(name)
        return drivers[name]

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cuda.library() is drivers["libcuda.so"]
    drivers.clear()
    assert cuda.library() is None


def test_what_the_gpu_is(tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build")
    assert cuda.describe(Driver(), version) == cuda.Gpu("A GPU", "8.9", "580.159.03")
    assert cuda.describe(Driver(), tmp_path / "none").driver == "CUDA 13000"
    version.write_text("nothing")
    assert cuda.describe(Driver(), version).driver == "CUDA 13000"
    monkeypatch.setattr(cuda, "library", lambda: None)
    cuda.gpu.cache_clear()
    assert cuda.gpu() is None
    monkeypatch.setattr(cuda, "library", Driver)
    cuda.gpu.cache_clear()
    assert cuda.gpu().capability == "8.9"
    cuda.gpu.cache_clear()


def test_capabilities_are_compared_as_numbers():
    gpu = cuda.Gpu("A GPU", "8.9", "580")
    assert cuda.lacks("8.9", gpu) is None
    assert cuda.lacks("10.0", gpu) == "it is for compute capability 10.0 or higher, this GPU (A GPU) has 8.9"
    assert "this machine has none" in (cuda.lacks("5.0", None) or "")


def test_memory_there_and_back():
    device = cuda.Device(Driver())
    array = np.arange(5.0)
    address = device.buffer("a", array.nbytes)
    assert device.buffer("a", 8) == address
    device.send(address, array)
    back = np.zeros(5)
    device.receive(back, address)
    device.wait()
    assert back.tolist() == array.tolist()
    assert device.stream == 9
    device.close()
    device.close()


def test_an_error_of_the_driver_has_its_name():
    driver = Driver()
    driver.fails = "cuMemAlloc_v2"
    with pytest.raises(BundleError, match="cuMemAlloc_v2 failed with CUDA error 2"):
        cuda.Device(driver).buffer("a", 8)


def test_a_device_needs_a_driver(monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: None)
    with pytest.raises(MismatchError, match="no NVIDIA GPU"):
        cuda.Device()


def test_looking_for_a_gpu_imports_nothing_heavy():
    code = "import sys; from deploycc.runtime import cuda; cuda.gpu(); assert not {'torch', 'onnx', 'tensorrt'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
