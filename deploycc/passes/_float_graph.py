"""What passes share that change the numbers of a float ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.errors import PreconditionError

if TYPE_CHECKING:
    import onnx_ir as ir


def refuse_quantized(artifact: Artifact, fix: str) -> None:
    """Raise PreconditionError where the graph is quantized."""
    if artifact.quant is not None or any(node.op_type == "QuantizeLinear" for node in artifact.model.graph):
        raise PreconditionError("the model is quantized already", fix=fix)


def numbers(value: ir.Value) -> np.ndarray:
    """Of a constant, in float64."""
    assert value.const_value is not None  # callers have looked
    return value.const_value.numpy().astype(np.float64)


def put_numbers(value: ir.Value, array: np.ndarray) -> None:
    """New float32 numbers under the same name; other copies of the model keep theirs."""
    import onnx_ir as ir

    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
