"""The C++ runner: one binary and the runtime's libraries; no Python on the device."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from deploycc.errors import UnsupportedError
from deploycc.package import cpp_build
from deploycc.package.runner import Component, RunnerParts
from deploycc.runtime.bundle import LoadedBundle

LICENCES = {"executorch": "BSD-3-Clause", "onnxruntime": "MIT"}  # by session
# Symbol versions that a program asks its C and C++ libraries for, as they stand in its .gnu.version_r.
SYSTEM = (
    ("glibc", re.compile(rb"\0GLIBC_(\d+\.\d+)"), "LGPL-2.1-or-later"),
    ("libstdc++", re.compile(rb"\0GLIBCXX_(\d+\.\d+(?:\.\d+)?)"), "GPL-3.0-or-later WITH GCC-exception-3.1"),
)


class CppRunner:
    """`runner selftest | bench | predict FILE`, compiled for the device; for ExecuTorch and ONNX Runtime; needs glibc and libstdc++."""

    name: ClassVar[str] = "cpp"

    def add(self, bundle: LoadedBundle, folder: Path, arch: str) -> RunnerParts:
        """Builds it, or takes it from the cache. Raises UnsupportedError, MissingDependency and BuildError."""
        runtime = bundle.manifest["runtime"]
        if runtime.get("provider", "cpu") != "cpu":
            raise UnsupportedError(f"the C++ runner is for the CPU, the bundle for '{runtime['provider']}'", fix="use --runner python")
        built = cpp_build.build(runtime["session"], runtime["version"], arch)
        files = sorted(path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file())
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(built / name, folder / name)
        package, version = runtime["package"], runtime["version"]
        carried = Component(package, version, licences=(LICENCES[runtime["session"]],), purl=f"pkg:pypi/{package}@{version}")
        return RunnerParts(tuple(files), _needs(built / name for name in files), (carried,))


def _needs(files: Iterable[Path]) -> tuple[Component, ...]:
    """The C and C++ libraries of the device, in the highest version that one of the files asks for."""
    contents = [path.read_bytes() for path in files]
    needs: list[Component] = []
    for name, pattern, licence in SYSTEM:
        found = {tuple(map(int, match.split(b"."))) for content in contents for match in pattern.findall(content)}
        if found:
            needs.append(Component(name, f"≥ {'.'.join(map(str, max(found)))}", licences=(licence,)))
    return tuple(needs)
