"""Text ↔ passes: `fold-batchnorm, prune-channels{ratio=0.5 skip=head,stem}`.

    pipeline = spec {"," spec}
    spec     = name ["{" [option {(" " | ",") option}] "}"]
    option   = key "=" value          key: kebab-case field name; list values joined by ","; text with spaces in "…"

Options are the fields of the frozen dataclass; parsing, printing, checking and help derive from them.
`format_spec` is the inverse of `parse_specs` + `instantiate`: fields at their defaults are left out unless `full`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from deploycc.core.registry import suggest
from deploycc.errors import SpecError

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_KEY = re.compile(r"([A-Za-z][A-Za-z0-9-]*)\s*=\s*")
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s{}"]+')


@dataclass(frozen=True, slots=True)
class Spec:
    """One parsed item: a name, its options as text, and where it stood."""

    name: str
    options: Mapping[str, str]
    text: str
    position: int


def parse_specs(text: str) -> list[Spec]:
    """Split pipeline text into specs. Raises SpecError with a caret."""
    specs: list[Spec] = []
    position = _skip(text, 0)
    while position < len(text):
        match = _NAME.match(text, position)
        if not match:
            raise SpecError("a pass name should stand here", fix="write name{option=value}, …", text=text, position=position)
        options, end = _options(text, match.end()) if text.startswith("{", match.end()) else ({}, match.end())
        specs.append(Spec(match.group(), options, text, position))
        position = _skip(text, end)
        if position >= len(text):
            break
        if text[position] != ",":
            raise SpecError("a comma should stand between passes", fix="write pass, pass", text=text, position=position)
        position = _skip(text, position + 1)
    return specs


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _options(text: str, start: int) -> tuple[dict[str, str], int]:
    options: dict[str, str] = {}
    position = _skip(text, start + 1)
    while position < len(text) and text[position] != "}":
        key = _KEY.match(text, position)
        value = _VALUE.match(text, key.end()) if key else None
        if not key or not value:
            raise SpecError("an option is key=value", fix="write {key=value key=value}", text=text, position=position)
        if key.group(1) in options:
            raise SpecError(f"option '{key.group(1)}' is given twice", fix="leave one of them out", text=text, position=position)
        options[key.group(1)] = _unquote(value.group())
        position = _skip(text, value.end())
    if position >= len(text):
        raise SpecError("this { is never closed", fix="add }", text=text, position=start)
    return options, position + 1


def _unquote(value: str) -> str:
    """A trailing comma separates options; a comma inside joins a list."""
    if value.startswith('"'):
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value.rstrip(",")


def instantiate(cls: type[T], spec: Spec) -> T:
    """Make `cls` from a parsed spec. Raises SpecError for unknown options and values out of type or range."""
    hints = typing.get_type_hints(cls)
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, text in spec.options.items():
        if key not in fields:
            fix = suggest(key, list(fields), listing=f"`deploycc passes {spec.name}`") if fields else f"'{spec.name}' has no options"
            raise SpecError(f"'{spec.name}' has no option '{key}'", fix=fix, text=spec.text, position=spec.position)
        try:
            values[fields[key].name] = convert(hints[fields[key].name], text)
        except ValueError as error:
            raise SpecError(
                f"option '{key}' of '{spec.name}': {error}", fix="give a value of that kind", text=spec.text, position=spec.position
            ) from None
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"'{spec.name}': {error}", fix=f"`deploycc passes {spec.name}` explains its options", text=spec.text, position=spec.position
        ) from None


def convert(kind: Any, text: str) -> Any:
    """Text to a value of the annotated type; raises ValueError that says what the type is."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        if text == "none" and type(None) in get_args(kind):
            return None
        return convert(members[0], text)
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise ValueError(f"'{text}' is not one of {', '.join(get_args(kind))}")
    if get_origin(kind) is tuple:
        return tuple(convert(get_args(kind)[0], item) for item in text.split(",") if item)
    if kind is bool:
        if text in ("true", "false"):
            return text == "true"
        raise ValueError(f"'{text}' is not true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"'{text}' is not {'a whole number' if kind is int else 'a number'}") from None
    return text


def format_spec(value: Any, *, full: bool = False) -> str:
    """The text of a pass; `full` writes options at their defaults out too."""
    parts = [
        f"{field.name.replace('_', '-')}={format_value(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if full or getattr(value, field.name) != _default(field)
    ]
    return f"{value.name}{{{' '.join(parts)}}}" if parts else str(value.name)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def format_value(value: Any) -> str:
    """One option's value as it is written in a pipeline."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, typing.cast("tuple[Any, ...]", value))) or '""'
    text = str(value)
    return text if re.fullmatch(r'[^\s{}",]+', text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
