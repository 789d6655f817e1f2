"""runner.pyz: Python's standard library, numpy and the bundle's runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

from deploycc.package.bundle import RUNNER, write_runner
from deploycc.package.runner import RunnerParts
from deploycc.runtime.bundle import LoadedBundle, listed


class PythonRunner:
    """The bundle's own runner.pyz, as it was compiled; the device needs Python, numpy and the runtime, and Pillow for pictures."""

    name: ClassVar[str] = "python"

    def add(self, bundle: LoadedBundle, folder: Path) -> RunnerParts:
        """Copies it; a bundle that was packed without it gets this version's."""
        if any(entry["path"] == RUNNER for entry in listed(bundle.manifest)):
            shutil.copyfile(bundle.folder / RUNNER, folder / RUNNER)
        else:
            write_runner(folder / RUNNER)
        return RunnerParts((RUNNER,))
