"""A device's measurement as the file that `deploycc bench --save` writes (schema version 3), so that `deploycc compare` reads it.

Raw samples, and the facts of the machine that decide whether two results can be compared. Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploycc.errors import UsageError
from deploycc.runtime import cuda
from deploycc.runtime.machine import available_cores, cpu_arch, cpu_flags, cpu_model
from deploycc.runtime.measure import Stop
from deploycc.runtime.statistics import Samples

SCHEMA_VERSION = 3
# The extensions that decide which kernels a runtime picks, and the libraries that run models.
ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "fphp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
LIBRARIES = ("numpy", "torch", "torchvision", "onnx", "onnx-ir", "onnxruntime", "openvino", "executorch", "tensorrt")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def environment(threads: int) -> dict[str, Any]:
    """Where a session with `threads` threads runs: bench.environment.Environment's fields that were in version 1 of a result."""
    flags = cpu_flags()
    gpu = cuda.gpu()
    return {
        "cpu_model": cpu_model(),
        "arch": cpu_arch(),
        "isa": [flag for flag in ISA if flag in flags],
        "cores": available_cores(),
        "cpu_limit": cpu_limit(CPU_MAX),
        "governor": text(GOVERNOR),
        "virtual": "hypervisor" in flags if flags else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": dict(_versions()),
        "threads": threads,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": f"{gpu.name}, driver {gpu.driver}" if gpu else None,
    }


def document(
    name: str,
    samples: Samples,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    stop: Stop,
    open_ms: float,
    first_ms: float,
    rss_growth_mb: float | None,
) -> dict[str, Any]:
    """One candidate's result; the arguments are bench.result.Measurement's and core.target.Bench's fields."""
    measurement = {
        "name": name,
        "samples_ns": samples.ns.tolist(),
        "per_round": samples.per_round,
        "warmups": samples.warmups,
        "openings": list(samples.openings),
        "open_ms": open_ms,
        "first_ms": first_ms,
        "rss_growth_mb": rss_growth_mb,
        "inputs": {key: [str(array.dtype), list(array.shape)] for key, array in feeds.items()},
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "measurements": [measurement],
        "baseline": None,
        "environment": environment(threads),
        "settings": {"threads": threads, **asdict(stop)},
        "clock": "wall",
        "seed": 0,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write the document. Raises UsageError."""
    try:
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", fix="give --save a file in a writable folder") from error


def cpu_limit(path: Path) -> float | None:
    """CPUs granted by a cgroup v2 `cpu.max` ("QUOTA PERIOD" in µs, or "max PERIOD"), or by the two files of version 1 beside it."""
    found = text(path) or f"{text(path.parent / 'cpu' / 'cpu.cfs_quota_us')} {text(path.parent / 'cpu' / 'cpu.cfs_period_us')}"
    try:
        quota, period = (int(part) for part in found.split())
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None  # version 1 says -1 for none


def text(path: Path) -> str | None:
    """What a small file of the kernel says; None where there is none, or nothing in it."""
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _versions() -> Iterator[tuple[str, str]]:
    for package in LIBRARIES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
