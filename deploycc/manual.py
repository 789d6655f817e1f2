"""Lists and manuals, derived from the plug-ins themselves: docstrings, fields, constraint functions, target files. Pure text."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

from deploycc import ladder
from deploycc.core import target as targets
from deploycc.core.contract import Pass, options_of
from deploycc.core.registry import BACKENDS, DATASETS, MODELS, PASSES, suggest, summary
from deploycc.errors import UnknownName
from deploycc.planning import Plan
from deploycc.remote.addresses import LINKS


def table(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Left-aligned columns; the last one may be long."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        (indent + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])).rstrip() for row in rows
    )


def list_passes() -> str:
    """Name, forms, effect and first line of every pass."""
    rows = [("PASS", "TAKES", "GIVES", "EFFECT", "WHAT IT DOES")]
    for name in PASSES.names():
        cls = PASSES.get_class(name)
        takes = "|".join(sorted(form.name for form in cls.consumes))
        rows.append((name, takes, cls.produces.name if cls.produces else "same", str(cls.effect), summary(cls)))
    return table(rows)


def pass_manual(name: str) -> str:
    """Everything about one pass: what it does, its options with types and defaults, and the maths of its module."""
    cls = PASSES.get_class(name)
    takes = " or ".join(sorted(form.name for form in cls.consumes))
    gives = cls.produces.name if cls.produces else "the same form"
    lines = [f"{name}: {summary(cls)}", "", f"takes {takes}, gives {gives}; effect: {cls.effect}"]
    if cls.reads:
        lines.append(f"reads {', '.join(sorted(cls.reads))} data")
    if options_of(cls):
        lines += ["", f"options, as in {name}{{{_example(cls)}}}:", table(_option_rows(cls), indent="  ")]
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    return "\n".join([*lines, "", module, *(["", rules] if (rules := cls.rules()) else [])])


def _example(cls: type[Pass]) -> str:
    first = next((field for field in options_of(cls) if field.name in vars(cls).get("__annotations__", {})), options_of(cls)[0])
    return f"{first.name.replace('_', '-')}=…"


def _option_rows(cls: type[Pass]) -> list[tuple[str, str, str]]:
    hints = typing.get_type_hints(cls)
    texts = attribute_docs(cls)
    shared = {name for base in cls.__mro__[1:] for name in vars(base).get("__annotations__", {})}
    ordered = sorted(options_of(cls), key=lambda field: field.name in shared)  # its own first
    return [
        (f"{field.name.replace('_', '-')}={_default_text(field)}", type_text(hints[field.name]), texts.get(field.name, ""))
        for field in ordered
    ]


def _default_text(field: dataclasses.Field[Any]) -> str:
    from deploycc.core.spec import format_value

    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return "…" if default is dataclasses.MISSING else format_value(default)


def type_text(kind: Any) -> str:
    """A type as a user reads it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(arguments)
    if typing.get_origin(kind) is tuple:
        return f"{type_text(arguments[0])},…"
    if arguments:
        return " | ".join("none" if item is type(None) else type_text(item) for item in arguments)
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}.get(kind, getattr(kind, "__name__", str(kind)))


def attribute_docs(cls: type[Any]) -> dict[str, str]:
    """The `Attributes:` sections of the docstrings of a class and its bases, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            found[match.group(1)] = " ".join(match.group(2).split())
    return found


def list_targets() -> str:
    """Name, backend, architecture, fit for this machine and title of every target."""
    rows = [("TARGET", "BACKEND", "ARCH", "HERE", "WHAT IT IS")]
    for name in targets.names():
        target = targets.load(name)
        misfit = targets.misfit(target)
        rows.append((name, target.backend, target.arch, "yes" if misfit is None else f"no: {misfit}", target.title))
    return table(rows)


def target_manual(name: str) -> str:
    """A target with everything it inherits written out."""
    target = targets.load(name)
    lines = [f"{name}: {target.title}", *([target.docs] if target.docs else []), ""]
    lines += [f'backend = "{target.backend}"', f'arch = "{target.arch}"', f'pipeline = "{target.pipeline}"', f"auto = {target.auto}"]
    lines += [f"notices = {_toml(target.notices)}"] if target.notices else []
    for section in ("hardware", "runtime", "engine", "quant", "limits", "bench"):
        values = getattr(target, section)
        fields = type(values).model_fields
        lines += ["", f"[{section}]"]
        lines += [
            f"{key} = {_toml(value)}" + (f"  # {fields[key].description}" if fields[key].description else "") for key, value in values
        ]
    misfit = targets.misfit(target)
    return "\n".join([*lines, "", "fits this machine" if misfit is None else f"does not fit this machine: {misfit}"])


def _toml(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def list_backends() -> str:
    """Name, version or what is missing, and first line of every backend."""
    rows = [("BACKEND", "HERE", "WHAT IT IS")]
    for name in BACKENDS.names():
        available = BACKENDS.get(name).available()
        rows.append((name, available.version or f"no: {available.missing}", summary(BACKENDS.get_class(name))))
    return table(rows)


def backend_manual(name: str) -> str:
    """What a backend takes and every rule a model must satisfy."""
    backend = BACKENDS.get(name)
    available = backend.available()
    here = f"version {available.version}" if available else f"not here: {available.missing}; {available.install}"
    forms = " or ".join(sorted(form.name for form in backend.accepts))
    lines = [f"{name}: {summary(type(backend))}", "", f"takes {forms}; {here}", ""]
    lines.append("rules a model must satisfy, and how to satisfy them:")
    lines += [_rule(constraint.__doc__ or constraint.__name__) for constraint in backend.constraints()]
    return "\n".join(lines)


def _rule(text: str) -> str:
    """A constraint's docstring as an item of a list."""
    return "  - " + textwrap.indent(inspect.cleandoc(text).replace("\n\n", "\n"), "    ").lstrip()


