"""An ONNX graph as a torch module that torch.export captures: `_onnx_torch`, with every shape and setting as a plain number.

torch.export does not look into tensors, so what an operator takes as numbers (a shape, axes, the ends of a clip) must be constants of the
graph; `_constants` folds them first. Products with a constant matrix become linear layers, clips with constant ends hardtanh: the operators
that runtimes of programs have kernels for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from deploycc.passes._onnx_torch import Call, OnnxModule, Operator, Step, operators

FEW = 64  # entries of a constant that may be numbers
PRODUCTS = ("MatMul", "Gemm")


def unknown_operators(model: ir.Model) -> list[str]:
    """Kinds of operators that have no torch form, in the graph's order."""
    known = operators()
    kinds = (
        f"{node.domain}.{node.op_type}".lstrip(".")
        for node in model.graph
        if node.domain not in ("", "ai.onnx") or node.op_type not in known
    )
    return list(dict.fromkeys(kinds))


@dataclass(frozen=True, slots=True)
class NumberedCall(Call):
    """A call that knows its constant inputs as numbers."""

    numbers: Sequence[np.ndarray | None] = ()

    def ints(self, index: int) -> list[int] | None:
        """From the numbers, so that nothing looks into a tensor."""
        known = self.numbers[index] if index < len(self.numbers) else None
        return Call.ints(self, index) if known is None else [int(item) for item in known.reshape(-1)]

    def number(self, index: int) -> float | None:
        """A constant input of one entry, else None."""
        known = self.numbers[index] if index < len(self.numbers) else None
        return float(known.reshape(-1)[0]) if known is not None and known.size == 1 else None


class OnnxProgram(OnnxModule):
    """Computes an ONNX graph with fixed shapes; gives its outputs by name.

    Raises UnsupportedError as OnnxModule does.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value is not None}
        self.numbers = {name: array for name, array in arrays.items() if array.size <= FEW}
        shapes = {name: array.shape for name, array in arrays.items()}
        self.steps = [self._for_export(step, shapes) for step in self.steps]
        read = {name for step in self.steps for name in step.inputs} | set(self.outputs)
        for name in [name for name in self.constants if name not in read]:  # its place is taken by its transpose
            delattr(self, self.constants.pop(name))

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Every output, in order."""
        return dict(zip(self.outputs, super().forward(*inputs), strict=True))

    def _for_export(self, step: Step, shapes: dict[str, tuple[int, ...]]) -> Step:
        kind, names = step.where.partition(" ")[0], list(step.inputs)
        if kind == "Clip":
            return replace(step, run=_clip)
        if kind not in PRODUCTS or len(shapes.get(names[1], ())) != 2:
            return step
        plain = all(step.attributes.get(name, default) == default for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))
        bias = names[2] if len(names) > 2 else ""
        if not plain or (bias and len(shapes.get(bias, ())) != 1):
            return step
        if step.attributes.get("transB", 0):
            return replace(step, run=_linear)
        name = f"{names[1]}_T"
        if name not in self.constants:
            key = self.constants[names[1]]
            self.register_buffer(f"{key}_T", getattr(self, key).T.contiguous(), persistent=False)
            self.constants[name] = f"{key}_T"
        return replace(step, run=_linear, inputs=(names[0], name, *names[2:]))

    def _run(self, step: Step, inputs: list[Any], size: int | None, device: Any) -> Any:
        run: Operator | None = step.run
        assert run is not None  # nothing is replaced here
        numbers = [self.numbers.get(name) for name in step.inputs]
        return run(NumberedCall(inputs, step.attributes, self.opset, step.where, len(step.outputs), device, numbers))


def _clip(call: Call) -> Tensor:
    """Hardtanh where both ends are numbers."""
    assert isinstance(call, NumberedCall)
    low, high = call.number(1), call.number(2)
    if low is None or high is None:
        return operators()["Clip"](call)
    return F.hardtanh(call[0], low, high)


def _linear(call: Call) -> Tensor:
    """x·Wᵀ + b."""
    return F.linear(call[0], call[1], call.get(2))
