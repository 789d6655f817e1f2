"""One model in a process of its own: `python -m deploycc.runtime.fresh bundle FOLDER THREADS FEEDS.npz RUNS`, or `file SESSION MODEL …`.

Prints one JSON line: the moments (ns of the clock that all processes of a machine share) at which this module, the model and the first
answer were there, and the memory of the process. Imports what a device imports, and nothing else, so that both are the device's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from deploycc.errors import UsageError
from deploycc.runtime import bundle as bundles
from deploycc.runtime import host, sessions
from deploycc.runtime.sessions import Session
from deploycc.runtime.signature import Signature

Moments = dict[str, "int | None"]


def main(arguments: Sequence[str]) -> int:
    """Open, answer, go on for a while, and print."""
    imported = time.perf_counter_ns()
    *opening, feeds, runs = arguments
    sys.stdout.write(json.dumps(observe(opener(opening), bundles.read_arrays(Path(feeds)), int(runs), imported)) + "\n")
    return 0


def opener(arguments: Sequence[str]) -> Callable[[], Session]:
    """How the model is opened. Raises UsageError."""
    kind, *rest = arguments
    if kind == "bundle":
        folder, threads = rest
        return lambda: bundles.open_session(bundles.load(Path(folder)), int(threads))
    if kind == "file":
        name, model, signature, threads = rest
        return lambda: sessions.find(name).open(Path(model), Signature.from_json(json.loads(signature)), {}, int(threads))
    raise UsageError(f"'{kind}' is no way to open a model", fix="use bundle or file")


def observe(open_session: Callable[[], Session], feeds: Mapping[str, np.ndarray], runs: int, imported: int) -> Moments:
    """Open and answer, `runs` more times, and what that took."""
    with open_session() as session:
        opened = time.perf_counter_ns()
        session.run(feeds)
        session.synchronize()
        answered = time.perf_counter_ns()
        for _ in range(runs):
            session.run(feeds)
        session.synchronize()
        steady = host.rss_bytes()
        peak = host.peak_rss_bytes()
    return {"imported": imported, "opened": opened, "answered": answered, "peak": peak, "steady": steady}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
