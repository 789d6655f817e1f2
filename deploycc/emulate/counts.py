"""What a call costs on an emulated core: instructions, by kind. An estimate of relative cost, never of time.

A plug-in of qemu (native/count.c) counts between the marks that a program makes; it is compiled by this machine's C compiler the first time
and kept in the cache. Instructions of different cores, and of int8 against float, do not take the same time: on cores without dot product
the count understates what int8 gains, since float is bound by memory there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploycc.core.store import default_root
from deploycc.emulate import root
from deploycc.errors import StoreError

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c11", "-O2", "-shared", "-fPIC")
INSTALL = "apt-get install -y gcc libc6-dev"
TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Count:
    """One call: all its instructions, and how many there are of each kind."""

    instructions: int
    kinds: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimated relative cost of one call on a core; not measured on any.

    Attributes:
        instructions: median of the calls.
        spread: largest less smallest of the calls, over the median; 0 = identical.
        calls: that were counted.
        kinds: of the median call, instructions by kind.
    """

    instructions: int
    spread: float
    calls: int
    kinds: Mapping[str, int]

    @property
    def minsn(self) -> float:
        """Millions of instructions."""
        return self.instructions / 1e6


def cost(counts: Sequence[Count]) -> Cost:
    """Of several calls of the same sample."""
    numbers = [count.instructions for count in counts]
    median = statistics.median_low(numbers)
    spread = (max(numbers) - min(numbers)) / median if median else 0.0
    return Cost(median, spread, len(counts), dict(counts[numbers.index(median)].kinds))


def read(path: Path) -> list[Count]:
    """What the plug-in wrote, one line per call."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Count(row.pop("instructions"), row) for row in rows]


def options(plugin: Path, out: Path) -> list[str]:
    """For qemu, whose options double a comma in a path."""
    plain, target = (str(path).replace(",", ",,") for path in (plugin, out))
    return ["-plugin", f"{plain},out={target}"]


def plugin() -> tuple[Path | None, str]:
    """The compiled plug-in, or None and why nothing can be counted here. Raises StoreError when the cache cannot be written."""
    qemu = root.program()
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, f"counting needs a C compiler ({INSTALL})"
    try:
        library = _built(compiler)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"the plug-in that counts does not compile: {said[0] if said else error}"
    refusal = _refusal(qemu, library)
    return (None, refusal) if refusal else (library, "")


def _built(compiler: str) -> Path:
    sources = sorted(SOURCES.glob("*.[ch]"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256(b"".join([version.encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:16]
    folder = default_root() / "emulate"
    library = folder / f"count-{key}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".count-", dir=folder) as work:
            out = Path(work) / "count.so"
            command = [compiler, *FLAGS, "-o", str(out), str(SOURCES / "count.c")]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
            out.replace(library)
    except OSError as error:
        raise StoreError(f"cannot write {library}: {error.strerror or error}", fix="free some space, or set DEPLOYCC_CACHE") from error
    return library


@functools.cache
def _refusal(qemu: str, library: Path) -> str:
    """Why this qemu does not load it: built without plug-ins (statically), or with another version of their interface."""
    with tempfile.TemporaryDirectory() as work:
        given = options(library, Path(work) / "counts")
        command = [*root.prefix("cortex-a53", options=given), root.python(), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"qemu {root.version(qemu)} does not load the plug-in that counts: {said}"
