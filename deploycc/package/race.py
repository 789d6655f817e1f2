"""What a manifest keeps of a race of several targets (version 1): of `compile --target x86` and `bench --targets`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deploycc.bench.result import BenchResult


class Entry(BaseModel):
    """One that took part.

    Attributes:
        name: of the target, or "PyTorch eager".
        best: whether it is the one that was kept.
        ships: "int8" or "float"; None for eager PyTorch.
        bytes: of the runtime's files; None likewise.
        metric_name: of the accuracy metric; None without data.
        metric: its value.
        agreement: share of equal arg-max with the float reference.
        sqnr_db: against the float reference.
        int8_macs: share of the MACs in integer kernels.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    name: str
    best: bool = False
    ships: str | None = None
    bytes: int | None = None
    metric_name: str | None = None
    metric: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    int8_macs: float | None = None


class Race(BaseModel):
    """The race.

    Attributes:
        version: of this record.
        entries: in the order of the targets.
        refused: (target, reason) for those that took no part.
        bench: latencies of all of them, interleaved.
        command: what to type to do it again; "" where it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    entries: tuple[Entry, ...]
    refused: tuple[tuple[str, str], ...] = ()
    bench: BenchResult
    command: str = ""
