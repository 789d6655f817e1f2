"""The C++ runner: one binary and the runtime's libraries; no Python on the device."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from deploycc.errors import UsageError
from deploycc.package import cpp_build
from deploycc.package.runner import Component, RunnerParts
from deploycc.runtime.bundle import LoadedBundle
from deploycc.runtime.machine import cpu_arch

RUNNER = "runner"
# Symbol versions that a program asks its C and C++ libraries for, as they stand in its .gnu.version_r.
SYSTEM = (
    ("glibc", re.compile(rb"\0GLIBC_(\d+\.\d+)"), "LGPL-2.1-or-later"),
    ("libstdc++", re.compile(rb"\0GLIBCXX_(\d+\.\d+(?:\.\d+)?)"), "GPL-3.0-or-later WITH GCC-exception-3.1"),
)


class CppRunner:
    """Cross-compiled for the device (`runner selftest | bench | predict FILE`), for ExecuTorch and ONNX Runtime; needs glibc and libstdc++."""

    name: ClassVar[str] = "cpp"

    def add(self, bundle: LoadedBundle, folder: Path, arch: str | None) -> RunnerParts:
        """Builds it, or takes it from the cache. Raises UsageError when the bundle is for another architecture than `arch`."""
        runtime = bundle.manifest["runtime"]
        built = cpp_build.build(runtime["session"], runtime["version"], _arch(bundle.manifest["target"], arch))
        files = sorted(path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file())
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(built / name, folder / name)
        return RunnerParts(tuple(files), tuple(_needs(built / name for name in files)))


def _arch(target: dict[str, Any], asked: str | None) -> str:
    own: str = target["arch"]
    if asked and own not in ("any", asked):
        raise UsageError(
            f"--arch {asked}: the bundle is for {own} (target '{target['name']}')", fix=f"leave --arch out, or give --arch {own}"
        )
    return asked or (cpu_arch() if own == "any" else own)


def _needs(files: Iterable[Path]) -> list[Component]:
    """The C and C++ libraries of the device, in the highest version that one of the files asks for."""
    contents = [path.read_bytes() for path in files]
    needs: list[Component] = []
    for name, pattern, licence in SYSTEM:
        found = {tuple(map(int, match.split(b"."))) for content in contents for match in pattern.findall(content)}
        if found:
            needs.append(Component(name, f"≥ {'.'.join(map(str, max(found)))}", licences=(licence,)))
    return needs
