"""TorchScript with QNNPACK in the guest: PyTorch's aarch64 wheel, the last for CPUs alone that runs on every core.

From 2.11 on PyPI's aarch64 wheels need NVIDIA's libraries. 2.10.0 uses atomics of Armv8.1 at import and ends with SIGILL on Cortex-A53 and
A72 (pytorch/pytorch#176993). 2.9.1 has neither fault, and loads what 2.13 writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deploycc.emulate.session import Programs
from deploycc.emulate.sessions import _python
from deploycc.runtime.bundle import LoadedBundle

TORCH = "2.9.1"
WHEELS = {  # what `import torch` loads besides
    "torch": TORCH,
    "typing-extensions": "4.15.0",
    "filelock": "3.20.0",
    "fsspec": "2025.10.0",
    "jinja2": "3.1.6",
    "markupsafe": "3.0.3",
    "networkx": "3.5",
    "sympy": "1.14.0",
    "mpmath": "1.3.0",
}
NOTE = (
    f"answered by torch {TORCH}: later wheels for aarch64 end with an illegal instruction on Cortex-A53 and A72, or need a GPU's libraries"
)


class TorchScriptGuest:
    """Python, numpy and torch (0.65 GB, fetched once); starting takes about a minute."""

    name: ClassVar[str] = "torchscript"

    def programs(self, bundle: LoadedBundle, work: Path, trusted: bool = False) -> Programs:
        """In the version that runs on every core."""
        return _python.programs(bundle, work, trusted, WHEELS, (NOTE,))
