"""runner.pyz: Python's standard library, numpy and the bundle's runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

from deploycc.package.bundle import RUNNER, write_runner
from deploycc.package.distributions import closure
from deploycc.package.runner import Component, RunnerParts
from deploycc.runtime.bundle import LoadedBundle, listed

PYTHON = "3.11"  # requires-python of pyproject.toml


class PythonRunner:
    """The bundle's own runner.pyz, as it was compiled; the device needs Python, numpy and the runtime, and Pillow for pictures."""

    name: ClassVar[str] = "python"

    def add(self, bundle: LoadedBundle, folder: Path, arch: str) -> RunnerParts:
        """Copies it; a bundle that was packed without it gets this version's."""
        if any(entry["path"] == RUNNER for entry in listed(bundle.manifest)):
            shutil.copyfile(bundle.folder / RUNNER, folder / RUNNER)
        else:
            write_runner(folder / RUNNER)
        roots = self.requirements(bundle)
        needs, notes = closure(roots, arch)
        python = Component("python", kind="platform", facts=(("minimum", PYTHON),))
        return RunnerParts((RUNNER,), (python, *needs), uses=("python", *sorted(roots)), notes=notes)

    def requirements(self, bundle: LoadedBundle) -> dict[str, str]:
        """Packages that runner.pyz imports for this bundle: the runtime in the version that was tested, others as they are here."""
        runtime = bundle.manifest["runtime"]
        roots = {"numpy": "", runtime["package"]: runtime.get("version") or ""}
        return roots | ({"pillow": ""} if bundle.transform else {})
