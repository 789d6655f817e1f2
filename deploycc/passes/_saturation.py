"""What int16 saturation on x86 CPUs without VNNI costs a Q/DQ graph, predicted on any machine (the arithmetic is in `_madd`).

Every node is computed as written (`_onnx_torch`); a Conv, Gemm or MatMul that ONNX Runtime computes from uint8 activations and int8
weights gets Δ·s_a·s_b added, the excess of its saturating pairs. So the prediction differs from the exact run by saturation alone.

EfficientNet-Lite0 with full-range weights, 165 photos against float: 4.8 dB predicted, and 4.84 dB from ONNX Runtime 1.32 on a Haswell
emulated by QEMU; 25.0 dB with VNNI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deploycc.core.compare import sqnr_db
from deploycc.passes._madd import (
    Window,
    excess,
    excess_by_group,
    is_depthwise,
    kernel_matrix,
    may_saturate,
    patches,
    to_channels,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.passes._onnx_torch import Call, Operator

MARGIN_DB = 0.5  # full range must win by this: other data may saturate more

Feeds = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What saturation does to a graph.

    Attributes:
        layers: the name of every operator with uint8 activations and int8 weights → the share of its pairs that saturate.
        sqnr_db: of the outputs with saturation, against those without.
    """

    layers: tuple[tuple[str, float], ...]
    sqnr_db: float


def predict(model: ir.Model, feeds: Feeds) -> Prediction:
    """Run a Q/DQ graph that quantize-static made, with saturation and without.

    Every node runs as written (`_onnx_torch`); Conv, Gemm and MatMul that a kernel computes from uint8 and int8 have Δ·s_a·s_b added.

    Raises:
        UnsupportedError: an operator that `_onnx_torch` lacks.
    """
    wanted, _ = _run(model, feeds, saturate=False)
    found, layers = _run(model, feeds, saturate=True)
    return Prediction(layers, _least_db(wanted, found))


def worth_it(full: ir.Model, reduced: ir.Model, wanted: Feeds, feeds: Feeds) -> tuple[Literal["full", "reduced"], Mapping[str, Any], str]:
    """Whether weights of full range that saturate, or weights that cannot, come nearer to the float outputs.

    Args:
        full: quantized with all of int8.
        reduced: quantized so that no pair saturates (`_held_pairs`, or |codes| ≤ 63).
        wanted: the float model's outputs by name, one call each.
        feeds: its inputs, likewise.

    Returns:
        The choice, the facts (decibels; shares by layer), and a note that tells both predicted losses.
    """
    names = [value.name or "" for value in full.graph.outputs]
    truth = [np.concatenate([call[name].reshape(-1) for call in wanted]) for name in names]
    exact, _ = _run(full, feeds, saturate=False)
    found, layers = _run(full, feeds, saturate=True)
    seven, _ = _run(reduced, feeds, saturate=False)
    facts = {"full_db": _least_db(truth, found), "full_unsaturated_db": _least_db(truth, exact), "reduced_db": _least_db(truth, seven)}
    choice = "full" if facts["full_db"] > facts["reduced_db"] + MARGIN_DB else "reduced"
    worst = max(layers, key=lambda layer: layer[1], default=("", 0.0))
    where = f"at most {100 * worst[1]:.2g} % of a layer's pairs, in '{worst[0]}'" if worst[1] else "no pair of these samples"
    note = (
        f"without VNNI, weights of full range are predicted {facts['full_db']:.1f} dB from float ({facts['full_unsaturated_db']:.1f} dB "
        f"unsaturated; saturating: {where}), weights held to pairs that cannot {facts['reduced_db']:.1f} dB: "
        f"{'full range is' if choice == 'full' else 'held ones are'} taken"
    )
    return choice, {**facts, "saturated": dict(layers)}, note


