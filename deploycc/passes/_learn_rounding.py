"""Whether each weight rounds up or down, learned on what its operator reads (AdaRound).

    w_q = s · clip(⌊w/s⌋ + h(V), −m, m),   h(V) = clip((ζ − γ)·σ(V) + γ, 0, 1),   ζ = 1.1, γ = −0.1
    min_{V, b}  mean ‖a(W x + b₀) − a(W_q x + b)‖² / e₀  +  λ · mean (1 − |2h(V) − 1|^β)

x are rows of what the operator reads in the float graph; a is the Relu or Clip that follows; e₀ is what the roundings to beat lose. β falls
from 20 to 2 by a cosine, after a warm-up without the second term, which pushes every h to 0 or 1. The bias is learned with the roundings.
All layers learn from one pass over the calibration samples, each for itself. The paper reads x in the second place from the graph
quantized so far, layer after layer; from one pass that does not do: every layer then makes up for the same errors before it (Lite0:
12.8 dB). (M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycc.passes._one_thread import one_thread

if TYPE_CHECKING:
    import torch

ZETA, GAMMA = 1.1, -0.1
WARM_UP = 0.2
SMALLEST = 1e-12  # share of the energy: nothing is lost
BETA = (20.0, 2.0)
BIAS_RATE = 0.1  # of the weights' learning rate


@dataclass(frozen=True, slots=True)
class Settings:
    """How one layer learns."""

    steps: int
    batch: int
    lr: float
    weight: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator, as arrays.

    Attributes:
        weight: float (groups, outputs, taps).
        scale: (groups, outputs, 1), of the codes.
        bias: (groups, outputs), or None.
        most: largest code.
        rows: of its input in the float graph, (groups, n, taps).
        bounds: of the activation that follows, (−inf, inf) for none.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    float_bias: np.ndarray | None
    most: int
    rows: np.ndarray
    bounds: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Learned:
    """Codes (groups, outputs, taps), bias (groups, outputs) or None, and the share of the output's energy lost, before and after."""

    codes: np.ndarray
    bias: np.ndarray | None
    before: float
    after: float


@one_thread()
def learn(layer: Layer, settings: Settings, codes: np.ndarray, seed: int) -> Learned:
    """Learn one layer's roundings, alike on any number of threads; `codes` are those to beat, and are kept where they are not."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = _tensor(layer.rows)
    scale, steps = _tensor(layer.scale), _tensor(layer.weight / layer.scale)
    base = steps.floor().clamp(-layer.most, layer.most)
    wanted = _act(rows @ _tensor(layer.weight).transpose(1, 2) + _column(layer.float_bias), layer.bounds)
    energy = float(wanted.square().mean()) or 1.0

    def lost(weight: torch.Tensor, bias: torch.Tensor | float, chosen: Any = slice(None)) -> torch.Tensor:
        got = _act(rows[:, chosen] @ weight.transpose(1, 2) + bias, layer.bounds)
        return (got - wanted[:, chosen]).square().mean() / energy

    share = (steps - base).clamp(0.01, 0.99)
    logit = torch.logit((share - GAMMA) / (ZETA - GAMMA)).requires_grad_()
    shift = torch.zeros_like(_tensor(layer.bias)).requires_grad_() if layer.bias is not None else None
    groups: list[dict[str, Any]] = [{"params": [logit], "lr": settings.lr}]
    if shift is not None:
        groups.append({"params": [shift], "lr": settings.lr * BIAS_RATE})
    optimizer = torch.optim.Adam(groups)
    start = _column(layer.bias)
    with torch.no_grad():
        before = float(lost(_tensor(codes) * scale, start))
    size = (energy * before) ** 0.5  # a step of the bias is small beside what rounding loses

    def bias() -> torch.Tensor | float:
        return start if shift is None else start + shift[:, None, :] * size

    for step in range(settings.steps):
        chosen = torch.randint(rows.shape[1], (settings.batch,), generator=generator)
        up = _rectified(logit)
        loss = lost((base + up).clamp(-layer.most, layer.most) * scale, bias(), chosen) / max(before, SMALLEST)
        if step >= WARM_UP * settings.steps:
            loss = loss + settings.weight * (1 - (2 * up - 1).abs().pow(_beta(step / settings.steps))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = (base + (_rectified(logit) >= 0.5)).clamp(-layer.most, layer.most)
        after = float(lost(found * scale, bias()))
        if after >= before:
            return Learned(codes, layer.bias, before, before)
        learned_bias = None if shift is None or layer.bias is None else layer.bias + shift.numpy() * size
        return Learned(found.numpy(), learned_bias, before, after)


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, np.float32).copy())


def _column(bias: np.ndarray | None) -> torch.Tensor | float:
    return 0.0 if bias is None else _tensor(bias)[:, None, :]


def _act(values: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    return values if bounds == (-np.inf, np.inf) else values.clamp(*bounds)


def _rectified(logit: torch.Tensor) -> torch.Tensor:
    """h(V)."""
    return ((ZETA - GAMMA) * logit.sigmoid() + GAMMA).clamp(0, 1)


def _beta(progress: float) -> float:
    """After the warm-up, from 20 to 2 by a cosine."""
    part = (progress - WARM_UP) / (1 - WARM_UP)
    return BETA[1] + (BETA[0] - BETA[1]) * 0.5 * (1 + float(np.cos(np.pi * part)))
