"""How the bundles of one runtime are run in a guest: one file in `sessions/`, named like the bundle's session.

Two programs run there. The selftest is the bundle's own runner. The probe answers the samples of a file and marks its last calls for the
counter (`counts`): `probe BUNDLE FEEDS.npz OUT.npz CALLS`, with feeds as "INDEX/INPUT" and answers as "INDEX/OUTPUT".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from deploycc.core.registry import Registry
from deploycc.runtime.bundle import LoadedBundle


@dataclass(frozen=True, slots=True)
class Programs:
    """What runs in the guest.

    Attributes:
        selftest: the runner's command, without its arguments.
        probe: the probe's.
        runtime: what answers there, in words: "onnxruntime 1.32.0, numpy 2.4.6, Python 3.11".
        environment: variables of both.
        notes: what the user should know.
    """

    selftest: tuple[str, ...]
    probe: tuple[str, ...]
    runtime: str
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


@runtime_checkable
class GuestSession(Protocol):
    """One runtime in the guest."""

    name: ClassVar[str]

    def programs(self, bundle: LoadedBundle, work: Path) -> Programs:
        """Get everything that is needed; `work` is a folder for files of this run.

        Raises:
            MissingDependency: a wheel, a compiler or the file system cannot be had.
            BuildError: a program does not compile.
            StoreError: the cache cannot be written.
        """
        ...


SESSIONS: Registry[GuestSession] = Registry("emulate/sessions", "emulated runtime", GuestSession, "`deploycc verify --help`")
