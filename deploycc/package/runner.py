"""What runs a bundle on its device: one file in `runners/` is one kind of runner, found by its name.

A runner puts its own files into the folder that is being packed, and says what else the device needs to run them; `deploycc package`
lists both in the manifest, the table of sizes and the SBOM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

from deploycc.core.registry import Registry
from deploycc.runtime.bundle import LoadedBundle

Kind = Literal["application", "library", "platform", "machine-learning-model", "data", "file"]  # CycloneDX 1.6, component.type


@dataclass(frozen=True, slots=True)
class Component:
    """Something that the device runs or reads, as an SBOM tells it.

    Attributes:
        name: of the package, library or file.
        version: "" where it is not known.
        kind: CycloneDX's type of it.
        licences: an SPDX expression alone, or names of licences; empty where it is not known.
        purl: package URL (purl-spec), or "".
        sha256: of its file, or "".
        bytes: its size when installed; None where it is not known.
        needs: names of the components that it needs itself.
        facts: what else is known, by name.
    """

    name: str
    version: str = ""
    kind: Kind = "library"
    licences: tuple[str, ...] = ()
    purl: str = ""
    sha256: str = ""
    bytes: int | None = None
    needs: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a runner adds to a package.

    Attributes:
        files: its files in the folder that is packed, as relative names with "/"; they get the role "runner".
        needs: what must be on the device besides the bundle, with what that needs in turn.
        carries: what is in its files besides its own code: a runtime's libraries.
        uses: names of those of `needs` and `carries` that the runner itself uses; empty: all of them.
        notes: what the user should know.
    """

    files: tuple[str, ...]
    needs: tuple[Component, ...] = ()
    carries: tuple[Component, ...] = ()
    uses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class Runner(Protocol):
    """A kind of runner: `--runner NAME`."""

    name: ClassVar[str]

    def add(self, bundle: LoadedBundle, folder: Path, arch: str) -> RunnerParts:
        """Put the runner's files into `folder`, which holds a copy of the bundle's listed files except those of other runners.

        `arch` is the device's architecture, as the kernel calls it.

        Raises:
            UnsupportedError: it cannot run the runtime that this bundle is for.
            MissingDependency: what it is built with is not installed.
            BuildError: the compiler refuses it.
        """
        ...


RUNNERS: Registry[Runner] = Registry("package/runners", "runner", Runner, "`deploycc package --help`")
