"""PyTorch with QNNPACK, its integer engine for ARM (and, slower, for x86)."""

from __future__ import annotations

from typing import ClassVar

from deploycc.backends._torchscript import TorchScriptBackend


class Qnnpack(TorchScriptBackend):
    """PyTorch, QNNPACK engine: TorchScript on ARM CPUs."""

    name: ClassVar[str] = "qnnpack"
