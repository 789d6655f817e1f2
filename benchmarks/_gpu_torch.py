"""The PyTorch rows: float32 with TF32 off and on, float16, bfloat16, torch.compile; each by itself and as a CUDA graph.

All take and give float32, as the engines do. But in plain float32, convolutions get channels-last tensors, which tensor cores want.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from _gpu_clock import Arrays, Gpu, GpuSession, GraphSession, Tensors, arrays, tensors
from _gpu_models import Net
from _gpu_peaks import set_precision
from _gpu_rows import Way

BY = "PyTorch"
GRAPH = "CUDA graph"
EAGER = ("fp32", "tf32", "fp16", "bf16")
COMPILED = ("fp16",)
LEAST_BF16 = (8, 0)


class TorchSession:
    """A copy of a module on the GPU, in one precision."""

    def __init__(self, module: Any, outputs: Sequence[str], kind: str, gpu: Gpu, *, compiled: bool = False) -> None:
        import torch

        self._gpu, self._kind, self._outputs = gpu, kind, tuple(outputs)
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
        self._layout = torch.contiguous_format if kind == "fp32" else torch.channels_last
        moved = copy.deepcopy(module).eval().to(gpu.device, self._dtype)
        for parameter in moved.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._layout)
        self._module: Any = torch.compile(moved, dynamic=False) if compiled else moved

    def run(self, feeds: Tensors) -> dict[str, Any]:
        """Queue one call; float32 outputs by name, on the GPU."""
        import torch

        set_precision(self._kind)
        with torch.inference_mode():
            given = self._module(*(self._cast(tensor) for tensor in feeds.values()))
            values = given if isinstance(given, tuple | list) else (given,)
            return {name: value.float() for name, value in zip(self._outputs, values, strict=True)}

    def _cast(self, tensor: Any) -> Any:
        cast = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        return cast.contiguous(memory_format=self._layout) if cast.ndim == 4 else cast

    def answer(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """One call, from and to the CPU."""
        given = self.run(tensors([feeds], self._gpu.device)[0])
        self._gpu.synchronize()
        return arrays(given)

    def synchronize(self) -> None:
        """Until the GPU is idle."""
        self._gpu.synchronize()

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *exc: object) -> None:
        """Forget the module, so that its memory goes."""
        self._module = None


def ways(net: Net, gpu: Gpu, capability: tuple[int, int]) -> list[Way]:
    """Every row of PyTorch's for one network."""
    found: list[Way] = []
    for kind, compiled in (*((kind, False) for kind in EAGER), *((kind, True) for kind in COMPILED)):
        name = f"torch.compile {kind}" if compiled else f"torch {kind}"
        problem = lacking(kind, capability)
        for graph in (False, True):
            shown = f"{name}, {GRAPH}" if graph else name
            opened = None if problem else partial(_open, net, kind, gpu, compiled, graph)
            found.append(Way(shown, BY, kind, opened, problem))
    return found


def lacking(kind: str, capability: tuple[int, int]) -> str:
    """Why a card has no tensor cores for a type, or ""."""
    if kind in ("bf16", "tf32") and capability < LEAST_BF16:
        return f"{kind} needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return ""


def _open(net: Net, kind: str, gpu: Gpu, compiled: bool, graph: bool, probes: Sequence[Tensors]) -> GpuSession:
    outputs = [spec.name for spec in net.graph.signature.outputs]
    session = TorchSession(net.reference.model, outputs, kind, gpu, compiled=compiled)
    return GraphSession(session, gpu, probes) if graph else session