def list_sources() -> str:
    """How models and data are named."""
    rows = [("MODEL", "HOW TO WRITE IT", "WHAT IT IS")]
    rows += [(name, MODELS.get(name).syntax, summary(MODELS.get_class(name))) for name in MODELS.names()]
    rows += [("", "", ""), ("DATA", "HOW TO WRITE IT", "WHAT IT IS")]
    rows += [(name, DATASETS.get(name).syntax, summary(DATASETS.get_class(name))) for name in DATASETS.names()]
    return table(rows)


def source_manual(name: str) -> str:
    """The whole docstring of a source (of a model source and a data source, where both have the name)."""
    found = [registry.get_class(name) for registry in (MODELS, DATASETS) if name in registry.names()]
    if not found:
        known = sorted({*MODELS.names(), *DATASETS.names()})
        raise UnknownName(f"there is no source '{name}'", fix=suggest(name, known, listing="`deploycc sources`"))
    texts = [f"{name} ({cls.syntax})\n\n{inspect.getdoc(cls)}\n\n{inspect.getdoc(inspect.getmodule(cls)) or ''}" for cls in found]
    return "\n\n".join(text.rstrip() for text in texts)


def list_devices() -> str:
    """Ways to reach a device, and whether each works here."""
    rows = [("DEVICE", "HERE", "HOW TO WRITE IT", "WHAT IT IS")]
    for name in LINKS.names():
        available = LINKS.get(name).available()
        here = available.version or f"no: {available.missing}; {available.install}"
        rows.append((name, here, LINKS.get(name).syntax, summary(LINKS.get_class(name))))
    return table(rows)


def device_manual(name: str) -> str:
    """The whole docstring of a way to reach a device."""
    cls = LINKS.get_class(name)
    return f"{name} ({cls.syntax})\n\n{inspect.getdoc(cls)}\n\n{inspect.getdoc(inspect.getmodule(cls)) or ''}"


def plan_text(plan: Plan, model: str) -> str:
    """The resolved, typed pipeline and why."""
    target, form = plan.target, plan.form
    available = plan.backend.available()
    lines = [
        f"model     {model} ({plan.source.name}), captured as {form.name}",
        f"target    {target.name}: {target.title}",
        f"runtime   {plan.backend.name} " + (available.version or f"MISSING: {available.missing}; {available.install}"),
        "machine   "
        + ("this one: latency will be measured" if plan.native else f"not this one ({plan.misfit}): latency will not be measured"),
        "pipeline",
    ]
    rows: list[tuple[str, str, str, str, str]] = []
    for number, step in enumerate(plan.pipeline.steps, 1):
        after = step.body.produces or form
        reads = f"reads {', '.join(sorted(step.body.reads))}" if step.body.reads else ""
        rows.append((f"{number}", step.body.name, f"{form.name} → {after.name}", str(step.body.effect), reads))
        form = after
    lines.append(table(rows, indent="  ") if rows else "  (no passes)")
    lines += [f"  left out: {name}: the model is already past it" for name in plan.dropped]
    lines.append(f"  in full: {plan.pipeline.full()}")
    lines.append("quant     " + ", ".join(f"{key}={_toml(value)}" for key, value in target.quant))
    lines.append("limits    " + ", ".join(f"{key}={_toml(value)}" for key, value in target.limits))
    lines.append("ladder    " + ladder.described(plan))
    lines += [f"data      {line}" for line in _data_lines(plan)]
    return "\n".join(lines)


def _data_lines(plan: Plan) -> list[str]:
    counts = [f"{role}: {len(plan.data.part(role))} samples" for role in ("calibration", "validation", "training") if plan.data.has(role)]
    return [*(counts or ["none: give --data and --calibration"]), *plan.data.notes]
