"""Runtimes that runner.pyz uses from Python: wheels of the guest's architecture on its path, and nothing of this machine's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deploycc.emulate import root
from deploycc.emulate.session import Programs, runner_of
from deploycc.package._wheels import site_packages
from deploycc.package.bundle import RUNNER, write_runner
from deploycc.runtime.bundle import LoadedBundle

ARCH = "aarch64"
NUMPY = "2.4.6"  # has aarch64 wheels for Python 3.11 to 3.14
PROBE = Path(__file__).parent.parent / "probe.py"


def programs(bundle: LoadedBundle, work: Path, trusted: bool, wheels: Mapping[str, str], notes: tuple[str, ...] = ()) -> Programs:
    """With runner.pyz, numpy and these packages, each in this version."""
    python, version = root.python(), root.python_version()
    folders = [site_packages(package, wanted, ARCH, version) for package, wanted in (*wheels.items(), ("numpy", NUMPY))]
    write_runner(ours := work / RUNNER)
    runner, told = runner_of(bundle, RUNNER, ours, trusted)
    package = bundle.manifest["runtime"]["package"]
    return Programs(
        selftest=(python, "-s", str(runner)),
        probe=(python, "-s", str(PROBE), str(runner)),
        runtime=f"{package} {wheels[package]}, numpy {NUMPY}, Python {version}",
        environment={"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONHASHSEED": "0"},
        notes=(*told, *notes),
    )
