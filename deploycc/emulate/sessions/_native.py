"""Runtimes that the C++ runner uses: cross-compiled against the runtime's aarch64 wheel, as `deploycc package --runner cpp` does."""

from __future__ import annotations

from pathlib import Path

from deploycc.emulate.session import Programs, runner_of
from deploycc.package import cpp_build
from deploycc.runtime.bundle import LoadedBundle

ARCH = "aarch64"
RUNNER = "runner"
PROBE = Path(__file__).parent.parent / "native" / "probe.cpp"


def programs(bundle: LoadedBundle, trusted: bool) -> Programs:
    """The C++ runner, and the probe beside it."""
    runtime = bundle.manifest["runtime"]
    built = cpp_build.build(runtime["session"], runtime["version"], ARCH, PROBE)
    runner, told = runner_of(bundle, RUNNER, built / RUNNER, trusted)
    return Programs((str(runner),), (str(built / "probe"),), f"{runtime['package']} {runtime['version']} in the C++ runner", notes=told)
