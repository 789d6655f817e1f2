"""Nothing in a .pt2 file may run as code; `torch.export.load` alone does not see to that, so the file is screened first.

What it would run (torch 2.13, torch/export/pt2_archive/_package.py, _export/serde/serialize.py, export/_unlift.py):
pickled weights, constants and custom objects (`weights_only=False`), compiled libraries (AOTInductor, loaded as shared objects),
shape expressions (`sympy.sympify` evaluates), guards (`exec`), operator names (any attribute path below `torch`), and the names of
values, which go into generated source. All of these are held to what `torch.export.save` writes for plain tensors and operators.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from deploycc.errors import SourceError

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
RECORDS = re.compile(
    r"models/model\.json|data/(weights|constants)/[\w.]+|data/sample_inputs/model\.pt|archive_(format|version)|byteorder|version"
    r"|\.data/\w+|\.format_version|\.storage_alignment|extra/.*"
)
LEGACY = re.compile(r"data/(weights|constants)/.*\.pt")
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order|torchvision|quantized|quantized_decomposed|_quantized|torchao|export)(\.\w+){1,2}"
    r"|torch\.(_sym|sym)_\w+|math\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|invert|lshift|rshift)"
)
# A name that stands in generated source: nothing that calls, ends a line, quotes, assigns or comments.
PLAIN = re.compile(r"[\w.+\-/\[\]<>$:, ]*")
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
CALLS = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "floor", "ceiling", "Eq", "Ne", "Lt", "Le",
    "Gt", "Ge", "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan", "And", "Or", "Not",
    "Piecewise", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift",
    "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt",
    "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
})  # fmt: skip
ATTRIBUTES = frozenset({"size", "stride", "storage_offset", "dim", "shape", "isnan", "inf"})
ARITHMETIC = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Subscript,
    ast.Attribute, ast.Tuple, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip


def screen(path: Path) -> None:
    """Raise SourceError unless the file holds tensors and operators alone. Reads it with PyTorch's own reader, as loading will."""
    import torch

    reader = torch._C.PyTorchFileReader(str(path))
    records = [str(name) for name in reader.get_all_records()]
    for name in records:
        if not RECORDS.fullmatch(name) or LEGACY.fullmatch(name):
            raise _refused(path, f"it holds '{name}', which is compiled code, a pickle or unknown")
    if missing := [name for name in (MODEL, SAMPLES, *PAYLOADS) if name not in records]:
        raise SourceError(f"{path} is not an exported program: it lacks {missing[0]}", fix="write it with torch.export.save(program, path)")
    for name in PAYLOADS:
        for key, entry in _json(reader, name, path).get("config", {}).items():
            if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))):
                raise _refused(path, f"'{key}' is stored as a pickle or custom object")
    try:
        torch.load(io.BytesIO(reader.get_record(SAMPLES)), weights_only=True)
    except Exception as error:
        raise _refused(path, "its sample inputs are a pickle of more than tensors") from error
    _screen_value(_json(reader, MODEL, path), "", path)


def _refused(path: Path, why: str) -> SourceError:
    return SourceError(
        f"{path} is refused, because loading it could run code from the file: {why}",
        fix="export it again from the model's own code with torch.export.save, or give that code as file.py:factory",
    )


def _json(reader: Any, name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(reader.get_record(name))
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {name} is not JSON ({error})", fix="export it again") from error
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _screen_value(value: Any, key: str, path: Path) -> None:
    """Walk the program's JSON; `key` is the field that `value` stands in."""
    if isinstance(value, Mapping):
        for name, item in cast("Mapping[str, Any]", value).items():
            _screen_text(name, "", path)
            if name != "metadata":  # stack traces and module paths: kept beside the nodes, never evaluated
                _screen_value(item, name, path)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            _screen_value(item, key, path)
    elif isinstance(value, str):
        _screen_text(value, key, path)


def _screen_text(text: str, key: str, path: Path) -> None:
    if key in ("as_string", "as_strings"):  # an argument's value, quoted wherever it is used
        return
    if key in ("target", "as_operator") and "." in text and text.split(".")[0] in ("torch", "math", "_operator"):
        safe = OPERATOR.fullmatch(text) is not None and "__" not in text.replace(".__and__", "").replace(".__or__", "")
    elif key in ("expr_str", "guards_code"):
        safe = _is_arithmetic(text)
    elif key in ("in_spec", "out_spec"):
        safe = _is_plain_tree(text)
    else:
        safe = PLAIN.fullmatch(text) is not None
    if not safe:
        raise _refused(path, f"{key or 'a name'} reads {text[:80]!r}")


def _is_arithmetic(text: str) -> bool:
    """Whether an expression only computes with sizes."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in nodes:
        if not isinstance(node, ARITHMETIC):
            return False
        if isinstance(node, ast.Attribute) and node.attr not in ATTRIBUTES:
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Attribute) or (isinstance(node.func, ast.Name) and node.func.id in CALLS)
        ):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.fullmatch(r"[\w.+-]*", node.value):
            return False
    return True


def _is_plain_tree(text: str) -> bool:
    """Whether a pytree spec is made of tuples, lists and dicts with plain keys (other types import modules when they are read)."""
    try:
        _, root = json.loads(text)
    except (ValueError, TypeError):
        return False
    pending = [root]
    while pending:
        node = pending.pop()
        if (
            not isinstance(node, dict)
            or node.get("type") not in CONTAINERS
            or not PLAIN.fullmatch(str(node.get("context")).translate(_QUOTES))
        ):
            return False
        pending.extend(node.get("children_spec", ()))
    return True


_QUOTES = str.maketrans("", "", "\"'")
