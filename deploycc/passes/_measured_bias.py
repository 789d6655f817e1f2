"""Bias correction by measurement: layer after layer, what integers shift on average is taken out of the bias.

With y_c channel c of what the layer gives in the float graph, ŷ_c in the quantized one, whose earlier layers are corrected already, and f
the activation behind it,

    b_c ← b_c + Σ f′(y_c)² (y_c − ŷ_c) / Σ f′(y_c)²

over all places and calls: to first order the shift that leaves the least squared error of f(y). A ReLU counts where it lets through, a clip
where it does not, and a layer without an activation everywhere, which is the mean of M. Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", ICCV 2019, appendix D. Unlike (W − W_q)·E[x] it also takes out what rounding and clipping of the
activations shift, here and in every layer before.

What is added is shrunk where the calls differ more than their mean, max(0, 1 − v/m²), v the variance of the mean over the calls, m the
mean: one of few calls is a guess (W. James, C. Stein, "Estimation with quadratic loss", 1961, positive part).

What that won when it was made, dB to float on 165 photos: with what rounding the weights is expected to shift; on top of it the plain mean
of 32 calls; weighed as above; and of 85 calls, as correct-bias=best has it with 128 calibration samples. EfficientNet-Lite0 25.2, 23.8,
25.3, 25.3; Lite1 24.5, 24.0, 24.3, 25.2; Lite2 25.1, 25.5, 25.9, 26.0. The first and the last are rows of benchmarks/quantizers.py.

Both graphs are computed node by node over ABREAST calls side by side (`_onnx_torch`), so that one run corrects every layer: behind what all
calls so far say of the layers before. Memory is that of ABREAST calls' living tensors, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.compare import sqnr_db
from deploycc.core.contract import Progress
from deploycc.forms._taps import tapped
from deploycc.passes._dialects import ACTIVATIONS, HEAVY, gated, is_constant, only_reader
from deploycc.passes._memory import give_back

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from deploycc.passes._onnx_torch import OnnxModule

CALLS, LEAST = 96, 16  # that are measured
JUDGES = 64  # others that choose, for correct-bias=best
ABREAST = 16

Feeds = Sequence[Mapping[str, np.ndarray]]
Slope = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Corrected:
    """What one layer's correction did.

    Attributes:
        name: of the operator.
        shift: root mean square over the channels of what was added, over that of the layer's float output.
    """

    name: str
    shift: float


def correct(model: ir.Model, float_model: ir.Model, feeds: Feeds, progress: Progress) -> list[Corrected]:
    """Change the biases of `model`, in place.

    Args:
        model: quantized by quantize-static, a clone.
        float_model: what it was made from, with the same names.
        feeds: the calls to measure; as many of them are as fit in memory.
        progress: told of every layer.

    Raises:
        UnsupportedError: an operator that `_onnx_torch` lacks.
    """
    import torch

    from deploycc.passes._onnx_torch import OnnxModule, as_tensor

    layers = {node.outputs[0].name or "": node for node in model.graph if _quantized(node) and _bias(node) is not None}
    known = {node.name: node for node in float_model.graph}  # an output of the graph has another name in `model`
    layers = {name: node for name, node in layers.items() if node.name in known}
    if not layers or not feeds:
        return []
    with torch.no_grad():
        net, quantized = OnnxModule(float_model), OnnxModule(model)
        sums = {name: _Sums(known[node.name], node, net) for name, node in layers.items()}
        for start in range(0, len(feeds), ABREAST):
            calls = [[as_tensor(call[key]) for key in net.inputs] for call in feeds[start : start + ABREAST]]
            truth = net.side_by_side(calls)
            for name, values in quantized.side_by_side(calls):
                if name in sums:
                    sums[name].take(_reach(truth, sums[name].wanted), values)
                    give_back()
            progress("bias correction", min(start + ABREAST, len(feeds)), len(feeds), "")
    return [item.written() for item in sums.values()]


def _reach(steps: Iterator[tuple[str, list[torch.Tensor]]], name: str) -> list[torch.Tensor]:
    """Go on until a tensor is computed: the quantized graph keeps the float one's order."""
    return next(values for found, values in steps if found == name)


