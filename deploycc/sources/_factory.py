"""The user's own code: `file.py:factory` and `package.module:factory`, for models and for data.

A file is imported under a name of its own, so that two files called model.py do not meet. Its folder (the working folder for a
package) is on sys.path while it is imported and the factory runs, and not afterwards.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from deploycc.core.registry import suggest
from deploycc.errors import DeployError

_FILE = re.compile(r"(?P<where>.+\.py)(?::(?P<name>.*))?")
_PACKAGE = re.compile(r"(?P<where>[A-Za-z_]\w*(?:\.\w+)*):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Made:
    """What a factory returned, and the module it stands in (for declarations beside it, such as TRANSFORM)."""

    value: Any
    module: ModuleType


def names_factory(text: str, taken: tuple[str, ...]) -> bool:
    """Whether `text` reads `file.py:factory` or `package.module:factory`; `taken` are prefixes that mean another source."""
    package = _PACKAGE.fullmatch(text)
    return _FILE.fullmatch(text) is not None or (package is not None and package["where"] not in taken)


def make(text: str, error: type[DeployError]) -> Made:
    """Import and call the factory that `text` names. Raises `error`, with the user's exception as its cause."""
    with _found(text, error) as (module, factory, where, name):
        try:
            return Made(factory() if not _is_value(factory) else factory, module)
        except (Exception, SystemExit) as cause:
            raise error(f"{name}() in {where} raised {_told(cause)}", fix="correct the factory; it is called without arguments") from cause


def find(text: str, error: type[DeployError]) -> Any:
    """The function that `text` (file.py:name) names, not called. Raises `error`."""
    with _found(text, error) as (_, function, _, _):
        return function


@contextmanager
def _found(text: str, error: type[DeployError]) -> Iterator[tuple[ModuleType, Any, str, str]]:
    """(module, what is named, where, name), with its folder on sys.path."""
    match = _FILE.fullmatch(text) or _PACKAGE.fullmatch(text)
    if match is None:
        raise error(f"'{text}' does not name a factory", fix="write file.py:factory or package.module:factory")
    where, name = match["where"], match["name"] or ""
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise error(f"there is no file {where}", fix=f"correct the path in '{text}'")
    with _importable(Path(where).resolve().parent if is_file else Path.cwd()):
        module = _import_file(Path(where), error) if is_file else _import_package(where, error)
        yield module, _attribute(module, name, where, error), where, name


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _import_file(path: Path, error: type[DeployError]) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    stem = re.sub(r"\W", "_", path.stem)
    name = f"_deploycc_{digest}_{stem}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        SourceFileLoader(name, str(path)).exec_module(module)
    except (Exception, SystemExit) as cause:
        del sys.modules[name]
        raise error(f"importing {path} raised {_told(cause)}", fix="correct the file; `python FILE` shows the same error") from cause
    return module


def _import_package(name: str, error: type[DeployError]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if cause.name and (name == cause.name or name.startswith(cause.name + ".")):
            raise error(
                f"there is no Python module '{cause.name}'",
                fix="install it, run in its folder, or give the path of a file: file.py:factory",
            ) from cause
        raise error(f"importing {name} raised {_told(cause)}", fix="install what it imports") from cause
    except (Exception, SystemExit) as cause:
        raise error(
            f"importing {name} raised {_told(cause)}", fix=f"correct it; `python -c 'import {name}'` shows the same error"
        ) from cause


def _attribute(module: ModuleType, name: str, where: str, error: type[DeployError]) -> Any:
    own = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__]
    if not name:
        raise error(f"'{where}' does not say which function makes the model or data", fix=f"add it: {where}:{own[0] if own else 'factory'}")
    if not hasattr(module, name):
        fix = suggest(name, own, listing=where) if own else f"define `def {name}(): …` in it"
        raise error(f"{where} has no function '{name}'", fix=fix)
    value = getattr(module, name)
    if not callable(value) and not _is_value(value):
        raise error(f"{where}:{name} is a {type(value).__name__}, not a function", fix=f"define `def {name}(): …` that returns it")
    return value


def _is_value(found: Any) -> bool:
    """A ready nn.Module is callable, but calling it is inference and not construction."""
    return not isinstance(found, type) and hasattr(found, "state_dict") and hasattr(found, "forward")


def _told(cause: BaseException) -> str:
    """The exception, and the user's file and line that it comes from."""
    if isinstance(cause, SyntaxError) and cause.filename:
        return f"{type(cause).__name__}: {cause.msg} ({cause.filename}:{cause.lineno})"
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if not _is_library(frame.filename)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(cause).__name__}: {cause}".rstrip(": ") + place


def _is_library(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<") or "site-packages" in filename or "importlib" in filename
