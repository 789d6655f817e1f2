"""What both scripts share: where results go, and tables that GitHub shows."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deploycc.bench.environment import Environment
from deploycc.core.store import default_root
from deploycc.demo import Photos, photos
from deploycc.render import finite
from deploycc.runtime.machine import cpu_model

RESULTS = Path(__file__).parent / "results"
DASH = "–"
STARTED = time.monotonic()


def results_folder() -> Path:
    """`results/<this CPU>/`, made when it is not there."""
    folder = RESULTS / slug(cpu_model())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def slug(name: str) -> str:
    """Letters and digits joined by dashes: "AMD EPYC 9B14 (Genoa)" → "amd-epyc-9b14-genoa"."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def real_photos() -> Photos:
    """The demo's photos: 165 labelled ones, others for calibration."""
    return photos(default_root() / "photos", fetch=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def about(environment: Environment) -> str:
    """The machine and versions in two lines; no host name."""
    limit = f", cgroup limit {environment.cpu_limit:g}" if environment.cpu_limit else ""
    virtual = ", virtual machine" if environment.virtual else ""
    load = f", load {environment.load:.1f}" if environment.load is not None else ""
    versions = ", ".join(f"{name} {version}" for name, version in environment.libraries.items())
    return (
        f"{environment.cpu_model} ({', '.join(flag for flag in environment.isa if 'vnni' in flag or flag in ('avx2', 'avx512f'))}), "
        f"{environment.cores} cores{limit}{virtual}{load}; {environment.threads} thread(s) per session.\n"
        f"{environment.system}, Python {environment.python}, {versions}."
    )


def write(folder: Path, name: str, document: Any, markdown: str) -> None:
    """`name`.json and `name`.md."""
    (folder / f"{name}.json").write_text(json.dumps(finite(document), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Where a script is, on stderr."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {line}", file=sys.stderr, flush=True)
