"""Runtimes that runner.pyz uses from Python: wheels of the guest's architecture on its path, and nothing of this machine's."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from deploycc.emulate import root
from deploycc.emulate.session import Programs
from deploycc.package._wheels import site_packages
from deploycc.package.bundle import RUNNER, write_runner
from deploycc.runtime.bundle import LoadedBundle, listed

ARCH = "aarch64"
PROBE = Path(__file__).parent.parent / "probe.py"


def programs(bundle: LoadedBundle, work: Path, wheels: Mapping[str, str], notes: tuple[str, ...] = ()) -> Programs:
    """The bundle's runner.pyz (this version's where the bundle has none) with these packages, each in this version."""
    python, version = root.python(), root.python_version()
    folders = [site_packages(package, wanted, ARCH, version) for package, wanted in wheels.items()]
    runner = bundle.folder / RUNNER
    if not any(entry["path"] == RUNNER for entry in listed(bundle.manifest)):
        write_runner(runner := work / RUNNER)
    shown = [f"{package} {wanted}" for package, wanted in wheels.items() if package in (*_shown(bundle), "numpy")]
    return Programs(
        selftest=(python, "-s", str(runner.resolve())),
        probe=(python, "-s", str(PROBE), str(runner.resolve())),
        runtime=", ".join([*shown, f"Python {version}"]),
        environment={"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONHASHSEED": "0"},
        notes=notes,
    )


def _shown(bundle: LoadedBundle) -> tuple[str, ...]:
    return (bundle.manifest["runtime"]["package"],)


def here(package: str) -> str:
    """The version of a package on this machine: deploycc's own dependencies are always here."""
    return importlib.metadata.version(package)
