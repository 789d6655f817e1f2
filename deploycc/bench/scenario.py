"""How queries come, in MLPerf's terms (inference rules, "Scenarios").

single-stream   the next query comes when the last one is answered; latency counts
multi-stream    a query is several samples at once, each in a session of its own; it is answered when the last of them is
offline         all samples are there; throughput counts, at several batch sizes
server          queries come at random (Poisson process) at a mean rate, whether the last one is answered or not; latency from the
                arrival on counts, against a bound
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from deploycc.bench.measurement import Record
from deploycc.errors import UsageError

Kind = Literal["single-stream", "multi-stream", "offline", "server"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STREAMS = 4  # MLPerf's closed edge division takes 8, on more cores
BATCHES = (1, 2, 4, 8)
PERCENTILE = 0.99


class Scenario(Record):
    """One way for queries to come.

    Attributes:
        kind: "single-stream", "multi-stream", "offline" or "server".
        streams: sessions that work at the same time: of a query (multi-stream), or that take queries from the queue (server).
        batches: samples in one call; several only offline. Empty: as many as the feeds come with.
        qps: mean arrivals per second (server).
        latency_bound_ms: what `percentile` of the latencies is held against (server).
        percentile: of the latencies.
    """

    kind: Kind = "single-stream"
    streams: int = Field(default=1, ge=1)
    batches: tuple[int, ...] = ()
    qps: float | None = Field(default=None, gt=0)
    latency_bound_ms: float | None = Field(default=None, gt=0)
    percentile: float = Field(default=PERCENTILE, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Scenario:
        if min(self.batches, default=1) < 1 or len(set(self.batches)) != len(self.batches):
            raise UsageError(f"batch sizes are {self.batches}", fix="give each batch size once, 1 or more")
        if self.kind != "offline" and len(self.batches) > 1:
            raise UsageError(f"scenario {self.kind} takes one batch size, not {len(self.batches)}", fix="add --scenario offline")
        if self.kind == "single-stream" and self.streams > 1:
            raise UsageError(f"single-stream is one stream, not {self.streams}", fix="add --scenario multi-stream")
        if self.kind == "server" and self.qps is None:
            raise UsageError("scenario server needs the rate at which queries come", fix="add --qps 100")
        if self.kind != "server" and (self.qps is not None or self.latency_bound_ms is not None):
            raise UsageError(f"scenario {self.kind} has no arrivals and no latency bound", fix="add --scenario server, or leave them out")
        return self


def scenario_of(
    kind: str,
    *,
    streams: int | None = None,
    batches: tuple[int, ...] | None = None,
    qps: float | None = None,
    latency_bound_ms: float | None = None,
    percentile: float | None = None,
) -> Scenario:
    """The scenario `kind` with its defaults where nothing else is said. Raises UsageError for what does not go together."""
    known: dict[str, Kind] = {name: name for name in KINDS}
    if kind not in known:
        raise UsageError(f"there is no scenario '{kind}'", fix=f"use one of {', '.join(KINDS)}")
    if percentile is not None and kind != "server":
        raise UsageError(f"scenario {kind} holds no percentile against a bound", fix="add --scenario server, or leave --percentile out")
    return Scenario(
        kind=known[kind],
        streams=streams or (STREAMS if kind == "multi-stream" else 1),
        batches=batches or (BATCHES if kind == "offline" else ()),
        qps=qps,
        latency_bound_ms=latency_bound_ms,
        percentile=percentile or PERCENTILE,
    )


def parse_batches(text: str) -> tuple[int, ...]:
    """The sizes in "1,4,16". Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch is '{text}'", fix="write sizes such as 8, or 1,4,16 with --scenario offline")
    return tuple(map(int, parts))


def parse_share(option: str, text: str) -> float:
    """The text "5%" or "0.05" as 0.05. Raises UsageError for what is not over 0 and under 1."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UsageError(f"{option} is '{text}'", fix="write a share over 0 and under 1 such as 5%, or 0.05")
    return value