def _least_db(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Over the outputs, the lowest: one of large values does not hide another."""
    return min(sqnr_db(a, b) for a, b in zip(wanted, found, strict=True))


def _run(model: ir.Model, feeds: Feeds, *, saturate: bool) -> tuple[list[np.ndarray], tuple[tuple[str, float], ...]]:
    """Every output over all calls, flat; and the layers, when they saturate."""
    import torch

    from deploycc.passes._onnx_torch import OnnxModule, as_tensor

    net = OnnxModule(model)
    layers = _layers(model.graph) if saturate else {}
    for index, step in enumerate(net.steps):
        layer = layers.get(step.outputs[0])
        if layer is not None and step.run is not None:
            net.steps[index] = replace(step, run=layer.over(step.run))
    with torch.no_grad():
        calls = [net(*(as_tensor(call[name]) for name in net.inputs)) for call in feeds]
    outputs = [np.concatenate([value.numpy().reshape(-1) for value in each]) for each in zip(*calls, strict=True)]
    return outputs, tuple((layer.name, layer.saturated / max(1, layer.pairs)) for layer in layers.values())


@dataclass(slots=True)
class _Layer:
    """One operator on uint8 activations and int8 weights, and how many of its pairs there were and saturated."""

    name: str
    kind: str
    scale: float
    zero: int
    codes: np.ndarray
    scales: np.ndarray
    pairs: int = 0
    saturated: int = 0

    def over(self, run: Operator) -> Operator:
        """The operator, with what saturation changes added."""

        def saturating(call: Call) -> Any:
            import torch

            y = run(call)
            x = np.clip(np.rint(call[0].numpy() / np.float32(self.scale)) + self.zero, 0, 255).astype(np.uint8)
            lost = self._convolution(call, x) if self.kind == "Conv" else self._matrix(call, x)
            return y + torch.from_numpy(lost.astype(np.float32)).reshape(y.shape if lost.size > 1 else ())

        return saturating

    def _convolution(self, call: Call, x: np.ndarray) -> np.ndarray:
        from deploycc.passes._onnx_torch_layers import window

        group = call.attr("group", 1)
        if is_depthwise(self.codes, group):
            return np.zeros(())
        kernel = self.codes.shape[2:]
        strides, dilations, sides = window(call, list(kernel))
        how = Window(kernel, tuple(strides), tuple(dilations), tuple(sides))
        kernels = kernel_matrix(self.codes, group)
        self.pairs += len(x) * int(np.prod(how.out(x.shape[2:]))) * len(self.codes) * ((kernels.shape[1] + 1) // 2)
        if not any(may_saturate(b).any() for b in kernels):
            return np.zeros(())
        lost, count = excess_by_group(patches(x, how, group, self.zero), kernels)
        self.saturated += count
        return to_channels(lost, x, how) * self._steps().reshape(-1, *[1] * len(kernel))

    def _matrix(self, call: Call, x: np.ndarray) -> np.ndarray:
        a = x.T if call.attr("transA", 0) else x.reshape(-1, x.shape[-1])
        b = self.codes.T if call.attr("transB", 0) else self.codes
        lost, count = excess(a, b)
        self.pairs += lost.size * ((len(b) + 1) // 2)
        self.saturated += count
        return lost * self._steps() * call.attr("alpha", 1.0)

    def _steps(self) -> np.ndarray:
        """s_a·s_b, one or one per output channel."""
        return self.scale * self.scales.reshape(-1).astype(np.float64)


def _layers(graph: ir.Graph) -> dict[str, _Layer]:
    """By the name of their output: operators that an integer kernel computes from uint8 and int8."""
    found: dict[str, _Layer] = {}
    for node in graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
            continue
        activation, weight = (_dequantizer(value) for value in node.inputs[:2])
        if activation is None or weight is None or weight[0] is None:
            continue
        (_, scale, zero), (codes, scales, shift) = activation, weight
        if node.op_type != "Conv" and codes.ndim != 2:
            continue
        if scale.size == 1 and zero.dtype == np.uint8 and codes.dtype == np.int8 and not shift.any():
            name = node.outputs[0].name or ""
            found[name] = _Layer(node.name or name, node.op_type, float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]), codes, scales)
    return found


def _dequantizer(value: ir.Value | None) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Codes where they are constant, scale and zero point of the DequantizeLinear that makes a value."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return None
    codes, scale, zero = (item.const_value.numpy() if item is not None and item.const_value is not None else None for item in node.inputs)
    return None if scale is None or zero is None else (codes, scale, zero)
