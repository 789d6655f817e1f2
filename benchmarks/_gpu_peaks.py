"""What the GPU multiplies at best: square matrix products through PyTorch's libraries (cuBLAS, cuBLASLt), in every type it has kernels for.

An n × n × n product is 2·n³ operations. The peak of a type is the best median over the sizes, on random numbers: zeros draw less power and
run faster. Products that the card or the library lacks say why. A copy of memory tells the bandwidth, bytes read and written together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from _gpu_clock import EventTimer, Gpu

KINDS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
SIZES = (2048, 4096, 8192)
CALLS, WARM_CALLS = 12, 3
COPY_MIB = 1024
LAST_WORDS = 160


@dataclass(frozen=True, slots=True)
class Peak:
    """Of one type.

    Attributes:
        kind: of the factors; sums are at least float32 or int32.
        tera_ops: operations per second / 10^12; None where there is no such product.
        size: n of the best.
        by_size: what every size reached.
        problem: why there is none.
    """

    kind: str
    tera_ops: float | None = None
    size: int | None = None
    by_size: tuple[tuple[int, float], ...] = ()
    problem: str = ""


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Whether float32 products on the GPU may round their factors to TF32; as before afterwards."""
    import torch

    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    set_precision(kind)
    try:
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.allow_tf32 = old


def set_precision(kind: str) -> None:
    """As `precision`, for good.

    By the older switches: after the newer ones (`fp32_precision`) PyTorch 2.13 raises when torch.compile reads the older.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"


def product(kind: str, size: int, device: str) -> Callable[[], object]:
    """A call that multiplies two random matrices; the second is stored by columns, as the tensor cores want it in 8 bits."""
    import torch as torch_

    torch: Any = torch_  # products in 8 bits have names of their own only
    torch.manual_seed(size)
    if kind == "int8":
        a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if kind == "fp8":
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    if kind in ("fp16", "bf16"):
        a, b = (item.to(torch.float16 if kind == "fp16" else torch.bfloat16) for item in (a, b))
    out = torch.empty(size, size, dtype=a.dtype, device=device)
    return lambda: torch.mm(a, b, out=out)


def tera_ops(size: int, milliseconds: float) -> float:
    """2·n³ operations in that time, / 10^12."""
    return 2 * size**3 / milliseconds / 1e9


def share(macs: float, milliseconds: float, peak: Peak | None) -> float | None:
    """Of a peak that `macs` multiply-accumulates in that time are: 2 operations each. None without a peak."""
    if peak is None or not peak.tera_ops:
        return None
    return 2 * macs / milliseconds / 1e9 / peak.tera_ops


def median_ms(call: Callable[[], object], gpu: Gpu) -> float:
    """Of CALLS calls, by the GPU's clock."""
    timer = EventTimer(gpu)
    times = [timer(lambda _: call(), number) for number in range(WARM_CALLS + CALLS)]
    return float(np.median(times[WARM_CALLS:])) / 1e6


def peak(kind: str, gpu: Gpu, sizes: Sequence[int] = SIZES, make: Callable[..., Callable[[], object]] = product) -> Peak:
    """Of one type, best of the sizes; the reason where the product fails at all of them."""
    import torch

    found: list[tuple[int, float]] = []
    reason = ""
    for size in sizes:
        try:
            with precision(kind), torch.inference_mode():
                found.append((size, tera_ops(size, median_ms(make(kind, size, gpu.device), gpu))))
        except (RuntimeError, NotImplementedError, ValueError) as error:  # what PyTorch says to a type that the card lacks
            reason = f"n = {size}: {(str(error).strip() or repr(error)).splitlines()[0][:LAST_WORDS]}"
    if not found:
        return Peak(kind, problem=reason or "no size was tried")
    size, best = max(found, key=lambda item: item[1])
    return Peak(kind, best, size, tuple(found), reason)


def peaks(gpu: Gpu, sizes: Sequence[int] = SIZES) -> list[Peak]:
    """Of every type."""
    return [peak(kind, gpu, sizes) for kind in KINDS]


def copy_gb_s(gpu: Gpu, mebibytes: int = COPY_MIB) -> float:
    """Bandwidth of a copy within the GPU's memory, in 10^9 bytes per second, read and written."""
    import torch

    source = torch.empty(mebibytes << 18, dtype=torch.float32, device=gpu.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_ms(functools.partial(target.copy_, source), gpu) / 1e6
