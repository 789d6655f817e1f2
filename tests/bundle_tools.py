"""What several tests of bundles need: the device's runner under guard, and a manifest that was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploycc.runtime.bundle import MANIFEST, document_digest

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("torch", "onnx", "pydantic", "typer", "rich", "jinja2", "psutil", "matplotlib")
# Runs the archive as `python runner.pyz` does, with an import hook that refuses what a device does not have, and the source tree.
GUARDED = f"""
import runpy, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {FORBIDDEN!r}:
            raise ImportError(f'the runner imports {{name}}')
sys.meta_path.insert(0, Guard())
sys.path[:] = [entry for entry in sys.path if entry != {str(ROOT)!r}]
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0])
status = 0
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as stop:
    status = stop.code
import deploycc.errors
assert '.pyz' in deploycc.errors.__file__, deploycc.errors.__file__
sys.exit(status)
"""


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> None:
    """Change the manifest; `sealed` gives it a digest that fits, as whoever builds a hostile bundle would."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    if sealed:
        document["measured"]["digest"] = document_digest(document)
    (folder / MANIFEST).write_text(json.dumps(document))
