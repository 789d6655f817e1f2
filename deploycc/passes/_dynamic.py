"""Writing the dynamic integer form of products, LSTMs and embeddings into a graph. The maths is in `quantize_dynamic`.

DynamicQuantizeLSTM (onnxruntime, docs/ContribOperators.md and contrib_ops/cpu/quantization/dynamic_quantize_lstm.cc) is LSTM with

    W  (directions, inputs, 4·hidden),  R  (directions, hidden, 4·hidden)    8-bit integers, turned around
    scales and zero points              (directions, 4·hidden), or (directions) for one per direction

It quantizes X over the whole call, and the hidden state at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploycc.passes._products import MICROSOFT, columns, graph_of, insert, is_turned, stored, take_over

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.target import Quant

LSTM_INPUTS = 8  # X, W, R, B, sequence_lens, initial_h, initial_c, P
TABLE_MOST = 127


@dataclass
class Writer:
    """Rewrites graphs of one model in place (give it a clone).

    Attributes:
        quant: what the target says.
        outliers: tensor → channels that are multiplied in float.
    """

    quant: Quant
    outliers: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    _activations: dict[tuple[int, str], tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict, init=False)
    _split: dict[tuple[int, str], tuple[ir.Value, ir.Value]] = field(default_factory=dict, init=False)
    _weights: dict[tuple[ir.Value, bool, tuple[int, ...]], tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict, init=False)

    def product(self, node: ir.Node) -> None:
        """A MatMul or Gemm becomes MatMulInteger, Cast, Mul (and Add)."""
        import onnx_ir as ir

        given = node.inputs[0]
        assert given is not None
        channels = tuple(self.outliers.get(given.name or "", ()))
        kept, few = self._parted(given, node, channels) if channels else (given, None)
        x, x_scale, x_zero = self._activation(kept, node)
        w, w_scale, w_zero = self._weight(node, channels)
        scales = insert(node, "Mul", [x_scale, w_scale], "scales")
        integer = insert(node, "MatMulInteger", [x, w, x_zero, w_zero], "MatMulInteger", dtype=ir.DataType.INT32)
        integer.shape = node.outputs[0].shape
        value = insert(node, "Cast", [integer], "Cast", attributes={"to": ir.DataType.FLOAT})
        value = insert(node, "Mul", [value, scales], "Mul")
        if few is not None:
            value = insert(node, "Add", [value, self._float_part(node, few, channels)], "outliers")
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value = insert(node, "Add", [value, node.inputs[2]], "Add")
        take_over(node, [value])

    def embedding(self, node: ir.Node) -> None:
        """Gather from an int8 table, times the gathered row's scale."""
        import onnx_ir as ir

        from deploycc.passes._qdq import weight_scales

        table, index = node.inputs[0], node.inputs[1]
        assert table is not None and table.const_value is not None and index is not None  # noqa: PT018  (`is_embedding` has looked)
        array = table.const_value.numpy()
        scales = weight_scales(array, 0, TABLE_MOST, clip=False).reshape(-1, 1)
        codes = np.clip(np.rint(array / scales), -TABLE_MOST, TABLE_MOST).astype(np.int8)
        picked = insert(node, "Gather", [stored(table, f"{table.name}_quantized", codes), index], "rows", dtype=ir.DataType.INT8)
        scale = insert(node, "Gather", [stored(table, f"{table.name}_scale", scales), index], "scales")
        value = insert(node, "Cast", [picked], "Cast", attributes={"to": ir.DataType.FLOAT})
        take_over(node, [insert(node, "Mul", [value, scale], "Mul")])

    def lstm(self, node: ir.Node) -> None:
        """An LSTM becomes DynamicQuantizeLSTM, with the same attributes and results."""
        import onnx_ir as ir

        inputs = [*node.inputs, *[None] * (LSTM_INPUTS - len(node.inputs))]
        w, r = inputs[1], inputs[2]
        assert w is not None and r is not None  # noqa: PT018  (an LSTM has both)
        codes, scales, zeros = zip(self._gates(w), self._gates(r), strict=True)
        inputs[1:3] = codes
        inputs += [scales[0], zeros[0], scales[1], zeros[1]]
        attributes = [item for key, item in node.attributes.items() if key != "layout"]
        made = ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, attributes, num_outputs=len(node.outputs), name=f"{node.name}/quantized")
        graph_of(node).insert_before(node, made)
        take_over(node, made.outputs)

    def _gates(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(integers, scales, zero points) of an LSTM's weight (directions, 4·hidden, inputs)."""
        assert value.const_value is not None  # the pass takes no LSTM without constant weights
        array = value.const_value.numpy()
        directions, gates, _ = array.shape
        rows = array.reshape(directions * gates if self.quant.per_channel else directions, -1)
        codes, scales, zero = _rounded(rows, 0, self.quant)
        shape = (directions, gates) if self.quant.per_channel else (directions,)
        return (
            stored(value, f"{value.name}_quantized", np.ascontiguousarray(codes.reshape(array.shape).transpose(0, 2, 1))),
            stored(value, f"{value.name}_scale", scales.reshape(shape)),
            stored(value, f"{value.name}_zero_point", np.full(shape, zero, codes.dtype)),
        )

    def _activation(self, value: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(uint8 tensor, scale, zero point), made once per tensor and graph, before its first reader there."""
        import onnx_ir as ir

        graph = graph_of(reader)
        key = (id(graph), value.name or "")
        if key not in self._activations:
            stem = self._stem(value, reader)
            node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"{stem}_DynamicQuantizeLinear")
            for out, part, kind in zip(node.outputs, ("quantized", "scale", "zero_point"), ("UINT8", "FLOAT", "UINT8"), strict=True):
                out.name, out.type = f"{stem}_{part}", ir.TensorType(ir.DataType[kind])
            node.outputs[0].shape, node.outputs[1].shape, node.outputs[2].shape = value.shape, ir.Shape([]), ir.Shape([])
            graph.insert_before(reader, node)
            self._activations[key] = (node.outputs[0], node.outputs[1], node.outputs[2])
        return self._activations[key]

    def _stem(self, value: ir.Value, reader: ir.Node) -> str:
        """A name for what is made of `value`; two sub-graphs that read a tensor from outside must not share it."""
        producer = value.producer()
        inside = value.graph is reader.graph or (producer is not None and producer.graph is reader.graph)
        return f"{value.name}" if inside else f"{reader.name}/{value.name}"

    def _parted(self, value: ir.Value, reader: ir.Node, channels: Sequence[int]) -> tuple[ir.Value, ir.Value]:
        """The tensor with zeros at `channels`, and those channels alone; made once for all its readers."""
        key = (id(reader.graph), value.name or "")
        if key not in self._split:
            weight = reader.inputs[1]
            assert weight is not None
            keep = np.ones(columns(reader).shape[0], np.float32)
            keep[list(channels)] = 0
            kept = insert(reader, "Mul", [value, stored(weight, f"{value.name}_inliers", keep)], "inliers")
            index = stored(weight, f"{value.name}_outliers", np.array(channels, np.int64))
            few = insert(reader, "Gather", [value, index], "outlier_channels", attributes={"axis": -1})
            kept.shape, self._split[key] = value.shape, (kept, few)
            if value.shape is not None:
                few.shape = type(value.shape)([*value.shape[:-1], len(channels)])
        return self._split[key]

    def _float_part(self, node: ir.Node, few: ir.Value, channels: Sequence[int]) -> ir.Value:
        """The product of the outlier channels."""
        weight = node.inputs[1]
        assert weight is not None
        rows = stored(weight, f"{node.name}_outlier_weight", np.ascontiguousarray(columns(node)[list(channels)]))
        value = insert(node, "MatMul", [few, rows], "outlier_MatMul")
        value.shape = node.outputs[0].shape
        return value

    def _weight(self, node: ir.Node, channels: tuple[int, ...]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(integer K×N weight with zeros at `channels`, scales, zero points), made once per weight."""
        value = node.inputs[1]
        assert value is not None
        key = (value, is_turned(node), channels)
        if key in self._weights:
            return self._weights[key]
        array = columns(node).copy()
        array[list(channels)] = 0
        codes, scales, zero = _rounded(array, 1 if self.quant.per_channel else None, self.quant)
        stem = f"{value.name}_transposed" if is_turned(node) else f"{value.name}"
        scalar = len(scales) == 1
        self._weights[key] = (
            stored(value, f"{stem}_quantized", np.ascontiguousarray(codes)),
            stored(value, f"{stem}_scale", scales[0].reshape(()) if scalar else scales),
            stored(value, f"{stem}_zero_point", np.full(() if scalar else len(scales), zero, codes.dtype)),
        )
        return self._weights[key]


def _rounded(array: np.ndarray, axis: int | None, quant: Quant) -> tuple[np.ndarray, np.ndarray, int]:
    """(integers, scales along `axis`, zero point) in the target's weight type."""
    from deploycc.passes._qdq import weight_scales

    most = 63 if quant.reduce_range else 127
    scales = weight_scales(array, axis, most, clip=False)
    kind = np.dtype(quant.weights)
    zero = 128 if kind.kind == "u" else 0
    spread = scales if axis != 0 else scales.reshape(-1, *(1,) * (array.ndim - 1))
    return (np.clip(np.rint(array / spread), -most, most) + zero).astype(kind), scales, zero
