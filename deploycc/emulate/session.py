"""How the bundles of one runtime are run in a guest: one file in `sessions/`, named like the bundle's session.

Two programs run there. The selftest is the runner: the bundle's own where it is byte for byte what this version writes, or where its
maker's signature was checked; else this version's. The emulator is no sandbox, so that nothing else of a bundle is ever executed. The probe
answers the samples of a file and marks its last calls for the counter (`counts`): `probe BUNDLE FEEDS.npz OUT.npz CALLS`, with feeds as
"INDEX/INPUT" and answers as "INDEX/OUTPUT".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from deploycc.core.registry import Registry
from deploycc.core.store import file_digest
from deploycc.runtime.bundle import LoadedBundle, listed


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

    def programs(self, bundle: LoadedBundle, work: Path, trusted: bool = False) -> Programs:
        """Get everything that is needed.

        Args:
            bundle: that is run.
            work: folder for files of this run.
            trusted: the signature of its maker was checked.

        Raises:
            MissingDependency: a wheel, a compiler or the file system cannot be had.
            BuildError: a program does not compile.
            StoreError: the cache cannot be written.
        """
        ...


def runner_of(bundle: LoadedBundle, name: str, ours: Path, trusted: bool) -> tuple[Path, tuple[str, ...]]:
    """The bundle's file `name`, or `ours` in its place (see the module's text) and a note that says so."""
    own = bundle.folder / name
    if not any(entry["path"] == name for entry in listed(bundle.manifest)):
        return ours, ()
    if trusted or file_digest(own) == file_digest(ours):
        return own.resolve(), ()
    return ours, (f"the bundle's {name} is not what this version writes: this version's was run; --key PUB.pem runs the bundle's own",)


SESSIONS: Registry[GuestSession] = Registry("emulate/sessions", "emulated runtime", GuestSession, "`deploycc verify --help`")
