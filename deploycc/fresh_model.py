"""A torch model in a process of its own (deploycc.runtime.fresh): captured from its text, and run eagerly.

`python -m deploycc.fresh_model JSON FEEDS.npz RUNS`. Opening is then importing PyTorch, capturing, and making the session.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploycc.runtime import bundle as bundles
from deploycc.runtime.fresh import observe
from deploycc.runtime.sessions import Session


def main(arguments: Sequence[str]) -> int:
    """Open, answer, go on for a while, and print what that took."""
    imported = time.perf_counter_ns()
    asked, feeds, runs = arguments
    found = observe(lambda: _open(json.loads(asked)), bundles.read_arrays(Path(feeds)), int(runs), imported)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _open(asked: dict[str, Any]) -> Session:
    from deploycc.core.registry import FORMS
    from deploycc.tools import load_model

    shapes = {name: tuple(shape) for name, shape in asked["inputs"].items()}
    weights = None if asked["weights"] is None else Path(asked["weights"])
    artifact = load_model(asked["model"], shapes, weights, asked["random_weights"], asked["seed"])
    return FORMS.get(artifact.form.value).open(artifact, threads=asked["threads"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
