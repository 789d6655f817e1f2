"""Where the time goes between a picture on the disk and an answer: pre-processing, inference, post-processing, on the same queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploycc.bench.measurement import STAGES, Stage
from deploycc.core.artifact import Feeds, Outputs
from deploycc.core.contract import Session
from deploycc.runtime.measure import Block, Stop, Warm, interleave

PER_ROUND = 4


@dataclass(frozen=True, slots=True)
class Pictures:
    """What comes before and after the model.

    Attributes:
        paths: real files, taken in turns.
        prepare: a file as feeds: decoding, transform.
        finish: outputs as an answer: softmax, best classes.
    """

    paths: Sequence[Path]
    prepare: Callable[[Path], Feeds]
    finish: Callable[[Outputs], object]


def time_stages(
    candidates: Mapping[str, tuple[Session, Pictures]], stop: Stop, *, seed: int = 0
) -> dict[str, dict[Stage, tuple[int, ...]]]:
    """Nanoseconds of every stage, query by query, by candidate; rounds are interleaved. Raises what the sessions and pictures raise."""
    rows: dict[str, list[tuple[int, int, int]]] = {name: [] for name in candidates}

    def block_of(name: str) -> Block:
        session, pictures = candidates[name]

        def block(first: int, count: int) -> np.ndarray:
            _query(session, pictures, first)
            found = [_query(session, pictures, first + index) for index in range(count)]
            rows[name] += found
            return np.asarray(found, np.int64).sum(axis=1)

        return block

    blocks = {name: block_of(name) for name in candidates}
    warm = {name: Warm(1, 1, stable=True) for name in candidates}
    interleave(blocks, dict.fromkeys(candidates, PER_ROUND), warm, stop, seed=seed)
    return {name: dict(zip(STAGES, map(tuple, zip(*found, strict=True)), strict=True)) for name, found in rows.items()}


def _query(session: Session, pictures: Pictures, number: int) -> tuple[int, int, int]:
    begin = time.perf_counter_ns()
    feeds = pictures.prepare(pictures.paths[number % len(pictures.paths)])
    prepared = time.perf_counter_ns()
    outputs = session.run(feeds)
    session.synchronize()
    answered = time.perf_counter_ns()
    pictures.finish(outputs)
    return prepared - begin, answered - prepared, time.perf_counter_ns() - answered
