"""ONNX Runtime in the guest, in the version that the bundle was built and tested with."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deploycc.emulate.session import Programs
from deploycc.emulate.sessions import _python
from deploycc.runtime.bundle import LoadedBundle


class OnnxRuntimeGuest:
    """Python, numpy and onnxruntime; it imports none of its other dependencies."""

    name: ClassVar[str] = "onnxruntime"

    def programs(self, bundle: LoadedBundle, work: Path, trusted: bool = False) -> Programs:
        """In the bundle's version."""
        return _python.programs(bundle, work, trusted, {"onnxruntime": bundle.manifest["runtime"]["version"]})
