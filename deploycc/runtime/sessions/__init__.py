"""One file = one runtime that a bundle can name; a module here has `open(model, signature, runtime, threads)` and `version()`.

A manifest may only name a module of this folder: a name is looked up in the list of files, never imported as it stands.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from deploycc.errors import BundleError
from deploycc.runtime.signature import Feeds, Outputs, Signature


class Session(Protocol):
    """A loaded model: a context manager that runs and never times."""

    signature: Signature

    def run(self, feeds: Feeds) -> Outputs:
        """One call. Raises SignatureError when `feeds` do not fit."""
        ...

    def synchronize(self) -> None:
        """Return when all work handed to the device is finished."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(self, *exc: object) -> None: ...


class SessionModule(Protocol):
    """What a module of this folder offers."""

    def open(self, model: Path, signature: Signature, runtime: Mapping[str, str], threads: int) -> Session:
        """Load the file `model`; `runtime` is the manifest's table. Raises BundleError and MismatchError."""
        ...

    def version(self) -> str | None:
        """Version of the runtime's package here, or None when it is not installed."""
        ...


def names() -> tuple[str, ...]:
    """Every runtime there is a module for; imports none of them, and works inside runner.pyz."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> SessionModule:
    """The module for the runtime `name`; raises BundleError when there is none."""
    if name not in names():
        raise BundleError(
            f"the bundle asks for the runtime '{name}', which this version of deploycc does not know",
            fix=f"it knows {', '.join(names())}: use the runner.pyz that came with the bundle, or a newer deploycc",
        )
    return cast(SessionModule, importlib.import_module(f"{__name__}.{name}"))
