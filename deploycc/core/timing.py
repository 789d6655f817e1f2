"""Where the time of one call goes, as a runtime's own profiler tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from deploycc.core.contract import Built, Context
    from deploycc.core.target import Target


def clock(context: Context) -> str:
    """What a measured time depends on besides the model, for the cache key: another target's clock decides for itself."""
    facts = context.target.digest_facts({"backend", "arch", "hardware", "runtime"})
    return json.dumps({**facts, "threads": context.target.bench.threads}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class NodeTime:
    """One operator of the graph that the runtime made of the file.

    Attributes:
        name: the runtime's own, mostly that of the operator in the file and what the runtime added to it.
        operator: its kind.
        milliseconds: of one call.
    """

    name: str
    operator: str
    milliseconds: float


@runtime_checkable
class Profiles(Protocol):
    """A backend whose runtime tells the time of every operator."""

    def profile(self, built: Built, target: Target, feeds: Sequence[Mapping[str, np.ndarray]], *, runs: int) -> list[NodeTime]:
        """The operators in the order in which they run, each with the lower quartile of its times over `runs` calls."""
        ...
