"""The graph that a runtime computes, as it shows it: kernel by kernel, with the precision of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

Shapes = Mapping[str, tuple[int, ...]]
Precision = Literal["int8", "bf16", "f16", "float", "conversion"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operator of the graph that a runtime computes.

    Attributes:
        name: mostly that of the operator in the file.
        operator: the kernel's kind.
        precision: int8, a float of 16 bits, float, or a conversion from one to the other.
        macs: of one call with a batch of one; None where it multiplies nothing or its shapes are not known.
    """

    name: str
    operator: str
    precision: Precision
    macs: int | None


@runtime_checkable
class Maps(Protocol):
    """A backend whose runtime shows the graph that it computes.

    Attributes:
        shows: whose graph it is, in words.
    """

    shows: ClassVar[str]

    def kernels(self, model: Path, runtime: Mapping[str, str], shapes: Shapes | None = None) -> Sequence[Kernel]:
        """Of a file that it built and the manifest's table of the runtime, in the graph's order; `shapes` of inputs fill named axes."""
        ...
