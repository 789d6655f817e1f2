"""Where the time of one call goes, as a runtime's own profiler tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np

from deploycc.core.kernels import Precision
from deploycc.runtime.signature import Signature

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


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator of the graph that a runtime computes, with what it does in one call of the model.

    Attributes:
        name: the runtime's own.
        operator: the kernel's kind.
        precision: what it computes in.
        milliseconds: all its calls together, each by the lower quartile of its times.
        calls: in one call of the model.
        macs: of all its calls; None where it multiplies nothing, or its shapes are not known.
        bytes: of weights and activations that all its calls read and write, once each; None where they are not known.
    """

    name: str
    operator: str
    precision: Precision
    milliseconds: float
    calls: float
    macs: int | None
    bytes: int | None


@runtime_checkable
class Measures(Protocol):
    """A backend whose runtime tells time, shapes and precision of every operator of a file that it built.

    Attributes:
        measured_by: whose clock it is, in words.
    """

    measured_by: ClassVar[str]

    def operators(
        self,
        model: Path,
        signature: Signature,
        runtime: Mapping[str, str],
        feeds: Sequence[Mapping[str, np.ndarray]],
        *,
        threads: int,
        runs: int,
    ) -> list[OperatorTime]:
        """In the order in which they run, over `runs` calls after as many that do not count; `runtime` is the manifest's table."""
        ...
