"""NVIDIA's driver through ctypes: which GPU is here, and memory and a stream on it. Standard library and numpy only.

Functions are those of the CUDA Driver API (libcuda), which every driver brings, desktop or Jetson; TensorRT's own context is the device's
primary one, which is retained here and made current.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import BundleError, MismatchError

LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU.

    Attributes:
        name: "NVIDIA H100 80GB HBM3".
        capability: compute capability, "9.0".
        driver: version of the driver, or of the CUDA that it knows where it does not say.
    """

    name: str
    capability: str
    driver: str


def capability_numbers(text: str) -> tuple[int, int]:
    """For comparing: "8.9" → (8, 9)."""
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def library() -> Any:
    """The driver's library, initialized; None where there is no NVIDIA GPU with a working driver."""
    for name in LIBRARIES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if found.cuInit(0) == 0 and found.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return found
    return None


@cache
def gpu() -> Gpu | None:
    """What is here, or None."""
    driver = library()
    return None if driver is None else describe(driver)


def describe(driver: Any, version: Path = DRIVER) -> Gpu:
    """Of the first device."""
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(NAME_BYTES)
    numbers = [ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)]
    _done(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _done(driver.cuDeviceGetName(name, NAME_BYTES, device), "cuDeviceGetName")
    for attribute, number in zip((MAJOR, MINOR), numbers, strict=False):
        _done(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "cuDeviceGetAttribute")
    _done(driver.cuDriverGetVersion(ctypes.byref(numbers[2])), "cuDriverGetVersion")
    return Gpu(name.value.decode(), f"{numbers[0].value}.{numbers[1].value}", _version(version) or f"CUDA {numbers[2].value}")


def _version(path: Path) -> str | None:
    """The kernel module's: "580.159"."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def lacks(least: str, found: Gpu | None) -> str | None:
    """Why a GPU is not one of compute capability `least` or higher, or None."""
    if found is None:
        return f"it is for an NVIDIA GPU (compute capability {least} or higher), and this machine has none"
    if capability_numbers(found.capability) < capability_numbers(least):
        return f"it is for compute capability {least} or higher, this GPU ({found.name}) has {found.capability}"
    return None


def _done(status: int, what: str) -> None:
    if status:
        raise BundleError(
            f"{what} failed with CUDA error {status}", fix="check the GPU with nvidia-smi (or tegrastats), and its free memory"
        )


class Device:
    """Memory and a stream of the first GPU; a context manager."""

    def __init__(self, driver: Any = None) -> None:
        self._driver = library() if driver is None else driver
        if self._driver is None:
            raise MismatchError("there is no NVIDIA GPU with a working driver here", fix="run the bundle on its device")
        self._number, self._context, self._stream = ctypes.c_int(0), ctypes.c_void_p(), ctypes.c_void_p()
        self._buffers: dict[str, tuple[ctypes.c_uint64, int]] = {}
        self._call("cuDeviceGet", ctypes.byref(self._number), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._number)
        self.activate()
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)

    def activate(self) -> None:
        """Make its context that of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def stream(self) -> int:
        """Its handle."""
        return self._stream.value or 0

    def buffer(self, name: str, size: int) -> int:
        """Address of a buffer of at least `size` bytes, kept under a name."""
        held = self._buffers.get(name)
        if held is not None and held[1] >= size:
            return held[0].value
        self._free(name)
        address = ctypes.c_uint64(0)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        self._buffers[name] = (address, max(1, size))
        return address.value

    def send(self, address: int, array: np.ndarray) -> None:
        """Queue a copy to the GPU; `array` is contiguous and stays until `wait`."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes), self._stream)

    def receive(self, array: np.ndarray, address: int) -> None:
        """Queue a copy from the GPU."""
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._stream)

    def wait(self) -> None:
        """Until everything that was queued is finished."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Give everything back; twice is once."""
        if self._context.value is None:
            return
        for name in list(self._buffers):
            self._free(name)
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._number)
        self._context = ctypes.c_void_p()

    def _free(self, name: str) -> None:
        held = self._buffers.pop(name, None)
        if held is not None:
            self._call("cuMemFree_v2", held[0])

    def _call(self, name: str, *arguments: Any) -> None:
        _done(getattr(self._driver, name)(*arguments), name)
