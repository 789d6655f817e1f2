"""What may stand in a .pt2 file, checked before PyTorch reads it: reading must not run code.

`torch.export.load` unpickles entries that the archive asks it to, unpickles example inputs when reading them safely fails,
loads compiled libraries, resolves operators by attribute path, and hands shape expressions to sympy, which evaluates them
(torch 2.13, `torch/export/pt2_archive/_package.py` and `torch/_export/serde/serialize.py`). All of these are refused here;
what `torch.export.save` writes for tensors and ATen operators passes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from deploycc.errors import SourceError

HARMLESS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*|archive_format|archive_version|byteorder|\.data/\w+")
CONFIG = re.compile(r"data/(weights|constants)/\w+_config\.json")
MODEL = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
TARGET = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|torch\.sym_\w+|math\.\w+")
SYMBOLS = re.compile(  # every word of a shape expression, which is sympy's own text form
    r"[suz]f?\d+|True|False|oo|int_oo|Symbol|Integer|Float|Rational|positive|negative|nonnegative|nonpositive|integer|real|zero|nonzero|precision|"
    r"Add|Mul|Pow|Max|Min|Mod|Eq|Ne|Ge|Le|Gt|Lt|And|Or|Not|FloorDiv|CleanDiv|CeilDiv|PythonMod|PowByNatural|IntTrueDiv|FloatTrueDiv|"
    r"ToFloat|TruncToInt|CeilToInt|FloorToInt|RoundToInt|ModularIndexing|IsNonOverlappingAndDenseIndicator|e\d+"
)
FUNCTIONS = "torch.utils._sympy.functions."


def check_archive(path: Path) -> None:
    """Raise SourceError unless `path` is a .pt2 file that holds only tensors, a graph of PyTorch operators, and plain data."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, path)
            _check_payloads(entries, path)
            _check_graph(json.loads(entries[MODEL]), path)
            _check_sample_inputs(entries.get(SAMPLE_INPUTS, b""), path)
    except (OSError, EOFError, zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, KeyError) as cause:
        raise SourceError(
            f"{path} is not a .pt2 file written by torch.export.save: {type(cause).__name__}: {cause}",
            fix="save it again with torch.export.save(program, 'model.pt2'), PyTorch 2.8 or newer",
        ) from cause


def _refuse(path: Path, what: str) -> NoReturn:
    raise SourceError(
        f"{path} {what}: reading it could run code", fix="export the model again with tensors only, or use file.py:factory with --weights"
    )


def _entries(archive: zipfile.ZipFile, path: Path) -> dict[str, bytes]:
    """Contents by name below the archive's root folder; weights are named but not read."""
    entries: dict[str, bytes] = {}
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")
        if name in entries:
            _refuse(path, f"has two entries called {name}")
        if not (HARMLESS.fullmatch(name) or CONFIG.fullmatch(name) or name in (MODEL, SAMPLE_INPUTS)):
            _refuse(path, f"has the entry {info.filename}")
        entries[name] = b"" if HARMLESS.fullmatch(name) else archive.read(info)
    return entries


def _check_payloads(entries: dict[str, bytes], path: Path) -> None:
    for name in filter(CONFIG.fullmatch, entries):
        for key, item in json.loads(entries[name])["config"].items():
            if item["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", item["path_name"]):
                _refuse(path, f"holds '{key}' as a pickled object")


def _check_graph(model: Any, path: Path) -> None:
    for key, text in _strings(model):
        if key == "target" and not TARGET.fullmatch(text):
            _refuse(path, f"calls '{text}', which is not a PyTorch operator")
        words = re.findall(r"[^\W\d]\w*", text.replace(FUNCTIONS, "")) if key == "expr_str" else []
        if not all(SYMBOLS.fullmatch(word) for word in words):
            _refuse(path, f"has the shape expression '{text}'")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) for every text in a JSON value."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _check_sample_inputs(content: bytes, path: Path) -> None:
    import torch

    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001  whatever it is, PyTorch would go on to unpickle it
        _refuse(path, "has example inputs that are not plain tensors")
