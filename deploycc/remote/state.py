"""Devices that are finished while others failed: kept, so that the same command goes on with the others.

Latencies are never cached: this holds only until all devices of the same command are through, and is forgotten with `--no-resume`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from pydantic import ValidationError

from deploycc.errors import StoreError
from deploycc.remote.work import DeviceResult


class State:
    """A file in the cache, one for the same work on the same devices."""

    def __init__(self, root: Path, key: str) -> None:
        self.path = root / "devices" / f"{key}.json"
        self._lock = threading.Lock()
        self._results: dict[str, DeviceResult] = {}

    def read(self) -> dict[str, DeviceResult]:
        """Finished devices by address; a file that cannot be read counts as absent."""
        with contextlib.suppress(OSError, ValueError, ValidationError, TypeError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self._results = {item["device"]: DeviceResult.model_validate(item) for item in found}
        return dict(self._results)

    def put(self, result: DeviceResult) -> None:
        """Keep a finished device. Raises StoreError."""
        with self._lock:
            self._results[result.device] = result
            document = json.dumps([item.model_dump(mode="json") for item in self._results.values()])
            work = self.path.with_suffix(".writing")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                work.write_text(document, encoding="utf-8")
                work.replace(self.path)
            except OSError as error:
                raise StoreError(f"cannot write {self.path}: {error.strerror}", fix="set DEPLOYCC_CACHE to a writable folder") from error

    def forget(self) -> None:
        """All devices are through, or everything is done afresh."""
        self._results = {}
        with contextlib.suppress(OSError):
            self.path.unlink()
