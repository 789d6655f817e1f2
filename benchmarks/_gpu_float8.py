"""Q/DQ in float8 (E4M3) instead of int8, for the time that a GPU takes with it: deploycc has no float8 calibration of its own yet.

Ranges are those of the int8 file: a scale s of int8 covers 127·s, so float8 gets s·127/448, and weights are rounded anew. Without int8's
choice of a range this is no fair accuracy of float8, which the row says. Operators with at most 16 channels go back to float, as their
float8 kernels do not exist; so does everything with groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploycc.backends._tensorrt_rules import DQ, LEAST_HALF_SCALE, WEIGHTED, Q, constant, operand

FROM, TO = 127.0, 448.0
FEWEST = 16  # channels, on either side
OPSET = 19  # float8 in QuantizeLinear


class Unfit(RuntimeError):
    """The file cannot be written in float8."""


def float8(path: Path) -> None:
    """Rewrite an int8 file of the TensorRT backend in place. Raises Unfit."""
    import onnx_ir as ir

    model = ir.load(path)
    if model.opset_imports.get("", 0) < OPSET:
        raise Unfit(f"float8 needs opset {OPSET}, the file has {model.opset_imports.get('')}")
    done = convert(model)
    if not done:
        raise Unfit("no operator of this network has more than 16 channels on both sides and no groups")
    ir.save(model, path)


def convert(model: Any) -> int:
    """In place; how many operators multiply float8."""
    import onnx_ir.passes.common as common

    kept = 0
    for node in list(model.graph):
        if node.op_type not in WEIGHTED:
            continue
        if _fits(node):
            kept += 1
        else:
            _in_float(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    made: dict[str, Any] = {}
    for node in list(model.graph):
        if node.op_type in (Q, DQ):
            _rescale(model.graph, node, made)
    common.RemoveUnusedNodesPass()(model)
    return kept


def _fits(node: Any) -> bool:
    """Behind Q/DQ, with kernels in float8."""
    pair = operand(node, 1)
    maker = pair.producer() if pair is not None else None
    if maker is None or maker.op_type != DQ:
        return False
    codes = constant(operand(maker, 0))
    if codes is None:
        return True  # a product of two activations
    return node.attributes.get_int("group", 1) == 1 and min(codes.shape[:2]) > FEWEST


def _in_float(graph: Any, node: Any) -> None:
    """Read what was before Q/DQ: the tensor, or the weights that the codes stand for."""
    import onnx_ir as ir

    for index, value in enumerate(node.inputs[:2]):
        maker = value.producer() if value is not None else None
        if maker is None or maker.op_type != DQ:
            continue
        source, old = operand(maker, 0), operand(maker, 1)
        codes, scale = constant(source), constant(old)
        if codes is None:
            quantizer = source.producer() if source is not None else None
            if quantizer is None or quantizer.op_type != Q:
                raise Unfit(f"{maker.name} reads integers that no QuantizeLinear makes")
            node.replace_input_with(index, _as(quantizer.inputs[0], maker.outputs[0].dtype, node))
            continue
        assert scale is not None and old is not None and old.dtype is not None  # noqa: PT018  # the backend's rules have looked
        array = (codes.astype(np.float32) * _along(scale, codes.ndim, maker).astype(np.float32)).astype(scale.dtype)
        name = f"{maker.name}_float"
        weights = ir.Value(name=name, const_value=ir.tensor(array, dtype=old.dtype, name=name), shape=ir.Shape(array.shape))
        weights.type = ir.TensorType(old.dtype)
        graph.register_initializer(weights)
        node.replace_input_with(index, weights)


def _as(value: Any, kind: Any, reader: Any) -> Any:
    """In the type that DequantizeLinear gave it: Q/DQ may go from one float type to another."""
    import onnx_ir as ir

    if value.dtype == kind:
        return value
    cast = ir.node("Cast", [value], {"to": int(kind)}, name=f"{reader.name}_{value.name}_Cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = f"{cast.name}_output", value.shape, ir.TensorType(kind)
    reader.graph.insert_before(reader, cast)
    return cast.outputs[0]


def _along(scale: np.ndarray, rank: int, node: Any) -> np.ndarray:
    """A scale as it multiplies: one number, or one for each index of the axis."""
    if not scale.ndim:
        return scale
    shape = [1] * rank
    shape[node.attributes.get_int("axis", 1)] = -1
    return scale.reshape(shape)


def _rescale(graph: Any, node: Any, made: dict[str, Any]) -> None:
    """One Q or DQ: scale, zero point, and codes where they are constant."""
    import onnx_ir as ir

    def initializer(name: str, array: Any, kind: Any) -> Any:
        if name not in made:
            tensor = ir.tensor(array, dtype=kind, name=name)
            made[name] = ir.Value(name=name, const_value=tensor, shape=ir.Shape(np.shape(array)), type=ir.TensorType(kind))
            graph.register_initializer(made[name])
        return made[name]

    low = ir.DataType.FLOAT8E4M3FN
    data, old = operand(node, 0), operand(node, 1)
    codes = constant(data)
    scale = constant(old)
    if data is None or old is None or scale is None:
        raise Unfit(f"the scale of {node.name} is no constant")
    wide = scale.astype(np.float32) * np.float32(FROM / TO)
    if scale.dtype == np.float16 and wide.min() < LEAST_HALF_SCALE:
        wide = np.maximum(wide, np.float32(LEAST_HALF_SCALE))  # float16 holds no smaller one to all of its bits
    new = wide.astype(scale.dtype)
    if node.op_type == DQ and codes is not None:
        values = codes.astype(np.float32) * _along(scale.astype(np.float32), codes.ndim, node)
        eight = np.clip(values / _along(new.astype(np.float32), codes.ndim, node), -TO, TO).astype(low.numpy())
        node.replace_input_with(0, initializer(f"{data.name}_float8", eight, low))
    node.replace_input_with(1, initializer(f"{old.name}_float8", new, old.dtype))
    zero = initializer(f"{old.name}_float8_zero", np.zeros(new.shape, low.numpy()), low)
    if len(node.inputs) > 2:
        node.replace_input_with(2, zero)
    else:
        node.resize_inputs(3)
        node.replace_input_with(2, zero)
    if node.op_type == Q:
        node.outputs[0].type = ir.TensorType(low)
        node.attributes.pop("output_dtype", None)
        node.attributes["saturate"] = ir.AttrInt64("saturate", 1)
