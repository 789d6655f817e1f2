"""Activation ranges by what they do to the operators that read them.

    e(lo, hi) = Σ_readers ‖W (q(x) − x)‖² / ‖W x‖²  +  Σ (q(v) − v)² / Σ v²

over rows x of a reader's input as its kernel sees them: a Conv's patches, drawn at random places of every calibration sample, a Gemm's or
MatMul's rows. Errors that a kernel averages out cost nothing; those that it adds up do. The last term, over the values v of the tensor's
histogram, stands for readers without weights, and for the tails that few rows miss: without it, Lite0 came out between 23.8 and 25.2 dB
with 128 to 2,048 rows; with it, at 25.2 dB with 256. Every reader has ROWS rows, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deploycc.passes._dialects import HEAVY
from deploycc.passes._placement import Placement
from deploycc.passes._ranges import Histogram

if TYPE_CHECKING:
    import onnx_ir as ir

ROWS = 256
OUTPUTS = 256  # of a reader that are judged
SHARES = np.linspace(1.0, 0.3, 36)


@dataclass
class Reader:
    """One operator with weights, and rows of what it reads.

    Attributes:
        name: of the operator.
        source: the tensor.
        weights: (groups, outputs, taps).
        window: kernel, strides, dilations, pads (top, left) of a convolution over rows and columns; None for a product.
        rows: arrays (groups, n, taps), one of each call.
    """

    name: str
    source: str
    weights: np.ndarray
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]] | None
    rows: list[np.ndarray] = field(default_factory=list[np.ndarray])

    def take(self, values: np.ndarray, count: int, rng: np.random.Generator) -> None:
        """Draw `count` rows of one call's tensor."""
        if not count:
            return
        if self.window is None:
            flat = values.reshape(-1, values.shape[-1])
            self.rows.append(flat[rng.integers(len(flat), size=count)][None])
            return
        (height, width), strides, dilations, pads = self.window
        tops = rng.integers(_places(values.shape[2], height, strides[0], dilations[0], pads[0]), size=count) * strides[0] - pads[0]
        lefts = rng.integers(_places(values.shape[3], width, strides[1], dilations[1], pads[1]), size=count) * strides[1] - pads[1]
        y = tops[:, None, None] + np.arange(height)[None, :, None] * dilations[0]
        x = lefts[:, None, None] + np.arange(width)[None, None, :] * dilations[1]
        inside = (y >= 0) & (y < values.shape[2]) & (x >= 0) & (x < values.shape[3])
        image = rng.integers(len(values), size=count)[:, None, None]
        patches = values[image, :, np.clip(y, 0, values.shape[2] - 1), np.clip(x, 0, values.shape[3] - 1)] * inside[..., None]
        groups, taps = self.weights.shape[0], self.weights.shape[2]
        self.rows.append(
            patches.transpose(3, 0, 1, 2).reshape(groups, -1, count, height * width).transpose(0, 2, 1, 3).reshape(groups, count, taps)
        )

    def error(self) -> Callable[[Callable[[np.ndarray], np.ndarray]], float]:
        """A function of the rounding (values → values − rounded): its share of the output's energy."""
        rows = np.concatenate(self.rows, axis=1)
        turned = self.weights.transpose(0, 2, 1)
        energy = float(np.square(rows @ turned).sum()) or 1.0
        return lambda lost: float(np.square(lost(rows) @ turned).sum()) / energy


def _places(size: int, kernel: int, stride: int, dilation: int, pad: int) -> int:
    """Where a window may begin; padding behind is taken to be that in front."""
    return max(1, (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1)


def readers(graph: ir.Graph, placement: Placement) -> list[Reader]:
    """The heavy integer operators whose rows can be drawn: convolutions over two axes, products."""
    found: list[Reader] = []
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.name not in placement.nodes or node.op_type not in HEAVY or source is None or weight is None or weight.const_value is None:
            continue
        array = weight.const_value.numpy()
        if node.op_type == "Conv":
            if array.ndim == 4 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET":
                found.append(_convolution(node, source.name or "", array))
            continue
        turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
        found.append(Reader(node.name, source.name or "", _few(array if turned else array.T)[None], None))
    return found


def _convolution(node: ir.Node, source: str, weight: np.ndarray) -> Reader:
    groups = node.attributes.get_int("group", 1)

    def pair(key: str, default: int) -> tuple[int, int]:
        first, second = tuple(node.attributes.get_ints(key, (default, default)))[:2]
        return first, second

    flat = weight.reshape(groups, weight.shape[0] // groups, -1)
    if groups == 1:
        flat = _few(flat[0])[None]
    return Reader(
        node.name or "", source, flat.astype(np.float32), (weight.shape[2:], pair("strides", 1), pair("dilations", 1), pair("pads", 0))
    )


def _few(rows: np.ndarray) -> np.ndarray:
    return rows[:: max(1, -(-len(rows) // OUTPUTS))].astype(np.float32)


@dataclass
class Outputs:
    """Rows for every tensor that is read by operators with weights.

    Attributes:
        leaders: tensor → the tensor whose range it takes.
        found: the readers.
        calls: how many there will be.
        rows: of each reader, spread evenly over the calls.
    """

    leaders: Mapping[str, str]
    found: list[Reader]
    calls: int
    rows: int
    rng: np.random.Generator
    taken: int = 0

    @property
    def sources(self) -> list[str]:
        """The tensors to give to `take`."""
        return list(dict.fromkeys(reader.source for reader in self.found))

    def take(self, tensors: Mapping[str, np.ndarray]) -> None:
        """One call's tensors."""
        count = (self.taken + 1) * self.rows // self.calls - self.taken * self.rows // self.calls
        for reader in self.found:
            reader.take(tensors[reader.source], count, self.rng)
        self.taken += 1

    def range(self, name: str, histogram: Histogram, levels: int) -> tuple[float, float]:
        """The range of least error for the tensor `name`."""
        terms = [reader.error() for reader in self.found if self.leaders.get(reader.source) == name]
        kept = np.nonzero(histogram.counts)[0]
        x, weight = histogram.centers()[kept].astype(np.float32), histogram.counts[kept]
        energy = float((weight * np.square(x)).sum()) or 1.0
        terms.append(lambda lost: float((weight * np.square(lost(x))).sum()) / energy)
        return best_range(min(histogram.low, 0.0), max(histogram.high, 0.0), levels, terms)


def best_range(
    low: float, high: float, levels: int, terms: Iterable[Callable[[Callable[[np.ndarray], np.ndarray]], float]]
) -> tuple[float, float]:
    """[low, high] shrunk on each side, by coordinate descent over SHARES, for the least sum of errors."""
    every = list(terms)

    def error(lo: float, hi: float) -> float:
        scale = np.float32((hi - lo) / (levels - 1))
        if scale <= 0:
            return np.inf
        zero = np.rint(-lo / scale)

        def lost(x: np.ndarray) -> np.ndarray:
            return x - (np.clip(np.rint(x / scale) + zero, 0, levels - 1) - zero) * scale

        return sum(term(lost) for term in every)

    left = right = 1.0
    if high > 0:
        right = min(SHARES, key=lambda share: error(low, high * share))
    if low < 0:
        left = min(SHARES, key=lambda share: error(low * share, high * right))
        if high > 0:
            right = min(SHARES, key=lambda share: error(low * left, high * share))
    return low * left, high * right


def watch(graph: ir.Graph, placement: Placement, calls: int, seed: int, rows: int = ROWS) -> Outputs:
    """What draws `rows` rows of every reader from `calls` calls."""
    return Outputs(placement.leaders, readers(graph, placement), calls, rows, np.random.default_rng(seed))
