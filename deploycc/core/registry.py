"""Plug-ins found by file name: one file in the folder is one plug-in, and adding one edits nothing else.

`fold_batchnorm.py` holds the class whose `name` is "fold-batchnorm". Names are listed without importing a
module, so a broken or missing dependency of one plug-in never hides the others; a broken file fails loudly on use.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from deploycc.core.contract import Backend, DataSource, FormOps, ModelSource, Pass
from deploycc.errors import DeployError, UnknownName

T = TypeVar("T")
ROOT = Path(__file__).parent.parent


def suggest(name: str, known: Sequence[str], *, listing: str) -> str:
    """The `fix` of an unknown name: the nearest known ones, or how to list them."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(item) for item in near)}?" if near else f"{listing} lists them: {', '.join(known)}"


class Registry(Generic[T]):
    """The plug-ins of one folder below `deploycc/`."""

    def __init__(self, folder: str, kind: str, base: type[T], listing: str) -> None:
        self.folder = folder
        self.kind = kind
        self.base = base
        self.listing = listing

    def names(self) -> tuple[str, ...]:
        """Every plug-in's name, sorted; imports nothing."""
        files = (ROOT / self.folder).glob("*.py")
        return tuple(sorted(file.stem.replace("_", "-") for file in files if not file.stem.startswith("_")))

    def get_class(self, name: str) -> type[T]:
        """Import the plug-in called `name`; raises UnknownName with the nearest names."""
        if name not in self.names():
            raise UnknownName(f"there is no {self.kind} '{name}'", fix=suggest(name, self.names(), listing=self.listing))
        path = f"deploycc.{self.folder.replace('/', '.')}.{name.replace('-', '_')}"
        module = importlib.import_module(path)
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == path and vars(value).get("name") == name:
                return cast("type[T]", value)
        raise DeployError(
            f"{path} holds no class with name = '{name}'", fix=f"plug-in developer: give the {self.kind} the name of its file, '{name}'"
        )

    def get(self, name: str) -> T:
        """An instance of the plug-in called `name`, made without arguments."""
        return self.get_class(name)()


def summary(plugin: type[Any]) -> str:
    """First line of a plug-in's docstring."""
    return (inspect.getdoc(plugin) or "").split("\n", 1)[0]


FORMS: Registry[FormOps] = Registry("forms", "form", FormOps, "the folder deploycc/forms")
PASSES: Registry[Pass] = Registry("passes", "pass", Pass, "`deploycc passes`")
BACKENDS: Registry[Backend] = Registry("backends", "backend", Backend, "`deploycc backends`")
MODELS: Registry[ModelSource] = Registry("sources/models", "model source", ModelSource, "`deploycc sources`")
DATASETS: Registry[DataSource] = Registry("sources/datasets", "data source", DataSource, "`deploycc sources`")
