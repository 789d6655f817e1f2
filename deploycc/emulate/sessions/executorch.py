"""ExecuTorch in the guest: no Python and no PyTorch, whose aarch64 wheels do not fit its binding."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deploycc.emulate.session import Programs
from deploycc.emulate.sessions import _native
from deploycc.runtime.bundle import LoadedBundle


class ExecuTorchGuest:
    """The C++ runner with ExecuTorch's libraries; counts are the same in every call and every run."""

    name: ClassVar[str] = "executorch"

    def programs(self, bundle: LoadedBundle, work: Path, trusted: bool = False) -> Programs:
        """Nothing of it is for one run alone."""
        return _native.programs(bundle, trusted)
