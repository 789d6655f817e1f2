"""Runtimes that the C++ runner uses: cross-compiled against the runtime's aarch64 wheel, as `deploycc package --runner cpp` does."""

from __future__ import annotations

from pathlib import Path

from deploycc.emulate.session import Programs
from deploycc.package import cpp_build
from deploycc.runtime.bundle import LoadedBundle, listed

ARCH = "aarch64"
RUNNER = "runner"
PROBE = Path(__file__).parent.parent / "native" / "probe.cpp"


def programs(bundle: LoadedBundle) -> Programs:
    """The runner that travels with the bundle, else one that is built, and the probe beside it."""
    runtime = bundle.manifest["runtime"]
    built = cpp_build.build(runtime["session"], runtime["version"], ARCH, PROBE)
    own = any(entry["path"] == RUNNER for entry in listed(bundle.manifest))
    runner = (bundle.folder / RUNNER).resolve() if own else built / RUNNER
    words = "the bundle's C++ runner" if own else "a C++ runner as of `deploycc package --runner cpp`"
    return Programs((str(runner),), (str(built / "probe"),), f"{runtime['package']} {runtime['version']}, {words}")
