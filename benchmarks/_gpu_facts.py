"""What the GPU and everything around it are: nvidia-smi's answers, PyTorch's, versions. What is not known is absent, never zero."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from deploycc.runtime import cuda

Ask = Callable[[Sequence[str]], "str | None"]

FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "memory_mib": "memory.total",
    "memory_used_mib": "memory.used",
    "utilization_percent": "utilization.gpu",
    "persistence": "persistence_mode",
    "mig": "mig.mode.current",
    "throttled": "clocks_event_reasons.active",
}
TEXTS = ("name", "driver", "persistence", "mig", "throttled")
UNKNOWN = ("", "[n/a]", "n/a", "[not supported]", "[unknown error]", "unknown error", "[insufficient permissions]")
PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13"),
    *("tensorrt-cu12", "tensorrt-rtx", "nvidia-cudnn-cu13", "nvidia-cublas"),
)
POWER = ("power.draw.instant", "power.draw")  # the second is a mean over a second on some GPUs
POWER_EVERY_S = 0.05
SMI = "nvidia-smi"
SECONDS = 20


def missing() -> str | None:
    """Why nothing can be measured here, and what to do; None where there is a GPU that PyTorch sees."""
    import torch

    found = cuda.gpu()
    if found is None:
        return (
            "there is no NVIDIA GPU with a working driver here (libcuda does not load, or sees no device). Run this on a machine that has "
            "one: `nvidia-smi` lists it; in a container start it with `--gpus all`."
        )
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        return (
            f"there is a {found.name} (driver {found.driver}), but PyTorch {torch.__version__} does not see it: it {built}. "
            "Install the build for the driver's CUDA: https://pytorch.org/get-started/locally/"
        )
    return None


def ask(command: Sequence[str]) -> str | None:
    """What a command prints; None where it is not there, fails or does not end."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def smi(asked: Ask = ask) -> dict[str, Any]:
    """nvidia-smi's facts of the first GPU; fields that it does not know are left out, one by one where it refuses them all."""
    answers = _query(list(FIELDS.values()), asked) or [answer for field in FIELDS.values() for answer in _query([field], asked) or [""]]
    facts: dict[str, Any] = {}
    for name, text in zip(FIELDS, answers, strict=True):
        value = text if name in TEXTS else number(text)
        if value is not None and text.strip().lower() not in UNKNOWN:
            facts[name] = value
    return facts


def _query(fields: Sequence[str], asked: Ask) -> list[str] | None:
    """One text for each field of the first GPU; None where nvidia-smi gives something else."""
    text = asked([SMI, "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    cells = [cell.strip() for cell in (text or "").strip().split("\n")[0].split(",")]
    return cells if text and len(cells) == len(fields) else None


def number(text: str) -> float | None:
    """Of a cell; None for one that is no number: "[N/A]"."""
    try:
        return float(text)
    except ValueError:
        return None


def others(asked: Ask = ask, own: int | None = None) -> dict[str, Any] | None:
    """How many other processes hold the GPU, and with how much memory; None where that cannot be seen."""
    text = asked([SMI, "--id=0", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"])
    if text is None:
        return None
    rows = [line.split(",") for line in text.strip().splitlines() if line.count(",") == 1]
    strangers = [number(used.strip()) for pid, used in rows if pid.strip() != str(os.getpid() if own is None else own)]
    facts: dict[str, Any] = {"processes": len(strangers)}
    known = [used for used in strangers if used is not None]
    return facts | ({"memory_mib": sum(known)} if known else {})


def facts(asked: Ask = ask) -> dict[str, Any]:
    """Everything that decides what is measured."""
    import torch

    found: dict[str, Any] = smi(asked)
    if torch.cuda.is_available():
        device: Any = torch.cuda.get_device_properties(0)
        found |= {"name": device.name, "sm": f"{device.major}.{device.minor}", "multiprocessors": device.multi_processor_count}
        found |= {"l2_mib": device.L2_cache_size / 2**20, "memory_mib": device.total_memory / 2**20}
        found["gpus"] = torch.cuda.device_count()
        found["cudnn"] = torch.backends.cudnn.version()
    seen = cuda.gpu()
    if seen is not None:
        found = {"name": seen.name, "sm": seen.capability, "driver": seen.driver} | found
    found |= {"cuda": torch.version.cuda, "versions": versions()}
    strangers = others(asked)
    return {name: value for name, value in {**found, "others": strangers}.items() if value is not None}


def versions() -> dict[str, str]:
    """Of the packages that run networks, those that are installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Power:
    """Mean watts while it is open, read again and again in a thread; `watts` is None where nothing was read.

    Each reading is an nvidia-smi of its own: what a looping one has printed into a pipe may be lost when it is ended.
    """

    def __init__(self, read: Callable[[], float | None] | None = None) -> None:
        self._read = read or reading()
        self._over = threading.Event()
        self._found: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.watts: float | None = None

    def _watch(self) -> None:
        while self._read is not None and not self._over.is_set():
            value = self._read()
            if value is not None and value > 0:
                self._found.append(value)
            self._over.wait(POWER_EVERY_S)

    def __enter__(self) -> Power:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        # A reading that is under way began before the end, and still counts.
        self._over.set()
        self._thread.join()
        self.watts = steady(self._found)


def reading(asked: Ask = ask) -> Callable[[], float | None] | None:
    """What reads the watts once; None where nvidia-smi knows none."""

    def read(field: str) -> float | None:
        answer = _query([field], asked)
        return number(answer[0]) if answer else None

    return next((partial(read, field) for field in POWER if read(field) is not None), None)


def steady(readings: Sequence[float]) -> float | None:
    """Mean of the later half: before, the GPU was still on its way to its steady state. None without readings."""
    return fmean(readings[len(readings) // 2 :]) if readings else None
