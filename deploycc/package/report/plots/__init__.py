"""The figures: one file = one kind, found by looking here.

A module says where its figures belong (`SECTION`: "times", "passes" or "precision"; `ORDER` within it) and has `draw(subject)`, which gives
a list of `Plot`: empty where the subject has nothing to show.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from deploycc.package.report.drawing import Plot, drawing
from deploycc.package.report.subject import Subject

SECTIONS = ("times", "passes", "precision")


def figures(subject: Subject) -> Mapping[str, list[Plot]]:
    """By section."""
    found: dict[str, list[Plot]] = {section: [] for section in SECTIONS}
    with drawing():
        for module in _modules():
            found[module.SECTION] += module.draw(subject)
    return found


@cache
def _modules() -> tuple[Any, ...]:
    names = [item.name for item in pkgutil.iter_modules(__path__) if not item.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(sorted(modules, key=lambda module: (module.ORDER, module.__name__)))
