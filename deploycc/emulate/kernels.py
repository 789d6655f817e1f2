"""What a model is multiplied with on a core, from the instructions that ran: i8mm, dot products, or neither.

With the plug-in (`counts`) from what was executed in a call, else from the code that the emulator translated in the whole run, each
instruction once (qemu -d in_asm). Kinds are those of native/rules.h.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from deploycc.emulate.counts import SOURCES, Cost

RULE = re.compile(r"^RULE\((0x\w+), (0x\w+), (\w+)\)", re.MULTILINE)
LINE = re.compile(rb"^0x[0-9a-f]+:\s+([0-9a-f]{8})\s", re.MULTILINE)  # of a disassembly: address, word
SHARE = 0.01  # of all executed instructions that a kind must have to be what a model is computed with
# Integer multiplications, the one that says most of the core first.
INTEGER = (
    ("mmla", "i8mm (smmla, ummla)"),
    ("dot", "dot product (sdot, udot)"),
    ("widening", "no dot product (smull, smlal)"),
)
OTHER = (("fma", "float (fmla)"), ("sve", "SVE"))


def options(log: Path) -> list[str]:
    """For qemu: write what it translates."""
    return ["-d", "in_asm", "-D", str(log)]


def executed(cost: Cost) -> tuple[str, ...]:
    """Of a counted call."""
    return _named({kind for kind, number in cost.kinds.items() if number >= SHARE * cost.instructions})


def seen(kinds: Mapping[str, int]) -> tuple[str, ...]:
    """Of translated code."""
    return _named({kind for kind, number in kinds.items() if number})


def _named(kinds: set[str]) -> tuple[str, ...]:
    best = next((text for kind, text in INTEGER if kind in kinds), None)
    return (*([best] if best else []), *(text for kind, text in OTHER if kind in kinds))


def scan(log: Path) -> dict[str, int]:
    """Translated instructions by kind."""
    words = Counter(match[1] for match in LINE.finditer(log.read_bytes()))
    found = Counter[str]()
    for word, number in words.items():
        found[kind_of(int(word, 16))] += number
    return dict(found)


def kind_of(word: int) -> str:
    """Of one instruction."""
    return next((kind for mask, value, kind in _rules() if word & mask == value), "integer")


@cache
def _rules() -> tuple[tuple[int, int, str], ...]:
    text = (SOURCES / "rules.h").read_text(encoding="utf-8")
    return tuple((int(mask, 16), int(value, 16), kind.lower()) for mask, value, kind in RULE.findall(text))