def _slope(node: ir.Node, net: OnnxModule) -> Slope | None:
    """f′ of the activation that alone reads a layer's result, or of its product with its own gate; None where there is none."""
    import torch

    value = node.outputs[0]
    reader, product = only_reader(value), gated(value)
    last = product if product is not None else reader.outputs[0] if reader is not None and reader.op_type in ACTIVATIONS else None
    if last is None or (reader is not None and reader.inputs[0] is not value):
        return None
    name, end = value.name or "", last.name or ""

    def slope(y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            (found,) = torch.autograd.grad(net.between({name: leaf}, end).sum(), leaf)
        return found

    return slope


def _bias(node: ir.Node) -> tuple[ir.Value, np.ndarray | None] | None:
    """Its constant bias and the steps of its codes, None where it is float."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    made = value.producer() if value is not None else None
    if value is not None and is_constant(value) and value.dtype is not None and value.dtype.name == "FLOAT":
        return value, None
    if made is None or made.op_type != "DequantizeLinear" or not is_constant(made.inputs[0]) or not is_constant(made.inputs[1]):
        return None
    codes, scale = made.inputs[0], made.inputs[1]
    assert codes is not None
    assert scale is not None
    assert scale.const_value is not None  # they are constant
    return codes, scale.const_value.numpy().astype(np.float64)


def _quantized(node: ir.Node) -> bool:
    """Whether a heavy operator reads integer weights."""
    made = node.inputs[1].producer() if node.op_type in HEAVY and node.inputs[1] is not None else None
    return made is not None and made.op_type == "DequantizeLinear"


def _moved(node: ir.Node, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a bias with `shift` added, as far as its codes can, and what was added."""
    from deploycc.passes._qdq import BIAS_LIMIT

    found = _bias(node)
    assert found is not None  # `correct` has looked
    value, steps = found
    assert value.const_value is not None
    old = value.const_value.numpy()
    if steps is None:
        new = (old + shift.reshape(old.shape)).astype(np.float32)
        return new, (new.astype(np.float64) - old).reshape(-1)
    codes = np.clip(old + np.rint(shift / steps).reshape(old.shape), -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32)
    return codes, (codes.astype(np.float64) - old).reshape(-1) * steps.reshape(-1)


class Moments:
    """What is kept of a channel's errors, whatever the number of calls: sums over them, of Σ w·(y − ŷ) and Σ w over a call's places."""

    def __init__(self) -> None:
        self.calls = 0
        self._errors = self._weights = self._squares = self._crossed = self._weights_squared = np.zeros(())

    def add(self, errors: np.ndarray, weights: np.ndarray) -> None:
        """One call's, of every channel."""
        self.calls += 1
        self._errors, self._weights = self._errors + errors, self._weights + weights
        self._squares, self._crossed = self._squares + np.square(errors), self._crossed + errors * weights
        self._weights_squared = self._weights_squared + np.square(weights)

    def shrunk(self) -> np.ndarray:
        """The weighed mean Σe / Σw of every channel, less where the calls differ more than that."""
        total = np.maximum(self._weights, 1e-30)
        mean = self._errors / total
        squares = self._squares - 2 * mean * self._crossed + np.square(mean) * self._weights_squared  # Σ (e − mean·w)²
        spread = np.maximum(squares, 0.0) / np.square(total)
        doubt = spread * (self.calls / (self.calls - 1)) if self.calls > 1 else np.zeros_like(mean)
        return mean * np.maximum(0.0, 1.0 - doubt / np.maximum(np.square(mean), 1e-30))


class _Sums:
    """Of one layer, channel by channel: the moments of Σ w·(y − ŷ) and Σ w over a call's places, w = f′(y)², and the sum of y²'s means."""

    def __init__(self, original: ir.Node, node: ir.Node, net: OnnxModule) -> None:
        self.wanted = original.outputs[0].name or ""
        self.node, self.axis, self.slope = node, 1 if node.op_type == "Conv" else -1, _slope(original, net)
        self.moments, self.energy = Moments(), 0.0

    def take(self, wanted: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Add some calls, and put the shift of all so far on `values`."""
        import torch

        for y, quantized in zip(wanted, values, strict=True):
            weights = torch.ones_like(y) if self.slope is None else self.slope(y).square()
            errors, weights, energy = (self._channels(part) for part in (weights * (y - quantized), weights, y.square()))
            self.moments.add(errors.sum(1).numpy(), weights.sum(1).numpy())
            self.energy += float(energy.mean())
        added = torch.from_numpy(_moved(self.node, self.moments.shrunk())[1].astype(np.float32))
        for value in values:
            shape = [1] * value.dim()
            shape[self.axis] = -1
            value += added.reshape(shape)

    def written(self) -> Corrected:
        """Put the shift into the bias."""
        import onnx_ir as ir

        found = _bias(self.node)
        assert found is not None  # `correct` has looked
        new, added = _moved(self.node, self.moments.shrunk())
        found[0].const_value = ir.tensor(new, name=found[0].name)  # quantize-static gave every operator its own
        energy = self.energy / self.moments.calls
        return Corrected(self.node.name or "", float(np.sqrt(np.mean(np.square(added)) / (energy or 1.0))))

    def _channels(self, values: torch.Tensor) -> torch.Tensor:
        return values.movedim(self.axis, 0).flatten(1).double()


def judged(models: Sequence[ir.Model], float_model: ir.Model, feeds: Feeds) -> list[float]:
    """How near to float each model's outputs are on `feeds`, in dB; of several outputs the lowest."""
    outputs: list[list[np.ndarray]] = []
    for model in (float_model, *models):
        run = tapped(model, [value.name or "" for value in model.graph.outputs])
        outputs.append([np.concatenate([part.reshape(-1) for part in parts]) for parts in zip(*map(run, feeds), strict=True)])
    wanted, *found = outputs
    return [min(map(sqnr_db, wanted, each)) for each in found]


def told(found: Sequence[Corrected], most: int = 3) -> tuple[str, Mapping[str, float]]:
    """A note and the facts for the receipt."""
    largest = sorted(found, key=lambda item: -item.shift)[:most]
    named = ", ".join(f"{item.name} {item.shift:.2%}" for item in largest)
    return f"measured means taken out of {len(found)} biases, of their layer's output: {named}", {item.name: item.shift for item in found}
